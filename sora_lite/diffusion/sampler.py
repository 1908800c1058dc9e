"""ODE samplers for dx/dt = velocity(x, t), from noise (t = 1) to data (t = 0). Free functions, one signature.

`velocity(x, t)` takes x (B ...) and t (B) and returns a tensor like x. `times` is a decreasing grid from 1 to 0, as
`timesteps.sampling_grid` makes it.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def _times(x: Tensor, time: Tensor) -> Tensor:
    return torch.full((len(x),), float(time), device=x.device, dtype=torch.float32)


@torch.no_grad()
def sample_euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Euler's method: first order, one call per step."""
    for t, t_next in pairwise(times):
        x = x + float(t_next - t) * velocity(x, _times(x, t))
    return x


@torch.no_grad()
def sample_heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Heun's method (Karras et al., arXiv 2206.00364, algorithm 1): second order, two calls per step."""
    for t, t_next in pairwise(times):
        h = float(t_next - t)
        slope = velocity(x, _times(x, t))
        slope_next = velocity(x + h * slope, _times(x, t_next))
        x = x + h / 2 * (slope + slope_next)
    return x
