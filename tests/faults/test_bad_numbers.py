"""A bad number on one rank, in one gradient or in its data: all ranks leave that update out, and nothing changes."""

import itertools
import math
from pathlib import Path

import dist_model as dm
import numpy as np
import pytest
import torch
from dist_ranks import run_ranks
from real_runs import Ranks
from safetensors.numpy import save
from test_faults import STEPS, events, settings
from tiny_inputs import Tiny
from torch import Tensor

from sora_lite.data.index import Index
from sora_lite.data.loader import ClipReader
from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import Sample, ShardWriter, clip_digits
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation.export import load_vae
from sora_lite.models.vae import Posterior
from sora_lite.parallel.env import Rank
from sora_lite.training.ema import EMA

pytestmark = pytest.mark.dist

LAYOUTS = [*itertools.product((0, 1, 2, 3), (1, 2), ("fp32",)), *itertools.product((1, 2, 3), (2,), ("bf16",))]
"""ZeRO stage, accumulation, precision."""


# --------------------------------------------------------------------------------------------- one gradient alone


def spoil_gradients(rank: Rank, layouts: list, offload: str = "none") -> list[list]:
    """One element of one gradient of the last rank, in the last pass of a step; the loss is finite everywhere."""
    found = []
    for stage, accumulation, precision in layouts:
        engine = dm.make_engine(rank, stage, accumulation, precision, offload)
        ema = EMA(engine, dm.OPTIM.ema_decay)
        dm.train_step(engine, 0, ema)
        for name, bad in itertools.product(("embedding.weight", "blocks.1.scale"), (math.nan, math.inf, -math.inf)):
            before = state(engine, ema)
            passes = 0

            def spoil(gradient: Tensor, bad: float = bad, last: int = accumulation) -> Tensor:
                nonlocal passes
                passes += 1
                gradient = gradient.clone()
                if passes == last:
                    gradient.view(-1)[3] = bad
                return gradient

            hook = engine.module.get_parameter(name).register_hook(spoil) if rank.rank == rank.world_size - 1 else None
            loss, norm = dm.train_step(engine, 1)
            if hook:
                hook.remove()
                assert passes == accumulation, "the fault was not planted"
            what = f"{bad} in {name} at stage {stage}, accumulation {accumulation}, {precision}"
            assert math.isfinite(loss)
            assert not any(math.isfinite(one) for one in rank.gather(norm)), what
            assert state(engine, ema) == before, f"{what} reached the state"
        losses = [dm.train_step(engine, step, ema)[0] for step in range(1, dm.STEPS)]
        found.append([precision, losses, engine.step_count])
        engine.destroy()
    return found


def state(engine: dm.Engine, ema: EMA) -> list:
    """Every bit that this rank holds: masters, moments, average, step, and the module's own weights."""
    held = {}
    fragments = engine.fragments()
    for fragment, average in zip(fragments, ema.pieces(fragments), strict=True):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            held[f"{fragment.name} {kind}"] = getattr(fragment, kind)
        held[f"{fragment.name} ema"] = average
    with torch.no_grad():
        held["prediction"] = engine(dm.batch(0)[0])
    return [dm.digest(held), dm.digest(engine.full_state()), engine.step_count]


def test_a_bad_number_in_one_gradient(tmp_path: Path) -> None:
    check_spoilt(run_ranks(2, spoil_gradients, tmp_path, LAYOUTS)[0])


def check_spoilt(found: list[list]) -> None:
    plain, _, _ = dm.train_plainly()
    for precision, losses, steps in found:
        error = 1e-5 if precision == "fp32" else 0.1
        assert losses == pytest.approx(plain[1:], abs=error), "training goes on as if nothing had been"
        assert steps == dm.STEPS


# ------------------------------------------------------------------------------------------------ in a real run

GRADIENT_STEP, VAE_STEP = 2, 5


