import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_lite.data.buckets import Bucket, Budget, Row, assign, frames_at, nearest_batch, rows_from, spare_frames
from sora_lite.data.order import CYCLE, MicroStep, Order, apportion, hash_seed, rank_positions
from sora_lite.errors import UserError


def make(sizes: list[int], batch: int = 8, seed: int = 0, block: int = 2, per_shard: int = 10) -> Order:
    starts = np.cumsum([0, *sizes])
    shard = np.arange(starts[-1]) // per_shard
    buckets = [
        Bucket.group((4 * i + 1, 16, 16), batch, np.arange(starts[i], starts[i + 1]), shard) for i in range(len(sizes))
    ]
    return Order(buckets, seed=seed, block_shards=block)


def samples(order: Order, start: int, stop: int) -> list[int]:
    return [int(s) for step in range(start, stop) for micro in order.step(step) for s in micro.samples]


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 90), batch=st.sampled_from([1, 4, 8, 24]), seed=st.integers(0, 9), start=st.integers(0, 40))
def test_each_sample_once_a_pass_and_any_step_on_its_own(count: int, batch: int, seed: int, start: int) -> None:
    order = make([count], batch, seed)
    passes = 3
    steps = -(-passes * count // batch)
    sequence = samples(order, 0, steps)
    for one in range(passes):
        assert sorted(sequence[one * count : (one + 1) * count]) == list(range(count))
    # a fresh object asked for a later step alone says the same: resuming needs no history
    assert samples(make([count], batch, seed), start, start + 3) == samples(order, start, start + 3)


def test_passes_and_seeds_differ() -> None:
    assert samples(make([64]), 0, 8) != samples(make([64]), 8, 16)
    assert samples(make([64]), 0, 8) != samples(make([64], seed=1), 0, 8)


def test_blocks_keep_shards_together() -> None:
    sequence = samples(make([400], block=2, per_shard=20), 0, 50)
    for place in range(0, 400, 40):
        assert len({s // 20 for s in sequence[place : place + 40]}) == 2
    assert sequence[:40] != sorted(sequence[:40])


def test_buckets_come_in_proportion_and_one_per_step() -> None:
    order = make([160, 80, 3])
    steps = CYCLE * 5
    micro_steps = [order.step(step) for step in range(steps)]
    assert all(len(one) == 1 for one in micro_steps)
    counts = Counter(one[0].bucket for one in micro_steps)
    assert all(abs(counts[number] - steps * size / 243) < 1 for number, size in enumerate((160, 80, 3)))
    assert all(one[0].shape == (4 * one[0].bucket + 1, 16, 16) and len(one[0].samples) == 8 for one in micro_steps)
    for number, bucket in enumerate(order.buckets):
        seen = Counter(int(s) for one in micro_steps if one[0].bucket == number for s in one[0].samples)
        assert set(seen) == set(bucket.samples.tolist())
        assert max(seen.values()) - min(seen.values()) <= 1


@given(
    shares=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 10**12)), min_size=1, max_size=9).filter(any),
    totals=st.lists(st.integers(0, 10**7), min_size=1, max_size=5),
    run=st.integers(0, 10**6),
)
def test_turns_go_out_by_shares_and_never_come_back(shares: list[int], totals: list[int], run: int) -> None:
    parties, whole = sum(share > 0 for share in shares), sum(shares)
    before = [0] * len(shares)
    for total in sorted({*totals, *range(run, run + 20)}):
        counts = apportion(total, shares)
        assert sum(counts) == total and all(one >= two for one, two in zip(counts, before, strict=True))
        for count, share in zip(counts, shares, strict=True):
            limit = Fraction(1, 2) + Fraction(share * (parties - 2), 2 * whole) if parties > 1 and share else 0
            assert abs(count - Fraction(share * total, whole)) <= limit
        before = counts


