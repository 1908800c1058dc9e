from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_lite.data.buckets import Bucket, Row, assign, batch_for_tokens, frames_at, rows_from, spare_frames
from sora_lite.data.order import CYCLE, Order, apportion, hash_seed, rank_positions
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
    stand_ins = [order.replacement(1, 5, position, attempt) for position in range(8) for attempt in range(4)]
    assert all(64 <= one < 128 for one in stand_ins) and len(set(stand_ins)) > 16
    assert stand_ins[3] == make([64, 64]).replacement(1, 5, 0, 3)


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
    columns = {"frames": frames, "height": height, "width": width, "own_fps": own_fps, "fps": None}
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
        fps=None,
        **size,
    )
    assert len(first.samples) == pytest.approx(1000, abs=100) and len(second.samples) == pytest.approx(1500, abs=120)
    assert not set(first.samples) & set(second.samples)


def test_batch_from_tokens() -> None:
    assert batch_for_tokens(100, 3200, 8) == 32
    assert batch_for_tokens(100, 2000, 8) == 16 or batch_for_tokens(100, 2000, 8) == 24
    assert batch_for_tokens(10**6, 100, 8) == 8
    rows = rows_from([((16, 16), 5, 1.0, None), ((16, 16), 1, 1.0, 24)], lambda t, h, w: t * h * w, 12_800, 8)
    assert [row.batch for row in rows] == [8, 24]
    assert frames_at(np.array([17, 30]), np.array([8.0, 29.97]), 4.0).tolist() == [9, 5]


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
