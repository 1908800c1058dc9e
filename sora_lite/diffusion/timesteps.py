"""Which times training looks at, and on which a sampler steps. Times in [0, 1]: 0 is data, 1 is noise."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def logit_normal(normal: Tensor) -> Tensor:
    """Times sigmoid(z) from standard normal z (Esser et al., arXiv 2403.03206, section 3.1): dense in the middle."""
    return torch.sigmoid(normal)


def uniform(normal: Tensor) -> Tensor:
    """Uniform times from standard normal draws, through the normal distribution function."""
    return torch.special.ndtr(normal)


DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {"logit_normal": logit_normal, "uniform": uniform}
"""Densities of the training times, as functions of a standard normal draw."""


def shift(time: Tensor, alpha: float) -> Tensor:
    """t' = alpha t / (1 + (alpha - 1) t) (arXiv 2403.03206, equation 23): larger alpha for more tokens."""
    return alpha * time / (1 + (alpha - 1) * time)


SHIFTS: dict[str, Callable[[int, int, float], float]] = {
    "fixed": lambda tokens, base, slope: 1.0,
    "sqrt": lambda tokens, base, slope: math.sqrt(tokens / base),
    "exponential": lambda tokens, base, slope: math.exp(slope * (tokens - base)),
}
"""The shift for clips of so many tokens, as a multiple of that for `base` tokens.

sqrt keeps the uncertainty about a picture's content at a time the same (arXiv 2403.03206, section 5.3.2). With
exponential its logarithm grows linearly, as in FLUX.1, whose line from mu = 0.5 at 256 tokens to 1.15 at 4,096 is
shift e^0.5 at base 256 and slope 0.65 / 3840. That is meant for images: for a video of 75,000 tokens it is above 10^5.
"""


def sampling_grid(steps: int, alpha: float = 1.0) -> Tensor:
    """Times from 1 down to 0 for `steps` solver steps, shifted. Shape steps + 1, float64."""
    times = shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha)
    times[0] = 1  # which rounding may miss; samplers know pure noise by a signal of exactly 0
    return times
