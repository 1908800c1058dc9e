"""Compiled blocks under the engine: loss and gradients at every ZeRO stage, with and without recomputed blocks."""

import itertools
from pathlib import Path

import pytest
import torch
from dist_ranks import run_ranks
from tiny_inputs import Tiny, call

from sora_lite.config import OptimConfig, ParallelConfig
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.text import tokenize
from sora_lite.parallel.apply import apply_parallel
from sora_lite.parallel.env import Rank
from sora_lite.training.engine import Engine

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BATCH, STEPS = 4, 3
LAYOUTS = [(stage, recompute) for stage in (0, 1, 2, 3) for recompute in (False, True)]


def model() -> VideoDiT:
    torch.manual_seed(0)
    text = {"width": 16, "depth": 1, "heads": 2, "max_bytes": 12}
    dit = VideoDiT(channels=4, width=32, depth=3, heads=2, num_classes=3, text=text)
    for parameter in dit.parameters():  # at the start everything is gated off
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return dit


def train(rank: Rank, layouts: list[tuple[int, bool]]) -> dict[str, dict]:
    """Losses, norms and first gradients (Adam's first moment after a step) by stage, recomputed or not, compiled."""
    found = {}
    for (stage, recompute), compiled in itertools.product(layouts, (False, True)):
        parallel = ParallelConfig(zero_stage=stage, activation_checkpointing=recompute, compile=compiled)
        dit = model()
        apply_parallel(dit, parallel)
        optim = OptimConfig(lr=1e-2, betas=[0.9, 0.95])
        engine = Engine(dit, optim=optim, parallel=parallel, rank=rank, global_batch=BATCH)
        mine = slice(rank.rank * engine.micro_batch, (rank.rank + 1) * engine.micro_batch)
        steps, moments = [], {}
        for step in range(STEPS):
            latent = torch.randn(BATCH, 4, 2, 4, 4, generator=torch.Generator().manual_seed(step))[mine]
            told = Conditions(labels=torch.arange(BATCH)[mine], text=tokenize(["a", "bcd", "", "xyz"][mine], 12))
            loss = (engine(latent, torch.linspace(0.2, 0.8, BATCH)[mine], told) - latent).square().mean()
            engine.backward(loss)
            norm = engine.step(optim.lr)
            steps.append([float(rank.mean(loss.detach())), norm])
            if step == 0:
                moments = {f"{one.name} {one.offset}": one.exp_avg.tolist() for one in engine.fragments()}
        state = {name: tensor.tolist() for name, tensor in engine.full_state().items()}
        found[f"{stage} {recompute} {compiled}"] = {"steps": steps, "moments": moments, "state": state}
        engine.destroy()
    return found


@pytest.mark.timeout(480)
@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_gradients_at_every_stage(world: int, tmp_path: Path) -> None:
    for found in run_ranks(world, train, tmp_path, LAYOUTS, timeout=450):
        for stage, recompute in LAYOUTS:
            eager, compiled = (found[f"{stage} {recompute} {one}"] for one in (False, True))
            for one, other in zip(compiled["steps"], eager["steps"], strict=True):
                assert one == pytest.approx(other, rel=1e-5)
            assert compiled["moments"].keys() == eager["moments"].keys()
            for name, moment in eager["moments"].items():
                one, other = torch.tensor(compiled["moments"][name]), torch.tensor(moment)
                assert other.abs().max() > 0 or "embedding" in name  # of bytes and labels that this batch has not
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            for name, weights in eager["state"].items():
                one, other = torch.tensor(compiled["state"][name]), torch.tensor(weights)
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.timeout(480)
def test_a_compiled_run_goes_on_without_and_back(tiny: Tiny, tmp_path: Path) -> None:
    words = [
        "train", "experiment=tiny", f"vae_from={tiny.vae}", f"data.shards={tiny.shards}", f"run.root={tmp_path}",
        "run.save_every=2", "run.validate_every=0",
    ]  # fmt: skip
    for steps, compiled in ((2, "true"), (4, "false"), (6, "true")):
        assert call(*words, f"run.steps={steps}", f"parallel.compile={compiled}") == 0
    assert call(*words, "run.name=eager", "run.steps=6") == 0
    mine, eager = (
        [line["loss"] for line in read_record(tmp_path / name / RECORD) if "loss" in line]
        for name in ("tiny", "eager")
    )
    assert mine == pytest.approx(eager, rel=1e-4)
