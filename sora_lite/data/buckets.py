"""Which clip size each sample is used at. Pure NumPy."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from sora_lite.errors import UserError


@dataclass(kw_only=True, slots=True, frozen=True)
class Bucket:
    """One clip size and the samples that are used at it.

    shape: (T, H, W) in frames and pixels.
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
    digest: str = ""

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.batch < 1 or self.samples.ndim != 1 or len(self.samples) == 0:
            raise ValueError(f"bucket {self.shape} with batch {self.batch} and {self.samples.shape} samples")
        if len(self.starts) != len(self.shards) + 1 or self.starts[-1] != len(self.samples):
            raise ValueError(f"bucket {self.shape}: starts {self.starts.shape} do not fit shards {self.shards.shape}")

    @classmethod
    def group(cls, shape: tuple[int, int, int], batch: int, samples: np.ndarray, shard: np.ndarray) -> Self:
        """A bucket of `samples` (ascending), where `shard` is the shard number of every sample of the index."""
        shards, firsts = np.unique(shard[samples], return_index=True)
        return cls(
            shape=shape,
            batch=batch,
            samples=samples.astype(np.int64),
            shards=shards.astype(np.int64),
            starts=np.append(firsts, len(samples)).astype(np.int64),
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
    """A rule: clips of `shape` (T, H, W), the kept fraction of the samples that fit, the global batch."""

    shape: tuple[int, int, int]
    keep: float
    batch: int


def batch_for_tokens(tokens_per_clip: int, budget: int, divisor: int) -> int:
    """The multiple of `divisor` (at least one) whose tokens come nearest to the budget."""
    return max(1, round(budget / (tokens_per_clip * divisor))) * divisor


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
    fps: float | None,
    shard: np.ndarray,
) -> list[Bucket]:
    """Give each sample to one bucket, as `choose` does. shard: shard number of each sample.

    Raises:
        UserError: no sample fits any row, or a row gets no sample.
    """
    chosen = choose(rows, keys=keys, frames=frames, height=height, width=width, own_fps=own_fps, fps=fps)
    refuse_empty(
        rows,
        np.bincount(chosen[chosen >= 0], minlength=len(rows)),
        total=len(frames),
        longest=int(frames_at(frames, own_fps, fps).max(initial=0)),
        fps=fps,
    )
    return [
        Bucket.group(row.shape, row.batch, np.flatnonzero(chosen == number), shard) for number, row in enumerate(rows)
    ]


def choose(
    rows: Sequence[Row],
    *,
    keys: np.ndarray,
    frames: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    own_fps: np.ndarray,
    fps: float | None,
) -> np.ndarray:
    """Number of the row that each sample goes to, -1 for none: int16, one sample at a time, so any part of an index.

    Of the rows whose length a sample has, those nearest to it in aspect ratio come first, then in the order given; the
    first that keeps it (by a hash of its key, so alike in every run) takes it. The rest are left out.
    """
    available = frames_at(frames, own_fps, fps)
    distance = np.stack([np.abs(np.log((height / width) / (row.shape[1] / row.shape[2]))) for row in rows], axis=1)
    preference = np.argsort(np.round(distance, 3), axis=1, kind="stable")  # samples x rows
    chosen = np.full(len(frames), -1, dtype=np.int16)
    for rank in range(len(rows)):
        for number, row in enumerate(rows):
            fits = (chosen < 0) & (preference[:, rank] == number) & (available >= row.shape[0])
            if row.keep < 1:
                kept = [_fraction(bytes(key), number) < row.keep for key in keys[fits]]
                fits[np.flatnonzero(fits)] = kept
            chosen[fits] = number
    return chosen


def refuse_empty(rows: Sequence[Row], counts: np.ndarray, *, total: int, longest: int, fps: float | None) -> None:
    """Raise UserError for a row with a count of 0 out of `total` samples. longest: frames of the longest at `fps`."""
    for number, row in enumerate(rows):
        if counts[number] == 0:
            t, h, w = row.shape
            if longest < t:
                why = f"the longest has {longest} frames at data.fps={fps}"
            else:
                why = "those that are long enough are nearer in shape to another row, or taken by one above"
            raise UserError(
                f"data.buckets[{number}]: none of the {total} samples goes to {t} frames of {h}x{w}; "
                f"{why}; change the row or leave it out"
            )


def rows_from(
    rules: Sequence[tuple[Sequence[int], int, float, int | None]],
    tokens: Callable[[int, int, int], int],
    budget: int,
    divisor: int,
) -> list[Row]:
    """Rows from configured rules (resolution, frames, keep, batch) and the model's token count of a clip (T, H, W)."""
    rows = []
    for (height, width), frames, keep, batch in rules:
        if batch is None:
            batch = batch_for_tokens(tokens(frames, height, width), budget, divisor)
        rows.append(Row(shape=(frames, height, width), keep=keep, batch=batch))
    return rows


def _fraction(key: bytes, row: int) -> float:
    return int.from_bytes(hashlib.blake2b(b"%d:%s" % (row, key), digest_size=8).digest(), "big") / 2**64
