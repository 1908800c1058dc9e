"""What a step holds depends on neither ranks nor workers; and what happens to a batch whose samples are damaged."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_inputs import Plain, Tiny
from torch import Tensor, nn

from sora_lite.cli.compose import compose
from sora_lite.data.batch import ClipBatch
from sora_lite.data.buckets import Row
from sora_lite.data.compiled import open_index
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipLoader
from sora_lite.errors import UserError
from sora_lite.generation.export import load_vae
from sora_lite.generation.pipeline import to_float
from sora_lite.models.conditions import Conditions
from sora_lite.models.text import PAD
from sora_lite.models.vae import CausalVAE
from sora_lite.parallel.env import Rank
from sora_lite.training.objective import HeldOut
from sora_lite.training.objective_dit import DiTObjective
from sora_lite.training.objective_vae import VAEObjective

STEPS, BATCH = 4, 8
SHAPE = (17, 32, 32)
ALONE = Rank(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), backend="none", launcher="none")


def make_loader(
    shards: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    workers: int = 0,
    cache_bytes: int = 0,
    decoder: str = "pyav",
) -> ClipLoader:
    return ClipLoader(
        Index.load(shards, "train"), [Row(shape=SHAPE, keep=1.0, batch=BATCH)],
        seed=5, block_shards=2, flip=True, rank=rank, world_size=world_size, accumulation=accumulation,
        workers=workers, cache_bytes=cache_bytes, pin=False, decoder=decoder,
    )  # fmt: skip


def join(batches: list[ClipBatch]) -> ClipBatch:
    """The parts of one global step as one batch, in order of position."""
    positions = torch.cat([batch.positions for batch in batches])
    order = positions.argsort()
    is_latent = torch.cat([batch.is_latent for batch in batches])
    assert order.equal(torch.arange(len(order))) or not is_latent.any()  # ranks divide a batch by position

    def together(parts: list[Tensor | None]) -> Tensor | None:
        given = [part for part in parts if part is not None]
        return torch.cat(given) if given else None

    video = torch.cat([batch.video for batch in batches])
    return ClipBatch(
        video=video if is_latent.any() else video[order],
        mean=together([batch.mean for batch in batches]),
        logvar=together([batch.logvar for batch in batches]),
        is_latent=is_latent[order],
        keys=list(np.concatenate([batch.keys for batch in batches])[order]),
        captions=list(np.concatenate([batch.captions for batch in batches])[order]),
        labels=torch.cat([batch.labels for batch in batches])[order],
        positions=positions[order],
        step=batches[0].step,
        views=[[view for batch in batches for view in batch.views][place] for place in order.tolist()],
        samples=torch.cat([batch.samples for batch in batches])[order],
        bucket=batches[0].bucket,
        bad=[one for batch in batches for one in batch.bad],
    )


def read(shards: Path, *, start: int = 0, world_size: int = 1, accumulation: int = 1, workers: int = 0) -> list:
    """Global steps `start` to STEPS, from all ranks' loaders: a list of batches (one per rank and pass) each."""
    loaders = [
        make_loader(shards, rank=rank, world_size=world_size, accumulation=accumulation, workers=workers)
        for rank in range(world_size)
    ]
    per_rank = [list(loader.steps(start, STEPS)) for loader in loaders]
    return [[batch for passes in step for batch in passes] for step in zip(*per_rank, strict=True)]


def assert_same(one: ClipBatch, other: ClipBatch) -> None:
    for name in ("keys", "captions", "step", "views", "bucket"):
        assert getattr(one, name) == getattr(other, name)
    assert one.samples.equal(other.samples) and one.positions.equal(other.positions) and one.labels.equal(other.labels)
    assert one.video.equal(other.video) and one.is_latent.equal(other.is_latent)
    for mine, theirs in ((one.mean, other.mean), (one.logvar, other.logvar)):
        assert (mine is None) == (theirs is None) and (mine is None or mine.equal(theirs))


@pytest.fixture(scope="module")
def whole(tiny: Tiny) -> list[ClipBatch]:
    """Each global step as one process without workers reads it."""
    steps = read(tiny.shards)
    assert all(len(batches) == 1 for batches in steps)
    return [batches[0] for batches in steps]


