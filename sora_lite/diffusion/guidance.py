"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from collections.abc import Callable

import torch
from torch import Tensor

Conditional = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""model(x, t, labels, text) -> prediction."""


def guided(
    model: Conditional,
    scale: float,
    labels: Tensor | None,
    text: Tensor | None,
    null_labels: Tensor | None,
    null_text: Tensor | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """velocity(x, t) = null + scale * (conditional - null), in one call on a doubled batch. Scale 1 is no guidance.

    labels: B; text: B M; the null conditions have the same shapes.
    """
    if scale == 1:
        return lambda x, t: model(x, t, labels, text)
    both_labels = torch.cat([labels, null_labels]) if labels is not None and null_labels is not None else None
    both_text = torch.cat([text, null_text]) if text is not None and null_text is not None else None

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        prediction = model(torch.cat([x, x]), torch.cat([t, t]), both_labels, both_text)
        conditional, null = prediction.chunk(2)
        return null + scale * (conditional - null)

    return velocity
