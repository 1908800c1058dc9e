"""Which sample is in which global step: a pure function of (buckets, seed, step). Pure NumPy, no I/O.

Within a bucket each data set has an endless sequence: pass after pass over its samples there, each pass block-shuffled
anew. The k-th step of a bucket takes the next places of each of these sequences, as many as the data set's share says,
so that every sample comes once per pass of its data set, no remainder is dropped, and a step may span two passes.
Which bucket a step has follows from the buckets' shares in the same way, shuffled within cycles of steps. Shares are
exact fractions, and how many of the first n went to whom is computed from n alone (`apportion`). Nothing depends on
ranks, workers or history: resuming at a step costs nothing. Where a run's data or shares change at step n, an order of
its own begins there (`first_step`), which depends on n but not on what came before.

A pass is shuffled in two stages: the shards, and then the samples within blocks of `block_shards` shuffled shards. So
reads stay within a few shards at a time, and no permutation over all samples is ever made: a look-up costs a shuffle of
one block's samples and, once per pass, one of the shards' numbers. How far that is from a full shuffle: a sample's
place in a pass says nothing about its shard, but two samples of one shard lie within one block of each other, on
average a third of a block apart where a full shuffle has a third of the pass; their ratio is block_shards / shards.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache

import numpy as np

from sora_lite.data.buckets import Bucket
from sora_lite.errors import UserError

CYCLE = 128
"""Steps within which the buckets' turns are shuffled."""


