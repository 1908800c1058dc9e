"""Which clip size each sample is used at. Pure NumPy."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sora_lite.errors import UserError


@dataclass(kw_only=True, slots=True, frozen=True)
class Bucket:
    """One clip size and the samples that are used at it.

    shape: (T, H, W) in frames and pixels.
    batch: samples in a global micro-step, over all ranks and accumulation passes.
    samples: int64 indices into the index, ascending.
    """

    shape: tuple[int, int, int]
    batch: int
    samples: np.ndarray

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.batch < 1 or self.samples.ndim != 1 or len(self.samples) == 0:
            raise ValueError(f"bucket {self.shape} with batch {self.batch} and {self.samples.shape} samples")


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
) -> list[Bucket]:
    """Give each sample to one bucket.

    Of the rows whose length a sample has, those nearest to it in aspect ratio come first, then in the order given; the
    first that keeps it (by a hash of its key, so alike in every run) takes it. The rest are left out.

    Raises:
        UserError: no sample fits any row, or a row gets no sample.
    """
    available = frames_at(frames, own_fps, fps)
    distance = np.stack([np.abs(np.log((height / width) / (row.shape[1] / row.shape[2]))) for row in rows], axis=1)
    preference = np.argsort(np.round(distance, 3), axis=1, kind="stable")  # samples x rows
    chosen = np.full(len(frames), -1)
    for rank in range(len(rows)):
        for number, row in enumerate(rows):
            fits = (chosen < 0) & (preference[:, rank] == number) & (available >= row.shape[0])
            if row.keep < 1:
                kept = [_fraction(str(keys[i]), number) < row.keep for i in np.flatnonzero(fits)]
                fits[np.flatnonzero(fits)] = kept
            chosen[fits] = number
    buckets = []
    for number, row in enumerate(rows):
        samples = np.flatnonzero(chosen == number)
        if len(samples) == 0:
            t, h, w = row.shape
            longest = int(available.max(initial=0))
            if longest < t:
                why = f"the longest has {longest} frames at data.fps={fps}"
            else:
                why = "those that are long enough are nearer in shape to another row, or taken by one above"
            raise UserError(
                f"data.buckets[{number}]: none of the {len(frames)} samples goes to {t} frames of {h}x{w}; "
                f"{why}; change the row or leave it out"
            )
        buckets.append(Bucket(shape=row.shape, batch=row.batch, samples=samples))
    return buckets


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


def _fraction(key: str, row: int) -> float:
    return int.from_bytes(hashlib.blake2b(f"{row}:{key}".encode(), digest_size=8).digest(), "big") / 2**64
