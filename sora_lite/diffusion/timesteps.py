"""Which times training looks at, and on which times a sampler steps. Times in [0, 1]: 0 is data, 1 is noise."""

import torch
from torch import Tensor


def logit_normal(normal: Tensor) -> Tensor:
    """Times sigmoid(z) from standard normal z (Esser et al., arXiv 2403.03206, section 3.1): dense in the middle."""
    return torch.sigmoid(normal)


def uniform(normal: Tensor) -> Tensor:
    """Uniform times from standard normal draws, through the normal distribution function."""
    return torch.special.ndtr(normal)


def shift(time: Tensor, alpha: float) -> Tensor:
    """t' = alpha t / (1 + (alpha - 1) t) (arXiv 2403.03206, equation 23): larger alpha for more tokens."""
    return alpha * time / (1 + (alpha - 1) * time)


def sampling_grid(steps: int, alpha: float = 1.0) -> Tensor:
    """Times from 1 down to 0 for `steps` solver steps, shifted. Shape steps + 1, float64."""
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha)