def hash_seed(*parts: int | str) -> int:
    """63-bit seed from a tuple: every draw in training is seeded by (seed, step, position, purpose) through this."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(kw_only=True, slots=True, frozen=True)
class MicroStep:
    """One batch over all ranks and accumulation passes.

    shape: (T, H, W). samples: int64 indices into the index, one per position. bucket: number of the bucket.
    """

    shape: tuple[int, int, int]
    samples: np.ndarray
    bucket: int


def apportion(total: int, shares: Sequence[int]) -> list[int]:
    """How many of the first `total` turns each party has, where their shares are in proportion to `shares` (>= 0).

    Webster's method: turns go out one by one, party d's m-th (from 0) at time (2m + 1) / shares[d]. The counts add up
    to `total`, never fall as it grows, and need no history. A party with the part q = shares[d] / sum(shares), one of D
    that are above 0, is off q * total by at most 1/2 + q (D - 2) / 2 where D > 1: by less than 1 for up to three.
    (Rounding cumulative shares down stays within 1 for any D, but lets counts fall where a share is small.)
    """
    whole = sum(shares)
    parties = [d for d, share in enumerate(shares) if share > 0]
    counts = [
        (2 * total * share + whole) // (2 * whole) for share in shares
    ]  # all that are due at time 2 total / whole
    while sum(counts) < total:
        counts[min(parties, key=lambda d: (Fraction(2 * counts[d] + 1, shares[d]), d))] += 1
    while sum(counts) > total:
        counts[max(parties, key=lambda d: (Fraction(2 * counts[d] - 1, shares[d]), d))] -= 1
    return counts


class Order:
    """The order of a run.

    Args:
        buckets: as `buckets.assign` makes them.
        seed: of the shuffles.
        block_shards: shards within whose samples a shuffle is full; whole shards are shuffled against each other.
        set_shards: number of shards of each data set, in the order of their numbers; one data set by default.
        weights: of the data sets in what a run sees; None for each by its number of samples (in buckets).
        image_ratio: part of the samples that are stills, in (0, 1): the shares of all buckets of one frame, and of all
            others, are scaled to it, and the weights hold within each kind. None leaves the shares as they are.
        first_step: global step that this order begins at.

    Raises:
        UserError: a data set has no sample in any bucket, or an image ratio is given but not both kinds of buckets.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        seed: int,
        block_shards: int,
        set_shards: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        image_ratio: float | None = None,
        first_step: int = 0,
    ) -> None:
        self.buckets = list(buckets)
        self.seed = seed
        self.first_step = first_step
        self._block_shards = block_shards
        if set_shards is None:
            set_shards = [1 + max(int(bucket.shards[-1]) for bucket in self.buckets)]
        if weights is not None and len(weights) != len(set_shards):
            raise ValueError(f"{len(weights)} weights for {len(set_shards)} data sets")
        self._set_shards, self._weights, self._image_ratio = set_shards, weights, image_ratio
        bounds = np.concatenate([[0], np.cumsum(set_shards)])
        # Data set d has the shards runs[d]:runs[d + 1] of a bucket, places in bucket.shards.
        self._runs = [np.searchsorted(bucket.shards, bounds).tolist() for bucket in self.buckets]
        # Kept small and in memory: a pass begins with one look at all of them.
        self._sizes = [np.diff(bucket.starts).astype(np.int32) for bucket in self.buckets]
        self._counts = [
            np.diff(bucket.starts[runs]).tolist() for bucket, runs in zip(self.buckets, self._runs, strict=True)
        ]
        self.set_samples = [sum(column) for column in zip(*self._counts, strict=True)]
        """Samples of each data set that are in a bucket."""
        for number, samples in enumerate(self.set_samples):
            if samples == 0:
                raise UserError(
                    f"data.sets[{number}]: none of its samples goes to a bucket; change data.buckets or leave it out"
                )
        masses = self._masses()
        self._set_shares = [_integers(row) for row in masses]
        self._bucket_shares = _integers(
            [sum(row, Fraction(0)) / bucket.batch for row, bucket in zip(masses, self.buckets, strict=True)]
        )
        streams = 2 * len(self.buckets) * len(self.set_samples)
        self._pass = lru_cache(maxsize=streams)(self._shuffle_shards)
        self._block = lru_cache(maxsize=streams)(self._shuffle_block)
        self._cycle = lru_cache(maxsize=2)(self._shuffle_cycle)
        self._fingerprint = cache(self._hash_all)

    def beginning_at(self, step: int) -> "Order":
        """The order of the same samples and shares that begins at a global step."""
        return Order(
            self.buckets,
            seed=self.seed,
            block_shards=self._block_shards,
            set_shards=self._set_shards,
            weights=self._weights,
            image_ratio=self._image_ratio,
            first_step=step,
        )

    def step(self, step: int) -> list[MicroStep]:
        """The micro-steps of a global step (one), from `first_step` on."""
        turns, earlier, place = self._turn(step)
        number = int(turns[place])
        bucket = self.buckets[number]
        one = earlier[number] + int((turns[:place] == number).sum())
        before = apportion(one * bucket.batch, self._set_shares[number])
        after = apportion((one + 1) * bucket.batch, self._set_shares[number])
        parts: list[np.ndarray] = []
        for data_set, (start, stop) in enumerate(zip(before, after, strict=True)):
            parts += self._places(number, data_set, start, stop)
        samples = np.concatenate(parts)
        if len(self.set_samples) > 1:
            samples = self._generator("positions", number, one).permutation(samples)
        return [MicroStep(shape=bucket.shape, samples=samples, bucket=number)]

    def passes(self, step: int) -> list[float]:
        """How often this order has shown the samples of each data set when a step ends, on average over buckets."""
        turns, earlier, place = self._turn(step)
        steps = np.array(earlier) + np.bincount(turns[: place + 1], minlength=len(self.buckets))
        taken = [
            apportion(int(count) * bucket.batch, shares)
            for count, bucket, shares in zip(steps, self.buckets, self._set_shares, strict=True)
        ]
        return [
            sum(column) / samples for column, samples in zip(zip(*taken, strict=True), self.set_samples, strict=True)
        ]

    def replacement(self, bucket: int, sample: int, step: int, position: int, attempt: int) -> int:
        """A sample of the same bucket and data set to stand in for a damaged one: again a pure function."""
        one = self.buckets[bucket]
        place = int(np.searchsorted(one.samples, sample))
        shard = int(np.searchsorted(one.starts, place, side="right")) - 1
        runs = self._runs[bucket]
        data_set = int(np.searchsorted(runs, shard, side="right")) - 1
        samples = one.samples[one.starts[runs[data_set]] : one.starts[runs[data_set + 1]]]
        return int(samples[hash_seed(self.seed, step, position, "replacement", attempt) % len(samples)])

    def set_share(self, data_set: int) -> float:
        """Part of all samples of a long run that come from a data set."""
        parts = [
            Fraction(turns * bucket.batch * shares[data_set], sum(shares))
            for turns, bucket, shares in zip(self._bucket_shares, self.buckets, self._set_shares, strict=True)
        ]
        whole = sum(turns * bucket.batch for turns, bucket in zip(self._bucket_shares, self.buckets, strict=True))
        return float(sum(parts, Fraction(0)) / whole)

    def fingerprint(self) -> str:
        """SHA-256 over all that the order depends on besides steps; a run resumes only under the same."""
        return self._fingerprint()

    def _hash_all(self) -> str:
        digest = hashlib.sha256(f"{self.seed} {self._block_shards} {CYCLE} {self._bucket_shares}".encode())
        for bucket, runs, shares in zip(self.buckets, self._runs, self._set_shares, strict=True):
            digest.update(f"{bucket.shape} {bucket.fps} {bucket.batch} {runs} {shares} {bucket.fingerprint()}".encode())
        return digest.hexdigest()

    def _masses(self) -> list[list[Fraction]]:
        """Part of the samples of a long run, up to a common factor, for each bucket and data set."""
        rates = [Fraction(1)] * len(self.set_samples)  # how often one sample of a data set is taken
        if self._weights is not None:
            rates = [Fraction(str(w)) / n for w, n in zip(self._weights, self.set_samples, strict=True)]
        masses = [[count * rate for count, rate in zip(row, rates, strict=True)] for row in self._counts]
        if self._image_ratio is None:
            return masses
        ratio = Fraction(str(self._image_ratio))
        still = [bucket.shape[0] == 1 for bucket in self.buckets]
        if len(set(still)) < 2:
            raise UserError(
                f"data.image_ratio: {self._image_ratio} needs rows of data.buckets with 1 frame and rows with more; "
                "add one, or set data.image_ratio=null"
            )
        whole = {kind: sum(sum(row) for row, one in zip(masses, still, strict=True) if one == kind) for kind in still}
        part = {True: ratio / whole[True], False: (1 - ratio) / whole[False]}
        return [[mass * part[kind] for mass in row] for row, kind in zip(masses, still, strict=True)]

    def _turn(self, step: int) -> tuple[np.ndarray, list[int], int]:
        """(the cycle that a step is in, as `_shuffle_cycle` gives it, and the step's place in it)."""
        if step < self.first_step:
            raise ValueError(f"step {step} comes before this order, which begins at {self.first_step}")
        cycle, place = divmod(step - self.first_step, CYCLE)
        return *self._cycle(cycle), place

    def _shuffle_cycle(self, cycle: int) -> tuple[np.ndarray, list[int]]:
        """(bucket of each step of a cycle, how many steps each bucket had before)."""
        earlier = apportion(cycle * CYCLE, self._bucket_shares)
        later = apportion((cycle + 1) * CYCLE, self._bucket_shares)
        turns = np.repeat(np.arange(len(self.buckets)), np.subtract(later, earlier))
        return self._generator("cycle", cycle).permutation(turns), earlier

    def _places(self, number: int, data_set: int, start: int, stop: int) -> list[np.ndarray]:
        """Samples at the places start, ..., stop - 1 of the sequence of a data set in a bucket, in pieces."""
        count = self._counts[number][data_set]
        pieces = []
        while start < stop:
            one_pass, offset = divmod(start, count)
            _, ends = self._pass(number, data_set, one_pass)
            block = int(np.searchsorted(ends, offset, side="right"))
            samples = self._block(number, data_set, one_pass, block)
            first = offset - int(ends[block]) + len(samples)
            pieces.append(samples[first : first + stop - start])
            start += len(pieces[-1])
        return pieces

    def _shuffle_shards(self, number: int, data_set: int, one_pass: int) -> tuple[np.ndarray, np.ndarray]:
        """(places in bucket.shards in the order of a pass, place in the pass where each block of them ends)."""
        low, high = self._runs[number][data_set : data_set + 2]
        order = self._generator("pass", number, data_set, one_pass).permutation(high - low)
        sizes = self._sizes[number][low:high][order]
        blocks = np.add.reduceat(sizes, np.arange(0, len(sizes), self._block_shards), dtype=np.int64)
        return order.astype(np.int32) + np.int32(low), np.cumsum(blocks)

    def _shuffle_block(self, number: int, data_set: int, one_pass: int, block: int) -> np.ndarray:
        """Samples of a block of shards in the order of a pass."""
        order, _ = self._pass(number, data_set, one_pass)
        bucket = self.buckets[number]
        shards = order[block * self._block_shards : (block + 1) * self._block_shards]
        samples = np.concatenate([bucket.samples[bucket.starts[one] : bucket.starts[one + 1]] for one in shards])
        return self._generator("block", number, data_set, one_pass, block).permutation(samples)

    def _generator(self, *purpose: int | str) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(hash_seed(self.seed, "order", self.first_step, *purpose)))


def _integers(parts: Sequence[Fraction]) -> list[int]:
    """The smallest integers in the same proportion."""
    scale = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * scale) for part in parts]
    divisor = math.gcd(*whole)
    return [one // divisor for one in whole]


def check_parts(batches: Sequence[int], *, world_size: int, accumulation: int) -> None:
    """Raise UserError, naming what would, unless ranks x accumulation passes divide the batch of every bucket."""
    parts, common = world_size * accumulation, math.gcd(*batches)
    if common % parts:
        allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UserError(
            f"parallel.accumulation: {world_size} ranks x {accumulation} passes do not divide batches of "
            f"{', '.join(map(str, sorted(set(batches))))}; ranks x accumulation may be {allowed}"
        )


def rank_positions(batch: int, *, rank: int, world_size: int, accumulation: int) -> list[np.ndarray]:
    """Positions of the global batch that a rank works on, one array per accumulation pass.

    Raises:
        UserError: ranks x accumulation does not divide the batch.
    """
    check_parts([batch], world_size=world_size, accumulation=accumulation)
    size = batch // (world_size * accumulation)
    return [np.arange(size) + (one * world_size + rank) * size for one in range(accumulation)]
