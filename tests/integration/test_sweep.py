"""`sora-lite scaling` on a sweep that was trained by the same commands that the documentation gives."""

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny_inputs import Tiny, call

from data_tools.cli import main as sora_data
from sora_lite.evaluation.record import RECORD, read_record

WIDTHS = (12, 24, 36, 48)


def train(tiny: Tiny, root: Path, width: int, *more: str) -> int:
    return call(
        "train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={root}",
        f"run.name=size_{width}", f"model.width={width}", "model.depth=1", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sizes on latents that were encoded once; the third was stopped halfway and went on."""
    root = tmp_path_factory.mktemp("sweep")
    latents = root / "latents"
    words = [str(tiny.shards), str(latents), f"vae_from={tiny.vae}", "workers=0"]
    assert sora_data(["encode", *words, "buckets=[{resolution: [32, 32], frames: 17}]"]) == 0
    for width in WIDTHS:
        if width == WIDTHS[2]:
            assert train(tiny, root, width, f"data.latents={latents}", "run.steps=2") == 0
        assert train(tiny, root, width, f"data.latents={latents}") == 0
    return root


def test_the_record_counts_the_flops_of_training(sweep: Path) -> None:
    """Forward and twice as much backward, of 8 clips in each step, whether or not the run was stopped in between."""
    per_clip = [read_record(sweep / f"size_{width}" / RECORD)[0]["flops"] / 8 for width in WIDTHS]
    for width, forward_and_backward in zip(WIDTHS, per_clip, strict=True):
        lines = read_record(sweep / f"size_{width}" / RECORD)
        assert all(line["flops"] == line["step"] * 8 * forward_and_backward for line in lines)
        assert any("val_loss" in line for line in lines)
        assert all(line["from_latents"] == 1 for line in lines if "from_latents" in line)
        # 20 tokens and one block: its matrices alone, 2 FLOPs for each weight and token, without attention and text
        blocks = 3 * 2 * 20 * (4 + 8) * width**2
        assert forward_and_backward > blocks
    assert per_clip == sorted(per_clip)


def test_one_command_makes_law_and_picture(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("scaling", f"runs={sweep}/size_*", f"out={tmp_path}") == 0
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "scaling.json").read_text())
    assert [run["name"] for run in figures["runs"]] == [f"size_{width}" for width in WIDTHS]
    last = read_record(sweep / "size_48" / RECORD)[-1]
    assert figures["runs"][-1]["val_loss"] == last["val_loss"] == figures["held_out"]["measured"]
    assert figures["runs"][-1]["flops"] == last["flops"]
    assert "size_48" in said and "predicted from the others" in said
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_runs_that_do_not_compare_are_refused(
    tiny: Tiny, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in sweep.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    assert train(tiny, tmp_path, 60, "diffusion.shift=2") == 0
    assert call("scaling", f"runs={tmp_path}/size_*", f"out={tmp_path}") == 2
    assert "so their losses do not compare" in capsys.readouterr().err
    assert train(tiny, tmp_path, 72, "run.steps=2", "run.validate_every=0") == 0
    assert call("scaling", f"runs={tmp_path}/size_72", f"out={tmp_path}") == 2
    assert "let it finish" in capsys.readouterr().err
    assert call("scaling", f"runs={tmp_path}/none_*", f"out={tmp_path}") == 2
    assert "no run folder" in capsys.readouterr().err


def test_a_run_that_diverged_is_named(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sweep / "size_48", tmp_path / "size_48")
    record = tmp_path / "size_48" / RECORD
    lines = [line | {"val_loss": math.nan} if "val_loss" in line else line for line in read_record(record)]
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call("scaling", f"runs={tmp_path}/size_*", f"out={tmp_path}") == 2
    assert "size_48: has a validation loss" in (error := capsys.readouterr().err) and "leave it out" in error
