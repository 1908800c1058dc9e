"""Which clip size each sample is used at. Pure NumPy."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from sora_lite.errors import UserError

ENLARGED = 1.25
"""How far a sample may be scaled up before rows that need not do so are preferred."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Bucket:
    """One clip size and the samples that are used at it.

    shape: (T, H, W) in frames and pixels.
    fps: frames per second of its clips; None is each clip's own rate.
    batch: samples in a global micro-step, over all ranks and accumulation passes.
    samples: int64 indices into the index, ascending.
    shards: int64 (R,), the shards that hold some of them, ascending.
    starts: int64 (R + 1,), place in `samples` where each of these shards begins, and the end.
    digest: SHA-256 over the three arrays, where it is known already.
    """

    shape: tuple[int, int, int]
    batch: int
    samples: np.ndarray
    shards: np.ndarray
    starts: np.ndarray
    fps: float | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.batch < 1 or self.samples.ndim != 1 or len(self.samples) == 0:
            raise ValueError(f"bucket {self.shape} with batch {self.batch} and {self.samples.shape} samples")
        if len(self.starts) != len(self.shards) + 1 or self.starts[-1] != len(self.samples):
            raise ValueError(f"bucket {self.shape}: starts {self.starts.shape} do not fit shards {self.shards.shape}")

    @classmethod
    def group(
        cls,
        shape: tuple[int, int, int],
        batch: int,
        samples: np.ndarray,
        shard: np.ndarray,
        fps: float | None = None,
    ) -> Self:
        """A bucket of `samples` (ascending), where `shard` is the shard number of every sample of the index."""
        shards, firsts = np.unique(shard[samples], return_index=True)
        return cls(
            shape=shape,
            batch=batch,
            samples=samples.astype(np.int64),
            shards=shards.astype(np.int64),
            starts=np.append(firsts, len(samples)).astype(np.int64),
            fps=fps,
        )

    def fingerprint(self) -> str:
        """SHA-256 over samples, shards and starts, one after another."""
        if self.digest:
            return self.digest
        digest = hashlib.sha256()
        for column in (self.samples, self.shards, self.starts):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()


@dataclass(kw_only=True, slots=True, frozen=True)
class Row:
    """A rule: clips of `shape` (T, H, W), the kept fraction of the samples that fit, the global batch, the rate.

    fps: frames per second; None is each clip's own rate.
    """

    shape: tuple[int, int, int]
    keep: float
    batch: int
    fps: float | None = None


def nearest_batch(cost: float, budget: float, divisor: int) -> int:
    """The multiple of `divisor` whose cost comes nearest to the budget; 0 if one `divisor` costs over twice as much.

    cost: of one clip, in whatever the budget is counted in.
    """
    return round(budget / (cost * divisor)) * divisor


def frames_at(frames: np.ndarray, own_fps: np.ndarray, fps: float | None) -> np.ndarray:
    """How many frames clips of constant rate give at a target rate: each frame is shown for 1 / own_fps seconds.

    A single frame is a still image, which has no rate.
    """
    if fps is None:
        return frames
    return np.where(frames == 1, 1, np.ceil(frames * (fps / own_fps) - 1e-6)).astype(np.int64)


def spare_frames(frames: int, own_fps: float, fps: float | None, wanted: int) -> int:
    """How many of a clip's own frames can be skipped at its start, with `wanted` frames at the target rate to come."""
    used = wanted if fps is None else int((wanted - 1) * (own_fps / fps) + 1e-6) + 1
    return max(0, frames - used)


def assign(
    rows: Sequence[Row],
    *,
    keys: np.ndarray,
    frames: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    own_fps: np.ndarray,
    shard: np.ndarray,
) -> list[Bucket]:
    """Give each sample to one bucket, as `choose` does. shard: shard number of each sample.

    Raises:
        UserError: no sample fits any row, or a row gets no sample.
    """
    chosen = choose(rows, keys=keys, frames=frames, height=height, width=width, own_fps=own_fps)
    counts = np.bincount(chosen[chosen >= 0], minlength=len(rows))
    refuse_empty(rows, counts, total=len(frames), longest=longest_at(rows, frames, own_fps))
    return [
        Bucket.group(row.shape, row.batch, np.flatnonzero(chosen == number), shard, row.fps)
        for number, row in enumerate(rows)
    ]


