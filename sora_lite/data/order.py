"""Which sample is in which global step: a pure function of (buckets, seed, step). Pure NumPy, no I/O.

Every bucket has an endless sequence: pass after pass over its samples, each pass block-shuffled anew. The k-th step of
a bucket takes places [k * batch, (k+1) * batch) of its sequence, so within a bucket every sample comes once per pass,
no remainder is dropped, and a step may span two passes. Steps choose their bucket by a shuffled cycle in which each
bucket comes as often as it has batches. Nothing depends on ranks, workers or history: resuming at a step costs nothing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sora_lite.data.buckets import Bucket
from sora_lite.errors import UserError


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


class Order:
    """The order of a run.

    Args:
        buckets: as `buckets.assign` makes them.
        shards: shard number of every sample of the index.
        seed: of the shuffles.
        block_shards: shards within whose samples a shuffle is full; whole shards are shuffled against each other.
    """

    def __init__(self, buckets: Sequence[Bucket], shards: np.ndarray, *, seed: int, block_shards: int) -> None:
        self.buckets = list(buckets)
        self.seed = seed
        self._shards = shards
        self._block_shards = block_shards
        self._per_cycle = np.array([max(1, round(len(b.samples) / b.batch)) for b in self.buckets])
        self._permutation = lru_cache(maxsize=2 * len(self.buckets))(self._permute)
        self._cycle = lru_cache(maxsize=2)(self._shuffle_cycle)

    def step(self, step: int) -> list[MicroStep]:
        """The micro-steps of a global step (one)."""
        number, earlier = self._bucket_of(step)
        bucket = self.buckets[number]
        places = np.arange(earlier * bucket.batch, (earlier + 1) * bucket.batch)
        passes, offsets = np.divmod(places, len(bucket.samples))
        samples = np.empty(len(places), dtype=np.int64)
        for one in np.unique(passes):
            chosen = passes == one
            samples[chosen] = self._permutation(number, int(one))[offsets[chosen]]
        return [MicroStep(shape=bucket.shape, samples=samples, bucket=number)]

    def passes(self, step: int) -> float:
        """How often the samples of this step's bucket have been seen when the step ends."""
        number, earlier = self._bucket_of(step)
        return (earlier + 1) * self.buckets[number].batch / len(self.buckets[number].samples)

    def replacement(self, bucket: int, step: int, position: int, attempt: int) -> int:
        """A sample of the same bucket to stand in for a damaged one: again a pure function."""
        samples = self.buckets[bucket].samples
        return int(samples[hash_seed(self.seed, step, position, "replacement", attempt) % len(samples)])

    def fingerprint(self) -> str:
        """SHA-256 over all that the order depends on besides the step; a run resumes only under the same."""
        digest = hashlib.sha256(f"{self.seed} {self._block_shards}".encode())
        digest.update(self._shards.astype(np.int64).tobytes())
        for bucket in self.buckets:
            digest.update(f"{bucket.shape} {bucket.batch}".encode())
            digest.update(bucket.samples.astype(np.int64).tobytes())
        return digest.hexdigest()

    def _bucket_of(self, step: int) -> tuple[int, int]:
        """(bucket of a step, how many earlier steps had the same bucket)."""
        cycle, place = divmod(step, int(self._per_cycle.sum()))
        cycle_buckets = self._cycle(cycle)
        number = int(cycle_buckets[place])
        within = int((cycle_buckets[:place] == number).sum())
        return number, cycle * int(self._per_cycle[number]) + within

    def _shuffle_cycle(self, cycle: int) -> np.ndarray:
        steps = np.repeat(np.arange(len(self.buckets)), self._per_cycle)
        return self._generator("cycle", cycle).permutation(steps)

    def _permute(self, number: int, one_pass: int) -> np.ndarray:
        """Samples of a bucket in the order of one pass: shards shuffled, then samples within blocks of shards."""
        samples = self.buckets[number].samples
        generator = self._generator("pass", number, one_pass)
        shards, shard_of = np.unique(self._shards[samples], return_inverse=True)
        block = generator.permutation(len(shards))[shard_of] // self._block_shards
        return samples[np.lexsort((generator.random(len(samples)), block))]

    def _generator(self, *purpose: int | str) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(hash_seed(self.seed, "order", *purpose)))


def rank_positions(batch: int, *, rank: int, world_size: int, accumulation: int) -> list[np.ndarray]:
    """Positions of the global batch that a rank works on, one array per accumulation pass.

    Raises:
        UserError: ranks x accumulation does not divide the batch.
    """
    parts = world_size * accumulation
    if batch % parts:
        allowed = [n for n in range(1, batch + 1) if batch % n == 0]
        raise UserError(
            f"parallel.accumulation: {world_size} ranks x {accumulation} passes do not divide a batch of {batch}; "
            f"ranks x accumulation may be {', '.join(map(str, allowed))}"
        )
    size = batch // parts
    return [np.arange(size) + (one * world_size + rank) * size for one in range(accumulation)]
