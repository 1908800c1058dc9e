"""One run over 4, 2, 1 and 4 ranks and ZeRO 1, 3, 2 and 0: as if nothing had changed."""

import json
from pathlib import Path

import dist_model as dm
import pytest
from dist_ranks import run_ranks
from tiny_inputs import Tiny

from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.parallel.env import Rank

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LEGS = [(4, 1, 2), (2, 3, 4), (1, 2, 6), (4, 0, 8)]
"""Ranks, ZeRO stage, and the step that it goes to."""


def train_leg(rank: Rank, words: list[str], scratch: str) -> dict[str, list]:
    """Train; what was loaded is saved again into `scratch`. By step: (position, key) of this rank's samples."""
    from saving_ranks import saver_of

    from sora_lite.cli.compose import compose
    from sora_lite.cli.train import train
    from sora_lite.training.objective_dit import DiTObjective
    from sora_lite.training.trainer import Trainer

    seen: dict[str, list] = {}
    loss, resume = DiTObjective.loss, Trainer.resume

    def noting(self, engine, batch):  # type: ignore[no-untyped-def]
        seen.setdefault(str(batch.step), []).extend(zip(batch.positions.tolist(), batch.keys, strict=True))
        return loss(self, engine, batch)

    def resume_and_save(self, lease):  # type: ignore[no-untyped-def]
        resume(self, lease)
        if self.step:
            saver = saver_of(self.engine, self.ema, Path(scratch))
            saver.save(self.step, {})

    DiTObjective.loss, Trainer.resume = noting, resume_and_save
    train(compose("train", words), rank)
    return seen


def settings(tiny: Tiny, folder: Path, steps: int, stage: int) -> list[str]:
    return [
        "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={folder}", "run.name=run",
        f"run.steps={steps}", "run.save_every=2", "run.log_every=1", "run.validate_every=0", "run.keep_last=9",
        f"parallel.zero_stage={stage}", "parallel.threads=1", "data.workers=0", "logging.peak_tflops=1",
        "logging.wandb=disabled",
    ]  # fmt: skip


def merged(ranks: list[dict[str, list]]) -> dict[int, list]:
    """By step: the samples of all ranks in order of position."""
    return {int(step): sorted(tuple(one) for rank in ranks for one in rank[step]) for step in ranks[0]}


def test_world_sizes_and_stages_change_on_the_way(tiny: Tiny, tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    wanted = merged(run_ranks(4, train_leg, tmp_path / "results", settings(tiny, calm, LEGS[-1][2], 1), ""))
    seen: dict[int, list] = {}
    run, before = tmp_path / "moved/run", 0
    for world, stage, steps in LEGS:
        scratch = tmp_path / f"scratch-{steps}"
        words = settings(tiny, tmp_path / "moved", steps, stage)
        seen |= merged(run_ranks(world, train_leg, tmp_path / "results", words, str(scratch)))
        if before:
            name = f"step_{before:08d}"
            saved = {key.partition("|")[2]: value for key, value in dm.contents(run / "checkpoints" / name).items()}
            loaded = {key.partition("|")[2]: value for key, value in dm.contents(scratch / name).items()}
            assert dm.digest(saved) == dm.digest(loaded), f"changed on the way to {world} ranks and stage {stage}"
            assert any(key.endswith("|ema") for key in saved)
        before = steps
    assert seen == wanted
    assert sorted(seen) == list(range(LEGS[-1][2]))
    losses, calm_losses = (
        {line["step"]: line["loss"] for line in read_record(folder / RECORD)} for folder in (run, calm / "run")
    )
    assert losses.keys() == calm_losses.keys()
    assert losses == pytest.approx(calm_losses, abs=1e-4)
    state = json.loads((run / "checkpoints/step_00000008/state.json").read_text())
    assert state["engines"]["dit"]["optimizer_step"] == LEGS[-1][2]
