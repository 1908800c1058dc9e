"""Near duplicates: clips that show the same seconds of film, though re-encoded, rescaled or trimmed.

A second is a 64-bit hash of its picture's lowest frequencies (`phash`); two seconds are alike if their hashes differ
in at most `distance` bits. Two clips are near duplicates if, laid over each other with some offset, at least `overlap`
of the hashed seconds of the one that has fewer are alike. Clusters are what such pairs connect.

All pairs are found, without comparing all with all:
- The bits are dealt into distance + k bands. Hashes that are alike agree in at least k whole bands, so they meet in the
  bucket of one of the choices of k bands (pigeonhole; Norouzi, Punjani, Fleet, arXiv:1307.2982, use it with k = 1).
- t of m seconds alike means: among any m - t + 1 of them is one that is alike. So a clip probes with its m - t + 1
  rarest seconds (prefix filter; Bayardo, Ma, Srikant, WWW 2007), and a title that thousands of clips share costs
  nothing unless it makes up so much of a clip that it decides.
- In a crowded bucket only those are compared that no earlier pair has connected. A camera that shows the same
  view for days is one cluster after a few comparisons.
"""

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np

SIDE = 32
"""Side in pixels of the picture that is hashed."""
FLAT = 2.0
"""Standard deviation of the luma, of 255, below which a picture has no hash: noise would decide its bits."""
CROWD = 256
"""Members from which on a bucket counts as crowded."""
BATCH = 1 << 20
"""Pairs of seconds that are compared in one go."""
_FREQUENCIES = np.array(sorted((u * u + v * v, u, v) for u in range(12) for v in range(12))[1:65])[:, 1:]
_COSINES = np.cos(np.pi / SIDE * np.arange(12)[:, None] * (np.arange(SIDE) + 0.5))


def phash(luma: np.ndarray) -> int:
    """Hash a picture's luma, (SIDE, SIDE) in [0, 255]. 0 = it has no hash, for it is flat.

    A bit for each of the 64 lowest frequencies of the cosine transform, without the mean: whether it is above their
    median (the perceptual hash of Zauner's thesis, 2010, which takes a square of frequencies).
    """
    if luma.std() < FLAT:
        return 0
    spectrum = _COSINES @ luma @ _COSINES.T
    lowest = spectrum[_FREQUENCIES[:, 0], _FREQUENCIES[:, 1]]
    return int.from_bytes(np.packbits(lowest > np.median(lowest)).tobytes(), "big")


def clusters(phashes: Sequence[np.ndarray], distance: int, overlap: float, crowd: int = CROWD) -> np.ndarray:
    """Number of the cluster of each clip, int64 (N,): that of its first clip, so a clip without duplicates has its own.

    phashes: uint64 (seconds,) of each clip, 0 = no hash: such a second matches nothing.
    distance: most bits in which seconds may differ, 0 to 32. overlap: in (0, 1].
    Clips of one shot that hardly changes are near duplicates too, although they are no copies.
    Memory: about 160 bytes for each second, and up to 150 MB for the pairs that are being compared.
    """
    if not 0 <= distance <= 32 or not 0 < overlap <= 1:
        raise ValueError(f"distance must lie in [0, 32], not {distance}, and overlap in (0, 1], not {overlap}")
    pairs = _Pairs([np.asarray(one, dtype=np.uint64) for one in phashes], distance, overlap)
    masks = _masks(distance, len(pairs.hashes))
    for turn, mask in enumerate(masks):
        order, key = _sorted(pairs.hashes & mask)
        first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        sizes = np.diff(np.r_[first, len(key)])
        for at, size in zip(first[sizes >= crowd], sizes[sizes >= crowd], strict=True):
            _settle_crowd(pairs, order[at : at + size], masks[:turn])
        at = np.flatnonzero(np.repeat((sizes > 1) & (sizes < crowd), sizes))
        for step in range(1, crowd):
            at = at[at + step < len(key)]
            at = at[key[at] == key[at + step]]
            if not len(at):
                break
            pairs.settle(order[at], order[at + step], masks[:turn])
    return pairs.root