def choose(
    rows: Sequence[Row],
    *,
    keys: np.ndarray,
    frames: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    own_fps: np.ndarray,
) -> np.ndarray:
    """Number of the row that each sample goes to, -1 for none: int16, one sample at a time, so any part of an index.

    Of the rows whose length a sample has at their rate, those that enlarge it by at most ENLARGED come first, then
    those nearest to it in aspect ratio, then in the order given; the first that keeps it (by a hash of its key, so
    alike in every run) takes it. The rest are left out.
    """
    available = {row.fps: frames_at(frames, own_fps, row.fps) for row in rows}
    tall, wide = (np.array([row.shape[axis] for row in rows], dtype=np.float64) for axis in (1, 2))
    distance = np.abs(np.log(height / width)[:, None] - np.log(tall / wide))  # samples x rows
    enlarged = np.maximum(tall / height[:, None], wide / width[:, None]) > ENLARGED
    preference = np.argsort(np.round(distance, 3) + 100 * enlarged, axis=1, kind="stable")
    chosen = np.full(len(frames), -1, dtype=np.int16)
    for rank in range(len(rows)):
        for number, row in enumerate(rows):
            fits = (chosen < 0) & (preference[:, rank] == number) & (available[row.fps] >= row.shape[0])
            if row.keep < 1:
                kept = [_fraction(bytes(key), number) < row.keep for key in keys[fits]]
                fits[np.flatnonzero(fits)] = kept
            chosen[fits] = number
    return chosen


def longest_at(rows: Sequence[Row], frames: np.ndarray, own_fps: np.ndarray) -> np.ndarray:
    """Frames of the longest of some samples at the rate of each row."""
    return np.array([frames_at(frames, own_fps, row.fps).max(initial=0) for row in rows])


def refuse_empty(rows: Sequence[Row], counts: np.ndarray, *, total: int, longest: np.ndarray) -> None:
    """Raise UserError for a row with a count of 0 out of `total` samples. longest: as `longest_at`."""
    for number, row in enumerate(rows):
        if counts[number] == 0:
            t, h, w = row.shape
            if longest[number] < t:
                why = f"the longest has {longest[number]} frames at {row.fps or 'its own'} fps"
            else:
                why = "those that are long enough are nearer in shape to another row, or taken by one above"
            raise UserError(
                f"data.buckets[{number}]: none of the {total} samples goes to {t} frames of {h}x{w}; "
                f"{why}; change the row or leave it out"
            )


@dataclass(kw_only=True, slots=True, frozen=True)
class Budget:
    """How many samples a global micro-step has in each row that does not say so itself.

    cost: of one clip (T, H, W), in whatever shall be alike in all rows.
    tokens: of one clip (T, H, W). batch_tokens: of a micro-step of the first row; the other rows cost as much as that.
    divisor: batches are multiples of it.
    """

    cost: Callable[[int, int, int], float]
    tokens: Callable[[int, int, int], int]
    batch_tokens: int
    divisor: int

    def batches(self, shapes: Sequence[tuple[int, int, int]]) -> list[int]:
        """The multiple of `divisor` nearest to the budget for each shape; 0 where a single `divisor` is far above."""
        budget = self.batch_tokens / self.tokens(*shapes[0]) * self.cost(*shapes[0])
        return [nearest_batch(self.cost(*shape), budget, self.divisor) for shape in shapes]


def rows_from(rules: Sequence[Row], budget: Budget) -> list[Row]:
    """Rows with every batch decided, where rules with a batch of 0 leave it to the budget.

    Raises:
        UserError: `divisor` clips of a row cost more than twice the budget, so that no batch is near it.
    """
    rows = []
    for number, (rule, batch) in enumerate(zip(rules, budget.batches([rule.shape for rule in rules]), strict=True)):
        if not rule.batch and not batch:
            t, h, w = rule.shape
            least, of_first = budget.divisor * budget.cost(t, h, w), budget.cost(*rules[0].shape)
            enough = math.ceil(least / of_first * budget.tokens(*rules[0].shape))
            raise UserError(
                f"data.buckets[{number}]: the fewest clips of {t} frames of {h}x{w} that data.divisor={budget.divisor} "
                f"allows cost over twice the budget, so its batch would be 0; set data.batch_tokens={enough}, "
                "lower data.divisor, or give the row a batch"
            )
        rows.append(replace(rule, batch=rule.batch or batch))
    return rows


def _fraction(key: bytes, row: int) -> float:
    return int.from_bytes(hashlib.blake2b(b"%d:%s" % (row, key), digest_size=8).digest(), "big") / 2**64
