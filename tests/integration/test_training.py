"""What training leaves behind: the statistics that a DiT relies on, and sane losses under bf16."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_inputs import Tiny, call

from sora_lite.cli import train
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipReader
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation.export import load_vae
from sora_lite.generation.pipeline import to_float
from sora_lite.training import store
from sora_lite.training.trainer import Trainer


def settings(tiny: Tiny, root: Path, *more: str) -> list[str]:
    return ["experiment=tiny_vae", f"data.shards={tiny.shards}", f"run.root={root}", "run.steps=4", *more]


@pytest.mark.parametrize("stage", [0, 3])
def test_trained_statistics_are_those_of_the_latents(stage: int, tiny: Tiny, tmp_path: Path) -> None:
    assert call("train-vae", *settings(tiny, tmp_path, f"parallel=zero{stage}")) == 0
    assert call("export", f"run={tmp_path / 'tiny_vae'}") == 0
    vae, _ = load_vae(tmp_path / "tiny_vae")
    index = Index.load(tiny.shards, "train")
    reader = ClipReader(index, cache_bytes=0)
    clips = np.stack([reader.read(sample, (17, 32, 32)).frames for sample in range(len(index))])
    with torch.no_grad():
        posterior = vae.encode(to_float(torch.from_numpy(clips).permute(0, 4, 1, 2, 3)))
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        latents = vae.normalize(posterior.sample(noise))
    variance, mean = torch.var_mean(latents, (0, 2, 3, 4))
    assert not torch.equal(vae.latent_std, torch.ones_like(vae.latent_std))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=0.05)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=0.08)


class Stopped(Trainer):
    """Ends as by Ctrl-C once there is a checkpoint."""

    def _save(self) -> None:
        super()._save()
        self.saver.finish()
        raise KeyboardInterrupt


def test_an_unfinished_vae_is_not_exported(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train, "Trainer", Stopped)
        assert call("train-vae", *settings(tiny, tmp_path, "run.save_every=1")) == 130
    assert call("export", f"run={tmp_path / 'tiny_vae'}") == 2
    assert "let `sora-lite train-vae` finish" in capsys.readouterr().err
    # lowered to where it is, the run ends and can be exported
    assert call("train-vae", *settings(tiny, tmp_path, "run.steps=1")) == 0
    assert call("export", f"run={tmp_path / 'tiny_vae'}") == 0


def test_every_multiple_that_shall_be_kept_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    more = ["run.steps=12", "run.save_every=5", "run.keep_every=5", "run.keep_last=1", "run.validate_every=0"]
    assert call("train-vae", *settings(tiny, tmp_path, *more)) == 0
    kept = [step for step, _, _ in store.complete(tmp_path / "tiny_vae" / "checkpoints")]
    assert kept == [5, 10, 12]


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_trains_both(stage: int, tiny: Tiny, tmp_path: Path) -> None:
    more = (f"parallel=zero{stage}", "parallel.precision=bf16", "parallel.activation_checkpointing=true")
    assert call("train-vae", *settings(tiny, tmp_path, *more)) == 0
    dit = [
        "experiment=tiny",
        f"vae_from={tiny.vae}",
        f"data.shards={tiny.shards}",
        f"run.root={tmp_path}",
        "run.steps=3",
    ]
    assert call("train", *dit, "run.sample_every=3", *more) == 0
    for name in ("tiny_vae", "tiny"):
        losses = [line["loss"] for line in read_record(tmp_path / name / RECORD) if "loss" in line]
        assert len(losses) >= 3
        assert all(loss is not None and loss < 4 for loss in losses)


def test_data_sets_and_stills_are_mixed(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(tiny.shards, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))

    def words(steps: int, sets: str, ratio: float = 0.25) -> list[str]:
        return [
            "train", "experiment=tiny", f"vae_from={tiny.vae}", f"run.root={tmp_path}", f"run.steps={steps}",
            f"data.sets={sets}", f"data.image_ratio={ratio}", f"data.cache={tmp_path / 'cache'}",
            "data.buckets=[{resolution: [32, 32], frames: 1, keep: 0.5, batch: 8}, "
            "{resolution: [32, 32], frames: 17, batch: 8}]",
        ]  # fmt: skip

    sets = f"[{{shards: {tiny.shards}, weight: 3}}, {{shards: {copy}, weight: 1}}]"
    assert call(*words(4, sets)) == 0
    assert "25.00% of what is seen" in capsys.readouterr().out
    assert call(*words(8, sets)) == 0
    lines = [line for line in read_record(tmp_path / "tiny" / RECORD) if "pass_0" in line]
    assert [line["step"] for line in lines] == list(range(1, 9)) and "pass" not in lines[0]
    for line in lines:  # a line a step, so each has one bucket, whose loss is that of the step
        (bucket,) = {"loss_1x32x32", "loss_17x32x32"} & line.keys()
        assert line[bucket] == line["loss"]
        shares = [count / 8 * line[f"loss_set_{number}"] for number, count in enumerate((6, 2))]
        assert sum(shares) == pytest.approx(line["loss"], rel=1e-5)
    samples = len(Index.load(tiny.shards, "train"))
    assert [lines[-1]["pass_0"], lines[-1]["pass_1"]] == pytest.approx([48 / samples, 16 / samples])
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()} == {"index"}
    assert not (copy / ".cache").exists()
    for other in (
        words(9, sets.replace("weight: 3", "weight: 2")),
        words(9, sets, 0.5),
        words(9, f"[{{shards: {tiny.shards}}}]"),
    ):
        assert call(*other) == 2
    errors = capsys.readouterr().err
    assert "data.sets[0].weight was 3.0, is 2.0" in errors and "data.image_ratio was 0.25, is 0.5" in errors
    assert errors.count("give run.name another name") == 3 and "data.sets[1].shards: a data set with" in errors
    # What is meant is said once: from there on the order is another one, and the run needs no further word.
    other = words(10, sets.replace("weight: 3", "weight: 2"), 0.5)
    assert call(*other, "run.accept=[data.sets.weight,data.image_ratio]") == 0
    assert (
        "run.accept: from step 8 on, data.sets[0].weight was 3.0, is 2.0; data.image_ratio" in capsys.readouterr().out
    )
    assert call(*words(12, sets.replace("weight: 3", "weight: 2"), 0.5)) == 0 and call(*words(13, sets)) == 2
    lines = [line for line in read_record(tmp_path / "tiny" / RECORD) if "pass_0" in line]
    assert [line["step"] for line in lines] == list(range(1, 13)) and lines[8]["pass_0"] < lines[7]["pass_0"]