class TestSameSteps:
    @pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (4, 1), (1, 4), (2, 2)])
    def test_for_any_number_of_ranks(
        self, tiny: Tiny, whole: list[ClipBatch], world_size: int, accumulation: int
    ) -> None:
        steps = read(tiny.shards, world_size=world_size, accumulation=accumulation)
        for batches, expected in zip(steps, whole, strict=True):
            assert len(batches) == world_size * accumulation
            assert_same(join(batches), expected)

    @pytest.mark.parametrize(("workers", "world_size"), [(2, 1), (4, 1), (2, 2)])
    def test_for_any_number_of_workers(self, tiny: Tiny, whole: list[ClipBatch], workers: int, world_size: int) -> None:
        for batches, expected in zip(read(tiny.shards, workers=workers, world_size=world_size), whole, strict=True):
            assert_same(join(batches), expected)

    def test_from_any_start(self, tiny: Tiny, whole: list[ClipBatch]) -> None:
        for batches, expected in zip(read(tiny.shards, start=2), whole[2:], strict=True):
            assert_same(join(batches), expected)

    def test_with_clips_kept_in_memory(self, tiny: Tiny, whole: list[ClipBatch]) -> None:
        clip_bytes = 17 * 32 * 32 * 3
        loader = make_loader(tiny.shards, cache_bytes=5 * clip_bytes)
        for _ in range(2):  # the second time some come from memory
            for (batch,), expected in zip(loader.steps(0, STEPS), whole, strict=True):
                assert_same(batch, expected)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_whichever_way_frames_lie_in_memory(self, tiny: Tiny, whole: list[ClipBatch], workers: int) -> None:
        pytest.importorskip("decord")
        loader = make_loader(tiny.shards, workers=workers, cache_bytes=5 * 17 * 32 * 32 * 3, decoder="decord")
        for _ in range(2):
            for (batch,), expected in zip(loader.steps(0, STEPS), whole, strict=True):
                assert batch.video.stride(1) == 1 and expected.video.stride(4) == 1  # else nothing is compared
                assert (batch.video.float() - expected.video.float()).abs().mean() < 2  # decord rounds in its own way
                assert to_float(batch.video).is_contiguous()
                assert batch.views == expected.views and {view.flip for view in batch.views} == {False, True}

    def test_steps_differ_and_show_what_they_say(self, whole: list[ClipBatch]) -> None:
        """Otherwise the comparisons above would say nothing."""
        keys = [key for batch in whole for key in batch.keys]
        assert len(set(keys)) == len(keys) == STEPS * BATCH  # no sample twice within the first pass
        words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        for batch in whole:
            for caption, label in zip(batch.captions, batch.labels.tolist(), strict=True):
                assert words[label] in caption
            assert batch.video.float().flatten(1).std(1).min() > 10
            assert {view.crop for view in batch.views} == {(0, 0, 32, 32)} and len(
                set(batch.views)
            ) == 2  # flipped or not


class TestMixture:
    """Two data sets, clips and stills, in one run."""

    ROWS = (Row(shape=(1, 32, 32), keep=0.5, batch=BATCH), Row(shape=SHAPE, keep=1.0, batch=BATCH))

    def test_weights_and_ratio_hold(self, tiny: Tiny, copy: Path) -> None:
        loader = ClipLoader(
            open_index([tiny.shards, copy], "train"), list(self.ROWS),
            seed=5, block_shards=2, flip=True, rank=0, world_size=1, accumulation=1,
            workers=0, cache_bytes=0, pin=False, weights=[3, 1], image_ratio=0.5,
        )  # fmt: skip
        first = loader.index.set_samples()[0]
        steps = [loader.order.step(step)[0] for step in range(256)]
        assert sum(micro.shape[0] == 1 for micro in steps) == 128
        assert all((micro.samples < first).sum() == 0.75 * BATCH for micro in steps)
        alike, other = loader.order.passes(255)
        assert alike == pytest.approx(3 * other, rel=0.01) and loader.order.set_share(0) == 0.75


@dataclass
class Recorder:
    """Stands for an engine: keeps what the model would have been asked."""

    module: nn.Module
    x: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        assert conditions.labels is not None and conditions.text is not None
        self.x.append(x)
        self.times.append(t)
        self.labels.append(conditions.labels)
        self.text.append(nn.functional.pad(conditions.text, (0, 64 - conditions.text.shape[1]), value=PAD))
        return torch.zeros_like(x)


class TestSameDraws:
    """Times, noise, posterior draws and dropped conditions of a step."""

    @pytest.fixture(scope="class")
    def objective(self, tiny: Tiny) -> DiTObjective:
        overrides = ["experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}"]
        config = compose("train", [*overrides, "diffusion.condition_dropout=0.3"])
        return DiTObjective(config.model, config.diffusion, load_vae(tiny.vae)[0], seed=3, rank=ALONE)

    def ask(self, objective: DiTObjective, batches: list[ClipBatch]) -> tuple[Recorder, float]:
        """What the model is asked in one global step, in order of position, and the step's loss."""
        recorder = Recorder(module=objective.module)
        torch.manual_seed(int(batches[0].positions[-1]))  # the state of torch's own generator must not matter
        losses = [objective.loss(recorder, batch).loss for batch in batches]
        order = torch.cat([batch.positions for batch in batches]).argsort()
        for name in ("x", "times", "labels", "text"):
            setattr(recorder, name, torch.cat(getattr(recorder, name))[order])
        return recorder, float(torch.stack(losses).mean())

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_for_any_number_of_ranks(
        self, tiny: Tiny, whole: list[ClipBatch], objective: DiTObjective, world_size: int
    ) -> None:
        for batches, expected in zip(read(tiny.shards, world_size=world_size), whole, strict=True):
            here, loss = self.ask(objective, batches)
            there, wanted = self.ask(objective, [expected])
            assert here.times.equal(there.times)
            assert here.labels.equal(there.labels) and here.text.equal(there.text)
            # The VAE's sums may be rounded otherwise in a batch of another size; the noise is in x whole.
            assert torch.allclose(here.x, there.x, atol=1e-5, rtol=0)
            assert loss == pytest.approx(wanted, abs=1e-6)

    def test_every_place_has_draws_of_its_own(self, whole: list[ClipBatch], objective: DiTObjective) -> None:
        asked = [self.ask(objective, [batch])[0] for batch in whole]
        times = torch.cat([one.times for one in asked])
        assert len(times.unique()) == len(times) == STEPS * BATCH
        assert ((times > 0) & (times < 1)).all() and times.std() > 0.1
        x = torch.cat([one.x for one in asked]).flatten(1)
        correlations = torch.corrcoef(x) - torch.eye(len(x))
        assert correlations.abs().max() < 0.9
        dropped = torch.cat([one.labels for one in asked]) == 10
        assert 0 < dropped.sum() < len(dropped)