@dataclass
class Mixture:
    """A random index in buckets, and how it is mixed."""

    shapes: list[tuple[int, int, int]]
    batches: list[int]
    shard: np.ndarray
    bucket: np.ndarray
    set_shards: list[int]
    settings: dict[str, Any]

    def order(self) -> Order:
        buckets = [
            Bucket.group(shape, batch, np.flatnonzero(self.bucket == number), self.shard)
            for number, (shape, batch) in enumerate(zip(self.shapes, self.batches, strict=True))
        ]
        return Order(buckets, set_shards=self.set_shards, **self.settings)

    def set_of(self, samples: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.cumsum(self.set_shards), self.shard[samples], side="right")


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    sets = draw(st.integers(1, 4))
    set_shards = draw(st.lists(st.integers(1, 6), min_size=sets, max_size=sets))
    sizes = draw(st.lists(st.integers(1, 9), min_size=sum(set_shards), max_size=sum(set_shards)))
    shard = np.repeat(np.arange(len(sizes)), sizes)
    buckets = draw(st.integers(1, min(4, len(shard))))
    bucket = np.array(draw(st.lists(st.integers(0, buckets - 1), min_size=len(shard), max_size=len(shard))))
    bucket[draw(st.permutations(range(len(shard))))[:buckets]] = np.arange(buckets)  # none is empty
    weight = st.one_of(st.integers(1, 5), st.floats(0.01, 100))
    settings = {
        "seed": draw(st.integers(0, 99)),
        "block_shards": draw(st.integers(1, 4)),
        "weights": draw(st.none() | st.lists(weight, min_size=sets, max_size=sets)),
        "image_ratio": draw(st.none() | st.floats(0.01, 0.99)) if buckets > 1 else None,
    }
    shapes = [(4 * number + 1, 16, 16) for number in range(buckets)]
    batches = draw(st.lists(st.sampled_from([1, 2, 8, 12]), min_size=buckets, max_size=buckets))
    return Mixture(shapes, batches, shard, bucket, set_shards, settings)


