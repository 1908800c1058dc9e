"""Silent corruption: what every rank holds a copy of must be the same on all, and what is frozen as it was at start."""

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sora_lite.errors import UserError
from sora_lite.parallel.env import Rank

WORDS_AT_ONCE = 2**24
"""Words of a tensor that are summed up together: an embedding of a quarter of a million words would not fit beside
itself in twice the size."""


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes and every bit of tensors, summed up on their device: one pass, 16 bytes brought back.

    A flipped bit always changes it: words of 32 bits are added up in 64, plain and weighted by place.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        head = len(raw) // 4 * 4
        words = raw[:head].view(torch.int32)
        sums = [raw[head:].long().sum()]
        for start in range(0, len(words), WORDS_AT_ONCE):
            some = words[start : start + WORDS_AT_ONCE].long()
            places = torch.arange(start + 1, start + len(some) + 1, device=some.device)
            sums += [some.sum(), (some * places).sum()]
        digest.update(str([int(one) for one in sums]).encode())
    return digest.hexdigest()[:16]


class ReplicaCheck:
    """Compares what is replicated over the ranks.

    Args:
        rank: this process.
        frozen: tensors that training never writes, by name (a frozen VAE or text encoder).
        parts: such of which each rank holds a part of its own.
        facts: JSON that must be the same everywhere, such as the configuration and the version of the code.

    Raises:
        UserError: the ranks do not start alike.
    """

    def __init__(
        self, rank: Rank, frozen: Mapping[str, Tensor], parts: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        self._rank, self._frozen = rank, (frozen, parts)
        self._start = [checksum(one) for one in self._frozen]
        told = {"frozen weights": self._start[0], **{name: _digest(value) for name, value in facts.items()}}
        self._refuse(told, "start the run anew with the same code and settings on every node")

    def check(self, replicated: Mapping[str, Tensor]) -> None:
        """Compare, as a collective. replicated: tensors that must be the same on all ranks now, by name.

        Raises:
            UserError: on all ranks, naming the odd one. Nothing was saved since the last check.
        """
        now = [checksum(one) for one in self._frozen]
        changed = self._rank.gather([now != self._start, _where()])
        cure = "take that node out of service; the same command goes on from the last checkpoint, made before it"
        if odd := [f"rank {number} ({where})" for number, (is_odd, where) in enumerate(changed) if is_odd]:
            raise UserError(f"{', '.join(odd)}: the frozen weights in memory changed since the start; {cure}")
        self._refuse({"trained weights": checksum(replicated)}, cure)

    def _refuse(self, told: dict[str, str], cure: str) -> None:
        everyone = self._rank.gather([told, _where()])
        for what in told:
            held = [one[what] for one, _ in everyone]
            (usual, count), *others = Counter(held).most_common()
            if not others:
                continue
            odd = [n for n, value in enumerate(held) if value != usual or 2 * count <= len(held)]
            names = ", ".join(f"rank {n} ({everyone[n][1]})" for n in odd)
            verb = "differ from each other" if 2 * count <= len(held) else "differs from the other ranks"
            raise UserError(f"{names} {verb} in: {what}; {cure}")


def _where() -> str:
    return f"{platform.node()}, process {os.getpid()}"


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
