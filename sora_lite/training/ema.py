"""Exponential moving average of the weights, kept in fp32 by each rank for the fragments that it holds.

No rank holds the whole average and no update communicates, at any ZeRO stage.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sora_lite.training.engine import Engine
    from sora_lite.training.fragment import Fragment


def decay(step: int, max_decay: float) -> float:
    """Weight of the old average at the update after step `step` (the first is 0): min(max_decay, (1+n) / (10+n))."""
    return min(max_decay, (1 + step) / (10 + step))


class EMA:
    """The average of an engine's master weights; it starts as the weights at the time it is made.

    Args:
        engine: Whose weights.
        max_decay: Largest decay, in (0, 1).
        on_cpu: Whether it lies in the host's memory, whatever device the weights are on.
    """

    def __init__(self, engine: "Engine", max_decay: float, *, on_cpu: bool = False) -> None:
        if not 0 < max_decay < 1:
            raise ValueError(f"max_decay {max_decay} is not between 0 and 1")
        self.engine = engine
        self.max_decay = max_decay
        fragments = engine.fragments()
        self._layout = [(f.name, f.offset, f.master.numel()) for f in fragments]
        device = torch.device("cpu") if on_cpu else engine.rank.device
        self._average = [f.master.to(device, copy=True) for f in fragments]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimizer step `step` (the first is 0)."""
        fragments = self.engine.fragments()
        average = self.pieces(fragments)
        if average:
            masters = [f.master.to(old.device) for f, old in zip(fragments, average, strict=True)]
            torch._foreach_lerp_(average, masters, 1 - decay(step, self.max_decay))

    def pieces(self, fragments: "list[Fragment]") -> list[Tensor]:
        """The average of each of the engine's `fragments`, as the tensors themselves: writing into them sets it."""
        layout = [(f.name, f.offset, f.master.numel()) for f in fragments]
        if layout != self._layout:
            raise RuntimeError("the engine's fragments are laid out otherwise than when the average was made")
        return self._average
