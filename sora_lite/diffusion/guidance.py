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
    model: Callable[[Tensor, Tensor, Given], Tensor], scale: float, conditions: Given, null: Given
) -> Callable[[Tensor, Tensor], Tensor]:
    """velocity(x, t) = null + scale * (conditional - null), in one call on a doubled batch. Scale 1 is no guidance.

    model(x, t, conditions) predicts; `conditions` and `null` are of x's batch size.
    """
    if scale == 1:
        return lambda x, t: model(x, t, conditions)
    both = conditions.cat(null)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return velocity
