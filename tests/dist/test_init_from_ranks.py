"""Runs on two ranks that start from other weights, at ZeRO 3: a DiT, a VAE, and a model that diffusers has saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dist_ranks import run_ranks
from safetensors.torch import load_file
from text_folders import save_t5
from tiny_inputs import Tiny, call
from tiny_models import WAN, make_dit, tiny_wan
from torch import Tensor

from sora_lite.cli.compose import compose
from sora_lite.cli.export import export
from sora_lite.cli.train import train
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.parallel.env import Rank

pytestmark = pytest.mark.dist
pytest.importorskip("diffusers")

STAGES = (3, 0)


def settings(job: str, stage: int, tiny: Tiny, folder: Path) -> tuple[Any, Path]:
    """One step at a learning rate that changes nothing, and the export that it starts from."""
    common = [
        f"data.shards={tiny.shards}", f"run.root={folder}", f"run.name={job}-{stage}", "run.steps=1",
        "run.validate_every=0", "optim.lr=1e-12", "optim.warmup_steps=0", f"parallel=zero{stage}",
        "logging.peak_tflops=1",
    ]  # fmt: skip
    if job == "vae":
        return compose("train_vae", ["experiment=tiny_vae", f"init_from={tiny.vae}", *common]), tiny.vae
    own = ["experiment=tiny", f"vae_from={tiny.vae}"]
    if job == "dit":
        return compose("train", [*own, f"init_from={folder / 'dit'}", *common]), folder / "dit"
    # Labels are new, and add nothing at first.
    wan = [*WAN, f"init_from={folder / 'wan'}", f"text_from={folder / 'umt5'}", "model.num_classes=10"]
    return compose("train", [*own, *wan, *common]), folder / "wan"


def train_in_turn(rank: Rank, configs: list[Any]) -> None:
    for config in configs:
        train(config, rank)
        rank.barrier()


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_dit(folder / "dit", tiny, seed=0)
    save_t5(folder / "umt5", umt5=True)
    tiny_wan(text=16).save_pretrained(folder / "theirs")
    assert call("import", f"weights_from={folder / 'theirs'}", f"out={folder / 'wan'}") == 0
    configs = [settings(job, stage, tiny, folder)[0] for job in ("dit", "vae", "wan") for stage in STAGES]
    run_ranks(2, train_in_turn, folder / "ranks", configs)
    return folder


def new(run: Path) -> dict[str, str]:
    """Weights that are not as in the source, and why."""
    rows = json.loads((run / "init_from.json").read_text())
    return {row["name"]: row["why"] for row in rows if row["fate"] not in ("taken", "differs")}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("job", ["dit", "vae", "wan"])
def test_every_rank_starts_from_the_given_weights(job: str, stage: int, tiny: Tiny, runs: Path) -> None:
    run = runs / f"{job}-{stage}"
    ours, theirs = weights(export(run, run / "export", "raw")), weights(settings(job, stage, tiny, runs)[1])
    added = {"embed_label.weight"} if job == "wan" else set()
    assert new(run).keys() == ours.keys() - theirs.keys() == added
    # Measured anew at the end of every training.
    theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("latent_")}
    assert len(theirs) > 20
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-7)
    for name in added:
        assert ours[name].abs().max() < 1e-7
    losses = [read_record(runs / f"{job}-{one}" / RECORD)[0]["loss"] for one in STAGES]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