def _settle_crowd(pairs: "_Pairs", members: np.ndarray, earlier: list[np.uint64]) -> None:
    """Settle all pairs of seconds of one bucket; a pair within one cluster is settled already.

    It begins with single pivots, as long as one may connect most of the rest, and goes on with blocks of them.
    """
    block = 1
    while True:
        _, label, counts = np.unique(pairs.root[pairs.clip[members]], return_inverse=True, return_counts=True)
        outside, probes = members[label != counts.argmax()], members[pairs.probe[members]]
        # either set alone takes part in every pair that is open
        pivots = min(outside, probes, key=len)[:block]
        if not len(pivots):
            return
        pairs.settle(np.repeat(pivots, len(members)), np.tile(members, len(pivots)), earlier)
        members = np.setdiff1d(members, pivots)
        block = min(2 * block, 64, 1 + BATCH // len(members)) if len(members) else 1


class _Pairs:
    """All hashed seconds (flat arrays, S of them) of N clips, and what is known of their clusters."""

    def __init__(self, phashes: list[np.ndarray], distance: int, overlap: float) -> None:
        self.distance = distance
        self.lengths = np.array([len(one) for one in phashes], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.seconds = np.concatenate([np.zeros(0, np.uint64), *phashes])  # with those that have no hash
        filled = self.seconds != 0
        owner = np.repeat(np.arange(len(phashes)), self.lengths)
        self.place = np.flatnonzero(filled)  # (S,) into `seconds`
        self.hashes, self.clip = self.seconds[self.place], owner[self.place]  # (S,)
        self.filled = np.bincount(self.clip, minlength=len(phashes))  # (N,) hashed seconds of each clip
        # the slack keeps 0.3 * 10 seconds from becoming 4
        self.needed = np.maximum(np.ceil(overlap * self.filled - 1e-9), 1).astype(np.int64)  # (N,)
        self.probe = self._rarest()  # (S,)
        self.root = np.arange(len(phashes))  # (N,) least clip of each one's cluster

    def _rarest(self) -> np.ndarray:
        """Whether a second is among the rarest m - t + 1 of its clip, judged by how full its quarter's buckets are."""
        common = np.zeros(len(self.hashes), dtype=np.int64)
        for quarter in range(4):
            value = (self.hashes >> np.uint64(16 * quarter) & np.uint64(0xFFFF)).astype(np.int64)
            common += np.bincount(value, minlength=1 << 16)[value]
        order = np.lexsort((common, self.clip))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - (np.cumsum(self.filled) - self.filled)[self.clip[order]]
        return rank <= (self.filled - self.needed)[self.clip]

    def settle(self, one: np.ndarray, other: np.ndarray, earlier: list[np.uint64]) -> None:
        """Join the clips of those pairs of seconds (int64 (P,) each) that make them near duplicates.

        earlier: masks whose buckets are done; pairs that met in one of them have been settled there.
        """
        a, b = self.clip[one], self.clip[other]
        keep = (self.root[a] != self.root[b]) & (self.probe[one] | self.probe[other])
        one, other = one[keep], other[keep]
        differ = self.hashes[one] ^ self.hashes[other]
        keep = np.bitwise_count(differ) <= self.distance
        for mask in earlier if keep.any() else []:
            keep &= (differ & mask) != 0
        one, other = one[keep], other[keep]
        alike = self._overlap(one, other)
        self._join(self.clip[one[alike]], self.clip[other[alike]])

    def _overlap(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Whether enough seconds of two clips are alike if they are laid over each other at a pair of seconds; (P,)."""
        a, b = self.clip[one], self.clip[other]
        offset = (self.place[other] - self.starts[b]) - (self.place[one] - self.starts[a])
        begin, end = np.maximum(0, -offset), np.minimum(self.lengths[a], self.lengths[b] - offset)  # in seconds of a
        needed = np.minimum(self.needed[a], self.needed[b])
        count, open_ = np.zeros(len(a), dtype=np.int64), np.arange(len(a))
        for step in range(int((end - begin).max(initial=0))):
            second = begin[open_] + step
            x = self.seconds[self.starts[a[open_]] + second]
            y = self.seconds[self.starts[b[open_]] + second + offset[open_]]
            count[open_] += (x != 0) & (y != 0) & (np.bitwise_count(x ^ y) <= self.distance)
            open_ = open_[(second + 1 < end[open_]) & (count[open_] < needed[open_])]
        return count >= needed

    def _join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Unite clusters: hook each root under the least one that it meets, then let everybody point at a root."""
        while len(a):
            a, b = self.root[a], self.root[b]
            a, b = np.minimum(a, b)[a != b], np.maximum(a, b)[a != b]
            np.minimum.at(self.root, b, a)
            above = self.root[self.root]
            while (above != self.root).any():
                self.root, above = above, above[above]


def _masks(distance: int, seconds: int) -> list[np.uint64]:
    """The choices of k out of distance + k bands, as masks of 64 bits; k is that which costs least."""

    def cost(k: int) -> float:  # a table is sorted, and then its buckets are compared: about 10 steps against 1
        return comb(distance + k, k) * (10 + seconds / 2 ** (64 * k / (distance + k)))

    k = min(range(1, 5), key=cost)
    # dealt like cards, since neighbouring bits are neighbouring frequencies, which depend on each other
    bands = [sum(1 << bit for bit in range(band, 64, distance + k)) for band in range(distance + k)]
    return [np.uint64(sum(choice)) for choice in combinations(bands, k)]


def _sorted(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(key, kind="stable")
    return order, key[order]