@settings(deadline=None, max_examples=60)
@given(mixture=mixtures(), stop=st.integers(1, 90), data=st.data())
def test_any_mixture_resumes_exactly_and_ranks_share_it_out(mixture: Mixture, stop: int, data: st.DataObject) -> None:
    order = mixture.order()
    whole = [order.step(step)[0] for step in range(stop)]
    middle = data.draw(st.integers(0, stop - 1))
    resumed = mixture.order()
    assert resumed.fingerprint() == order.fingerprint()
    for step in range(middle, stop):
        (micro,) = resumed.step(step)
        assert micro.samples.tolist() == whole[step].samples.tolist()
        assert (micro.bucket, micro.shape) == (whole[step].bucket, mixture.shapes[micro.bucket])
        batch = mixture.batches[micro.bucket]
        assert len(micro.samples) == batch and (mixture.bucket[micro.samples] == micro.bucket).all()
        parts = data.draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]))
        world = data.draw(st.sampled_from([n for n in range(1, parts + 1) if parts % n == 0]))
        places = [
            rank_positions(batch, rank=rank, world_size=world, accumulation=parts // world) for rank in range(world)
        ]
        union = np.concatenate([micro.samples[place] for rank in places for place in rank])
        assert sorted(union.tolist()) == sorted(whole[step].samples.tolist())
    # Each sample of a data set in a bucket comes again only when all the others have come as often.
    for number in range(len(mixture.shapes)):
        seen = Counter(int(s) for micro in whole if micro.bucket == number for s in micro.samples)
        members = order.buckets[number].samples
        for data_set in range(len(mixture.set_shards)):
            counts = [seen[int(s)] for s in members[mixture.set_of(members) == data_set]]
            assert not counts or max(counts) - min(counts) <= 1
    # Passes are counted per data set.
    taken = np.bincount(mixture.set_of(np.concatenate([micro.samples for micro in whole])), minlength=99)
    sizes = np.bincount(mixture.set_of(np.arange(len(mixture.shard))))
    assert order.passes(stop - 1) == pytest.approx((taken[: len(sizes)] / sizes).tolist())


def two_sets(weights: list[float] | None, image_ratio: float | None = None) -> tuple[Mixture, list[MicroStep]]:
    """900 and 100 samples in 50 + 10 shards, a third of each in the stills' bucket; and three cycles of steps."""
    shard = np.concatenate([np.arange(900) // 18, 50 + np.arange(100) // 10])
    mixture = Mixture(
        shapes=[(17, 16, 16), (1, 16, 16)], batches=[8, 24], shard=shard, bucket=(np.arange(1000) % 3 == 2).astype(int),
        set_shards=[50, 10], settings={"seed": 3, "block_shards": 4, "weights": weights, "image_ratio": image_ratio},
    )  # fmt: skip
    order = mixture.order()
    return mixture, [order.step(step)[0] for step in range(3 * CYCLE)]


@pytest.mark.parametrize(("weights", "share"), [(None, 0.9), ([3, 1], 0.75), ([0.1, 0.3], 0.25)])
def test_data_sets_come_by_weight_in_every_batch(weights: list[float] | None, share: float) -> None:
    mixture, steps = two_sets(weights)
    taken: Counter = Counter()
    for micro in steps:
        firsts = int((mixture.set_of(micro.samples) == 0).sum())
        taken[micro.bucket, 0] += firsts
        taken[micro.bucket, 1] += len(micro.samples) - firsts
    order = mixture.order()
    exact = Counter()
    for number, bucket in enumerate(order.buckets):  # within a bucket, a data set's samples come equally often
        first = (mixture.set_of(bucket.samples) == 0).sum() * share / 900
        second = (mixture.set_of(bucket.samples) == 1).sum() * (1 - share) / 100
        exact[number] = first / (first + second)
        assert abs(taken[number, 0] - exact[number] * (taken[number, 0] + taken[number, 1])) < 1
    assert order.set_share(0) == pytest.approx(share) and order.set_share(1) == pytest.approx(1 - share)
    # In a batch the data sets stand mixed, not one after the other.
    assert any(np.diff(mixture.set_of(micro.samples)).min() < 0 for micro in steps)


def test_stills_come_by_their_ratio() -> None:
    for ratio in (0.2, 0.5):
        _, steps = two_sets([1, 1], ratio)
        stills = sum(len(micro.samples) for micro in steps if micro.shape[0] == 1)
        total = sum(len(micro.samples) for micro in steps)
        assert stills / total == pytest.approx(ratio, abs=24 / total)
    with pytest.raises(UserError, match=r"data\.image_ratio: 0\.5 needs rows"):
        Order(make([64]).buckets, seed=0, block_shards=2, image_ratio=0.5)


def test_a_data_set_without_samples_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.sets\[1\]: none of its samples"):
        Order(make([64]).buckets, seed=0, block_shards=2, set_shards=[7, 3])


def test_a_late_step_costs_neither_time_nor_memory() -> None:
    """No permutation of all samples is made: what a look-up allocates is a block, and the shards' numbers."""
    count = 2_000_000
    bucket = Bucket.group((1, 16, 16), 8, np.arange(count), np.arange(count) // 1000)
    for step in (0, 10**6, 10**12):
        order = Order([bucket], seed=0, block_shards=8)
        tracemalloc.start()
        order.step(step)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 500_000 < count  # bytes; numbers of all samples take 16 million


def test_how_far_a_pass_is_from_a_full_shuffle() -> None:
    """As the module's doc string states it."""
    shards, per_shard, block = 200, 50, 8
    order = make([shards * per_shard], batch=per_shard, block=block, per_shard=per_shard)
    places = np.empty(shards * per_shard)
    places[samples(order, 0, shards)] = np.arange(shards * per_shard)
    by_shard = places.reshape(shards, per_shard)
    # A place says nothing about the shard: correlations of 200 shuffled shards are below 0.2.
    assert abs(np.corrcoef(by_shard.mean(axis=1), np.arange(shards))[0, 1]) < 0.2
    distance = np.abs(by_shard[:, :, None] - by_shard[:, None, :]).sum() / (shards * per_shard * (per_shard - 1))
    assert distance / (shards * per_shard / 3) == pytest.approx(block / shards, rel=0.03)
    # Within a block the shuffle is full.
    inside = by_shard % (block * per_shard)
    assert abs(np.corrcoef(inside.ravel(), np.tile(np.arange(per_shard), shards))[0, 1]) < 0.04


@given(batch=st.integers(1, 96), world=st.integers(1, 8), accumulation=st.integers(1, 4))
def test_ranks_split_a_batch_without_rest(batch: int, world: int, accumulation: int) -> None:
    arguments = {"world_size": world, "accumulation": accumulation}
    if batch % (world * accumulation):
        with pytest.raises(UserError, match="do not divide"):
            rank_positions(batch, rank=0, **arguments)
        return
    parts = [part for rank in range(world) for part in rank_positions(batch, rank=rank, **arguments)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(np.concatenate(parts).tolist()) == list(range(batch))


def test_fingerprint_and_replacement() -> None:
    prints = {make([64]).fingerprint(), make([64], seed=1).fingerprint(), make([63]).fingerprint()}
    assert len(prints | {make([64], batch=16).fingerprint(), make([64], block=1).fingerprint()}) == 5
    assert make([64]).fingerprint() in prints
    order = make([64, 64])
    stand_ins = [order.replacement(1, 70, 5, position, attempt) for position in range(8) for attempt in range(4)]
    assert all(64 <= one < 128 for one in stand_ins) and len(set(stand_ins)) > 16
    assert stand_ins[3] == make([64, 64]).replacement(1, 70, 5, 0, 3)
    mixed = Order(order.buckets, seed=0, block_shards=2, set_shards=[9, 4])  # shard 9 begins within the second bucket
    for sample, low, high in ((3, 0, 64), (70, 64, 90), (100, 90, 128)):  # from its own data set, where it has any
        found = {mixed.replacement(int(sample >= 64), sample, 5, 0, attempt) for attempt in range(200)}
        assert min(found) == low and max(found) == high - 1


def test_seeds_are_fixed_for_ever() -> None:
    """Stored runs resume by these numbers: a change of the hash would change every run."""
    assert hash_seed(0, 7, 3, "noise") == hash_seed(0, 7, 3, "noise") != hash_seed(0, 7, 3, "time")
    assert hash_seed("a", 1) == 6431086039603022688
    assert len({hash_seed(0, step, place, "x") for step in range(100) for place in range(100)}) == 10_000


def test_assignment_by_aspect_then_length_then_keep() -> None:
    frames, own_fps = np.array([40, 40, 10, 40, 2]), np.full(5, 8.0)
    height, width = np.array([90, 160, 90, 90, 90]), np.array([160, 90, 160, 160, 160])
    rows = [
        Row(shape=(17, 18, 32), keep=1.0, batch=8),
        Row(shape=(17, 32, 18), keep=1.0, batch=8),
        Row(shape=(5, 18, 32), keep=1.0, batch=8),
    ]
    columns = {"frames": frames, "height": height, "width": width, "own_fps": own_fps}
    columns["shard"] = np.array([0, 0, 1, 1, 2])
    keys = np.array(list("abcde"), dtype="S")
    buckets = assign(rows, keys=keys, **columns)
    assert [bucket.samples.tolist() for bucket in buckets] == [[0, 3], [1], [2]]  # the last is too short for any
    with pytest.raises(UserError, match=r"data\.buckets\[0\].*the longest has 40"):
        assign([Row(shape=(41, 18, 32), keep=1.0, batch=8)], keys=keys, **columns)
    many = np.array([f"key{i}" for i in range(4000)], dtype="S")
    size = {
        "frames": np.full(4000, 20),
        "height": np.full(4000, 32),
        "width": np.full(4000, 32),
        "own_fps": np.full(4000, 8.0),
        "shard": np.arange(4000) // 100,
    }
    first, second = assign(
        [Row(shape=(17, 32, 32), keep=0.25, batch=8), Row(shape=(1, 32, 32), keep=0.5, batch=8)],
        keys=many,
        **size,
    )
    assert len(first.samples) == pytest.approx(1000, abs=100) and len(second.samples) == pytest.approx(1500, abs=120)
    assert not set(first.samples) & set(second.samples)


def test_batch_from_tokens() -> None:
    assert nearest_batch(100, 3200, 8) == 32
    assert [nearest_batch(100, budget, 8) for budget in (1900, 2100)] == [16, 24]
    assert [nearest_batch(100, budget, 8) for budget in (410, 399)] == [8, 0]
    rows = rows_from([rule(5), rule(1, batch=24)], budget_of(12_800))
    assert [row.batch for row in rows] == [8, 24]
    assert frames_at(np.array([17, 30]), np.array([8.0, 29.97]), 4.0).tolist() == [9, 5]


def rule(frames: int, batch: int = 0, **more: Any) -> Row:
    return Row(shape=(frames, 16, 16), keep=1.0, batch=batch, **more)


def budget_of(tokens: int, cost: Callable[[int, int, int], float] | None = None) -> Budget:
    def count(t: int, h: int, w: int) -> int:
        return t * h * w

    return Budget(cost=cost or count, tokens=count, batch_tokens=tokens, divisor=8)


def test_batch_from_costs() -> None:
    """A clip of twice the frames costs thrice as much: 48 of 5 frames make the budget."""
    rules = [rule(5), rule(10), rule(20), rule(1)]
    rows = rows_from(rules, budget_of(5 * 256 * 48, lambda t, h, w: t ** np.log2(3)))
    assert [row.batch for row in rows] == [48, 16, 8, 616]
    assert 48 * 5 ** np.log2(3) / 616 == pytest.approx(1, abs=0.01)


def test_a_row_that_the_budget_leaves_empty_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.buckets\[1\]: .*29 frames of 16x16.*its batch would be 0") as caught:
        rows_from([rule(5), rule(29)], budget_of(29 * 256 * 8 // 2 - 256))
    enough = int(re.search(r"data\.batch_tokens=(\d+)", str(caught.value))[1])
    assert [row.batch for row in rows_from([rule(5), rule(29)], budget_of(enough))] == [48, 8]
    assert rows_from([rule(5), rule(29, batch=8)], budget_of(20_000))[1].batch == 8


def test_rows_have_rates_of_their_own_and_do_not_enlarge() -> None:
    columns: dict[str, Any] = {"frames": np.array([48, 48, 24]), "own_fps": np.full(3, 24.0)}
    columns |= {"shard": np.zeros(3, dtype=np.int32), "keys": np.array([b"a", b"b", b"c"])}
    sizes = {"height": np.array([64, 32, 64]), "width": np.array([64, 32, 64])}
    big, fast, slow = (
        Row(shape=(frames, side, side), keep=1.0, batch=8, fps=fps)
        for frames, side, fps in ((16, 64, 8.0), (33, 32, None), (8, 32, 8.0))
    )
    found = assign([big, fast, slow], **columns, **sizes)
    assert [bucket.samples.tolist() for bucket in found] == [[0], [1], [2]]
    assert [bucket.fps for bucket in found] == [8.0, None, 8.0]
    with pytest.raises(UserError, match=r"data\.buckets\[0\]: .*the longest has 32 frames at 16\.0 fps"):
        assign([replace(big, shape=(33, 64, 64), fps=16.0)], **columns, **sizes)


@given(
    frames=st.integers(1, 200),
    own=st.sampled_from([8.0, 24.0, 25.0, 29.97, 30.0]),
    fps=st.sampled_from([None, 4.0, 8.0, 15.0, 16.0, 24.0]),
    wanted=st.integers(1, 40),
)
def test_spare_frames_leave_just_enough(frames: int, own: float, fps: float | None, wanted: int) -> None:
    def enough(count: int) -> bool:
        return int(frames_at(np.array([count]), np.array([own]), fps)[0]) >= wanted

    used = frames - spare_frames(frames, own, fps, wanted)
    if used > 2:  # a clip of one frame counts as a still image
        assert enough(used) or used == frames
        assert not enough(used - 1) or not enough(frames)