# ---------------------------------------------------------------------------------------------------- damage


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def damage(shards: Path, split: str, chosen: Callable[[str], bool], member: str = "media") -> None:
    """Flip a byte in the middle of a member of each chosen sample."""
    index = Index.load(shards, split)
    for sample in range(len(index)):
        if chosen(index.key(sample)):
            offset, size = getattr(index, f"{member}_offset")[sample], getattr(index, f"{member}_size")[sample]
            flip_byte(index.shard_paths[index.shard[sample]], int(offset + size // 2))


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.shards, tmp_path / "shards"))


class TestDamage:
    @pytest.mark.parametrize("member", ["media", "json"])
    def test_a_flipped_byte_costs_one_sample(self, whole: list[ClipBatch], copy: Path, member: str) -> None:
        place = 3
        victim = whole[1].keys[place]
        damage(copy, "train", lambda key: key == victim, member)
        found = [join(batches) for batches in read(copy)]
        for step, (batch, expected) in enumerate(zip(found, whole, strict=True)):
            assert len(batch.keys) == BATCH
            kept = [i for i in range(BATCH) if (step, i) != (1, place)]
            assert [batch.keys[i] for i in kept] == [expected.keys[i] for i in kept]
            assert batch.video[kept].equal(expected.video[kept])
            assert [(one.key, one.reason) for one in batch.bad if step != 1] == []
        (bad,) = found[1].bad
        assert bad.key == victim and bad.shard.endswith(".tar") and "wrong checksum" in bad.reason
        assert found[1].keys[place] != victim
        for others in ({"workers": 2}, {"world_size": 4}, {"start": 1}):
            again = join(read(copy, **others)[1 - others.get("start", 0)])
            assert_same(again, found[1])
            assert again.bad == found[1].bad

    @pytest.mark.parametrize("workers", [0, 2])
    def test_nothing_but_damage_stops_the_run(self, copy: Path, workers: int) -> None:
        damage(copy, "train", lambda key: True)
        with pytest.raises(UserError, match=r"samples in a row are damaged.*sora-data verify") as caught:
            read(copy, workers=workers)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_missing_shard_is_noticed_at_once(self, copy: Path) -> None:
        gone = Index.load(copy, "train").shard_paths[0]
        gone.unlink()
        with pytest.raises(UserError, match=rf"{gone.name}: named in the manifest but missing; restore it"):
            make_loader(copy)

    def test_a_damaged_held_out_clip_does_not_count(self, copy: Path) -> None:
        def held_out() -> HeldOut:
            index = Index.load(copy, "validation")
            return HeldOut(index, count=4, shape=SHAPE, fps=None, rank=ALONE, batch=4)

        ((batch, weights),) = held_out().batches()
        assert weights.tolist() == [1, 1, 1, 1]
        victim = sorted(Index.load(copy, "validation").keys)[2].decode()
        damage(copy, "validation", lambda key: key == victim)
        ((damaged, weights),) = held_out().batches()
        assert weights.tolist() == [1, 1, 0, 1]
        assert damaged.video[[0, 1, 3]].equal(batch.video[[0, 1, 3]])

    def test_statistics_of_nothing_but_damage_are_refused(self, copy: Path) -> None:
        config = compose("train_vae", ["experiment=tiny_vae", f"data.shards={copy}"])
        objective = VAEObjective(config.vae, config.loss, seed=0, rank=ALONE)
        vae = objective.module
        assert isinstance(vae, CausalVAE)
        damage(copy, "train", lambda key: True)
        clips = HeldOut(Index.load(copy, "train"), count=4, shape=SHAPE, fps=None, rank=ALONE, batch=4)
        with torch.no_grad(), pytest.raises(UserError, match="none of the clips that the statistics"):
            objective.finish(Plain(vae), clips)
        assert vae.latent_std.isfinite().all()
