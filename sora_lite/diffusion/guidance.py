"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class Joinable(Protocol):
    """Conditions of a batch, such as `models.conditions.Conditions`."""

    def cat(self, other: Self) -> Self:
        """Both along the batch."""
        ...


Given = TypeVar("Given", bound=Joinable)


def guided(
    model: Callable[[Tensor, Tensor, Given], Tensor],
    conditions: Given,
    null: Given,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    channels: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """output(x, t) = null + scale * (conditional - null), in one call of the model on a doubled batch.

    Args:
        model: model(x, t, conditions) -> output, B C ..., or B 2C ... with a learned variance, which is never guided.
        conditions, null: of x's batch size; `null` may ask for what shall not be seen (a negative prompt).
        scale: 1 is no guidance, and one call on the batch alone.
        interval: times [least, greatest] that are guided, elsewhere scale is 1 (Kynkaanniemi et al., arXiv 2404.07724).
        rescale: how far, from 0 to 1, the output's standard deviation per sample goes back to the conditional one's
            (Lin et al., arXiv 2305.08891, section 3.4).
        channels: the first so many are guided, the others conditional; None guides all. The published DiT's is 3 of 4.
    """

    both = conditions.cat(null)

    def output(x: Tensor, t: Tensor) -> Tensor:
        # All of a batch are at the same time.
        if scale == 1 or not interval[0] <= float(t[0]) <= interval[1]:
            return model(x, t, conditions)
        conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        count = x.shape[1] if channels is None else channels
        told, rest = conditional[:, :count], conditional[:, count:]
        mixed = unconditional[:, :count] + scale * (told - unconditional[:, :count])
        if rescale:
            smallest = torch.finfo(mixed.dtype).tiny  # where a model that has learned nothing predicts zeros
            ratio = (_deviation(told) / _deviation(mixed).clamp_min(smallest)).view(-1, *[1] * (x.ndim - 1))
            mixed = mixed * (rescale * ratio + 1 - rescale)
        return torch.cat([mixed, rest], dim=1) if rest.shape[1] else mixed

    return output


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each sample. B ... -> B."""
    return x.flatten(1).std(1)
