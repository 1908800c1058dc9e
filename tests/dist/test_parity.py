"""Whole training runs of the DiT and the VAE against a loop in plain torch, at every layout that is offered."""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from dist_ranks import run_ranks
from tiny_inputs import Plain, Tiny
from torch import nn

from sora_lite.cli.compose import compose
from sora_lite.cli.train import train
from sora_lite.data.buckets import Row
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipLoader
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation.export import load_vae
from sora_lite.models import linear
from sora_lite.parallel.env import Rank
from sora_lite.training.objective_dit import DiTObjective
from sora_lite.training.objective_vae import VAEObjective
from sora_lite.training.optim import learning_rate

pytestmark = pytest.mark.dist

KINDS = ("train", "train_vae")
STAGES, WORLDS, ACCUMULATIONS = (0, 1, 2, 3), (1, 2), (1, 2)
STEPS, BATCH = 10, 8


def settings(kind: str, tiny: Tiny) -> Any:
    """What is the same at every layout. The learning rate changes from step to step."""
    own = ["experiment=tiny_vae"] if kind == "train_vae" else ["experiment=tiny", f"vae_from={tiny.vae}"]
    return compose(kind, [
        *own, f"data.shards={tiny.shards}", f"run.steps={STEPS}", "run.save_every=100", "run.validate_every=0",
        "optim.warmup_steps=3", "optim.schedule=cosine", "optim.lr=2e-3", "logging.peak_tflops=1",
    ])  # fmt: skip


def train_at_every_layout(rank: Rank, root: str, configs: dict[str, Any]) -> dict[str, list[float]]:
    """The recorded loss of each step, by kind, stage and accumulation: real runs, one after another."""
    linear.LARGE = 1  # the product of large layers at every stage, against torch's
    found = {}
    for kind, stage, accumulation in itertools.product(KINDS, STAGES, ACCUMULATIONS):
        name = f"{kind}-{stage}-{accumulation}"
        config = copy.deepcopy(configs[kind])
        config.run.root, config.run.name = root, name
        config.parallel.zero_stage, config.parallel.accumulation = stage, accumulation
        train(config, rank)
        rank.barrier()
        found[name] = [line["loss"] for line in read_record(Path(root) / name / RECORD) if "loss" in line]
    return found


def train_plainly(kind: str, tiny: Tiny) -> list[float]:
    """Losses of the same training in this process: no ranks, no passes, no engine, only torch."""
    config = settings(kind, tiny)
    alone = Rank(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), backend="none", launcher="none")
    torch.manual_seed(config.run.seed)
    objective: Any
    if kind == "train_vae":
        objective = VAEObjective(config.vae, config.loss, seed=config.run.seed, rank=alone)
    else:
        objective = DiTObjective(
            config.model, config.diffusion, load_vae(tiny.vae)[0], seed=config.run.seed, rank=alone
        )
    loader = ClipLoader(
        Index.load(tiny.shards, "train"), [Row(shape=(17, 32, 32), keep=1.0, batch=BATCH)],
        seed=config.run.seed, block_shards=config.data.block_shards, flip=False,
        rank=0, world_size=1, accumulation=1, workers=0, cache_bytes=0, pin=False,
    )  # fmt: skip
    model = objective.module
    optim = config.optim
    adamw = torch.optim.AdamW(model.parameters(), betas=tuple(optim.betas), eps=optim.eps, weight_decay=0.0)
    losses = []
    for step, (batch,) in enumerate(loader.steps(0, STEPS)):
        loss = objective.loss(Plain(model), batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, optim, STEPS)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[float]]]:
    configs = {kind: settings(kind, tiny) for kind in KINDS}

    def work(world: int) -> dict[str, list[float]]:
        folder = tmp_path_factory.mktemp("parity")
        return run_ranks(world, train_at_every_layout, folder, str(folder / "runs"), configs)[0]

    # Side by side, because one rank leaves a core idle.
    with ThreadPoolExecutor() as pool:
        return dict(zip(WORLDS, pool.map(work, WORLDS), strict=True))


@pytest.fixture(scope="module")
def plain(tiny: Tiny) -> dict[str, list[float]]:
    return {kind: train_plainly(kind, tiny) for kind in KINDS}


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_the_loss_of_one_process(
    trained: dict, plain: dict, kind: str, world: int, stage: int, accumulation: int
) -> None:
    losses = trained[world][f"{kind}-{stage}-{accumulation}"]
    assert len(losses) == STEPS
    assert losses == pytest.approx(plain[kind], abs=1e-5)


def test_the_loss_depends_on_the_weights(plain: dict) -> None:
    """Otherwise the comparison would say nothing."""
    assert plain["train_vae"][-1] < 0.8 * plain["train_vae"][0]
    assert all(len(set(losses)) == STEPS for losses in plain.values())
