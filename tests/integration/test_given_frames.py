"""Given frames the whole way: training, export, generation from pictures and clips, and the figures."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_inputs import Tiny, call

from sora_lite.data.index import Index
from sora_lite.data.loader import ClipReader
from sora_lite.data.video import encode_png, read_frames, write_mp4
from sora_lite.evaluation.record import RECORD, read_record

ROWS = "frames=[{mode: none}, {mode: first, weight: 5}, {mode: after}, {mode: random}]"


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frames")
    settings = ["experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={root}"]
    assert call("train", *settings, "run.steps=2", "model.frame_conditions=true", ROWS) == 0
    assert call("train", *settings, "model.frame_conditions=true", ROWS) == 0  # goes on
    assert call("export", f"run={root / 'tiny'}") == 0
    return root / "tiny"


def real_clip(tiny: Tiny) -> np.ndarray:
    return ClipReader(Index.load(tiny.shards, "validation"), cache_bytes=0).read(0, (17, 32, 32), None).frames


def test_training_reads_given_frames(run: Path) -> None:
    lines = read_record(run / RECORD)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert any("val_loss" in line for line in lines)


def test_pictures_and_clips_begin_and_end_generations(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    real = real_clip(tiny)
    write_mp4(tmp_path / "clip.mp4", real, 8, crf=0)
    (tmp_path / "picture.png").write_bytes(encode_png(real[16]))
    out = tmp_path / "out"
    condition = [f"condition.first={tmp_path / 'clip.mp4'}", f"condition.last={tmp_path / 'picture.png'}"]
    assert call("generate", f"model_from={run}", f"out={out}", "count=2", "sampling.steps=2", *condition) == 0
    assert len(list(out.glob("generation_*.mp4"))) == 2
    first, second = ([frame for _, frame in read_frames(out / f"generation_{i:04d}.mp4")] for i in (0, 1))
    assert len(first) == 17

    def far(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a.astype(int) - b.astype(int)).mean())

    # the same frames are given to both, and what is made between them differs
    assert max(far(first[t], second[t]) for t in (0, 4, 16)) < 1 < min(far(first[t], second[t]) for t in (8, 12))
    assert "given frames, underlined frame by frame: 0, 1, 2, 3, 4, 16" in (out / "index.html").read_text()


def test_figures_of_each_mode(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    settings = ["count=4", "clips=4", "judge_steps=2", "sampling.steps=2", "attributes=[direction]"]
    modes = "frames=[first, last, first_last, before, after]"
    assert call("evaluate", f"model_from={run}", f"shards={tiny.shards}", f"out={out}", modes, *settings) == 0
    figures = json.loads(out.read_text())
    for mode in ("first", "last", "first_last", "before", "after"):
        assert 0 <= figures[f"{mode}_direction_accuracy"] <= 1
        assert figures[f"{mode}_seam"] > 0
    # in a causal VAE, frames that nothing comes before are the same alone and in the clip
    for mode in ("first", "before"):
        assert figures[f"{mode}_given_psnr_db"] == pytest.approx(figures[f"{mode}_vae_psnr_db"], abs=0.01)


def test_what_does_not_fit_is_refused(
    run: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={tmp_path}"]
    for words, says in [
        ([ROWS], "model.frame_conditions: is false"),
        (["model.frame_conditions=true"], "frames: has no row that gives frames"),
        (["model.frame_conditions=true", "frames=[{mode: first, weight: 0}]"], "frames[0].weight: must be above 0"),
        (["model.frame_conditions=true", "frames=[{mode: frist}]"], "first_last"),
    ]:
        assert call("train", *settings, *words) == 2
        assert says in capsys.readouterr().err
    assert call("generate", f"model_from={run}", f"out={tmp_path}", f"condition.first={tmp_path / 'no.png'}") == 2
    assert "condition.first" in capsys.readouterr().err