def spoil_run(rank: int) -> None:
    """A bad number in one gradient of rank 1 at one step, and in what the VAE makes of a clip on rank 0 at another."""
    from sora_lite.training.objective_dit import DiTObjective

    loss = DiTObjective.loss

    def spoiled(self, engine, batch):  # type: ignore[no-untyped-def]
        if rank == 1 and batch.step == GRADIENT_STEP:
            parameter = engine.module.get_parameter(next(reversed(engine.shapes)))
            hooks.append(parameter.register_hook(lambda gradient: gradient.clone().index_fill_(0, zero, math.nan)))
        while hooks and batch.step != GRADIENT_STEP:
            hooks.pop().remove()
        encode = self.vae.encode
        if rank == 0 and batch.step == VAE_STEP:
            self.vae.encode = lambda video: bad_posterior(encode(video))
        try:
            return loss(self, engine, batch)
        finally:
            self.vae.encode = encode

    hooks: list = []
    zero = torch.tensor([0])
    DiTObjective.loss = spoiled  # type: ignore[method-assign]


def bad_posterior(posterior: Posterior) -> Posterior:
    mean = posterior.mean.clone()
    mean[-1, 0, 0, 0, 0] = math.inf
    return Posterior(mean=mean, logvar=posterior.logvar)


def write_bad_latent(tiny: Tiny, folder: Path) -> str:
    """Latents of one clip, well-formed in all but one number; the others are decoded. The clip's key."""
    index, (vae, contract) = Index.load(tiny.shards, "train"), load_vae(tiny.vae)
    mean = np.zeros(vae.latent_shape(17, 32, 32), np.float32)
    mean[0, 1, 2, 3] = np.nan
    clip = Sample(
        key=index.key(0),
        ext="latent.safetensors",
        media=save({"mean": mean, "logvar": np.zeros_like(mean)}),
        meta=ClipReader(index, cache_bytes=0).meta(0),
        made_of=clip_digits(int(index.crc32c[0])),
    )
    folder.mkdir()
    with ShardWriter(folder / "train-000000.tar", "train") as writer:
        writer.add(clip)
    clips = Manifest.load(tiny.shards)
    encoding = {"fingerprint": contract.vae_fingerprint}
    Manifest(config_hash=clips.config_hash, content="latents", encoding=encoding, shards=[writer.entry]).save(folder)
    return clip.key


LONG = [pytest.param(*one, marks=pytest.mark.slow) for one in ((0, 1), (1, 2), (2, 2), (3, 1))]


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 2), (1, 1), (2, 1), (3, 2), *LONG])
def test_all_ranks_leave_the_same_update_out(tmp_path: Path, tiny: Tiny, stage: int, accumulation: int) -> None:
    victim = write_bad_latent(tiny, tmp_path / "latents")
    layout = [f"parallel.zero_stage={stage}", f"parallel.accumulation={accumulation}"]
    words = [f"data.latents={tmp_path / 'latents'}", "run.save_every=1", f"run.keep_last={STEPS}"]
    ranks = Ranks(tmp_path / "ranks", 2, settings(tiny, tmp_path, *layout, *words), spoil_run)
    assert ranks.end() == [0, 0], ranks.log
    found = {event["step"]: event for event in events(tmp_path)}
    assert "the gradient norm is" in found[GRADIENT_STEP]["left_out"]
    assert bad_ranks(found[GRADIENT_STEP]) == [] and bad_ranks(found[VAE_STEP]) == [0]
    from_data = found.keys() - {GRADIENT_STEP, VAE_STEP}
    assert 2 <= len(from_data) <= 3, "the clip comes once in a pass of five steps"
    for step in from_data:
        assert bad_ranks(found[step]) == [
            n for n, one in enumerate(found[step]["ranks"]) if any(victim in keys for keys in one["keys"])
        ]
    for event in found.values():
        assert [[len(keys) for keys in one["keys"]] for one in event["ranks"]] == 2 * [
            accumulation * [4 // accumulation]
        ]
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("step_*"))
    states = [dm.digest(dm.contents(path)) for path in checkpoints]
    assert len(states) == STEPS
    same = {step for step in range(1, STEPS) if states[step] == states[step - 1]}
    assert same == found.keys() - {0}, "left out on all ranks, and made in all other steps"
    assert all(math.isfinite(line["loss"]) for line in read_record(tmp_path / "run" / RECORD) if "loss" in line)


def bad_ranks(event: dict) -> list[int]:
    """Whose losses are not finite, which JSON has no number for."""
    return [n for n, one in enumerate(event["ranks"]) if None in one["losses"]]
