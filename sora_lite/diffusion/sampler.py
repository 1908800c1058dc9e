"""Samplers, from noise (t = 1) to data (t = 0). Free functions with one signature:

    sample(denoise, x, grid, noise) -> data

`denoise(x, point)` is a model's `Prediction` for x (B C ...) at a point of the grid. `grid` holds the points to step
on, from noise to data.
`noise(i)` is standard normal like x, for step i of a stochastic sampler; the others never call it.

Any path becomes the straight one of rectified flow by z = x / (alpha + sigma) at the time sigma / (alpha + sigma), and
there dz/dtime = noise - data, whatever the model predicts. So an ODE solver needs no form for each objective.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sora_lite.diffusion.path import Prediction
from sora_lite.diffusion.schedule import posterior_mean_weights, posterior_variance, step_variance


class Point(NamedTuple):
    """A point of a path, x = alpha data + sigma noise. time: for the model; None where it knows none, at the data."""

    time: float | None
    alpha: float
    sigma: float

    @property
    def scale(self) -> float:
        """What divides x, so that it is on the straight path."""
        return self.alpha + self.sigma

    @property
    def straight_time(self) -> float:
        """Time on the straight path, in [0, 1]."""
        return self.sigma / self.scale

    @property
    def log_ratio(self) -> float:
        """log(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite at the ends."""
        if self.alpha == 0 or self.sigma == 0:
            return math.inf if self.sigma == 0 else -math.inf
        return math.log(self.alpha / self.sigma)


Grid = Sequence[Point]
"""Points from noise to data; the last is data: alpha 1, sigma 0."""
Denoise = Callable[[Tensor, Point], Prediction]
Noise = Callable[[int], Tensor]


@torch.no_grad()
def sample_euler(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """Euler's method: first order, one call per step."""
    for now, then in pairwise(grid):
        flow = denoise(x, now).flow
        x = then.scale * (x / now.scale + (then.straight_time - now.straight_time) * flow)
    return x


@torch.no_grad()
def sample_heun(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """Heun's method (Karras et al., arXiv 2206.00364, algorithm 1): second order, two calls per step.

    The last step is Euler's where the model knows no time at its end.
    """
    for now, then in pairwise(grid):
        z, h = x / now.scale, then.straight_time - now.straight_time
        flow = denoise(x, now).flow
        x = then.scale * (z + h * flow)
        if then.time is not None:
            x = then.scale * (z + h / 2 * (flow + denoise(x, then).flow))
    return x


@torch.no_grad()
def sample_dpmpp_2m(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2): second order, one call per step.

    A step to or from an end of the path, where the logarithm of alpha / sigma is infinite, is of first order. That
    logarithm is what the order is in: on n even times up to data, where its steps do not shrink with n, the error falls
    as log n / n^2.
    """
    last_data, last_h = None, math.inf
    for now, then in pairwise(grid):
        data, h = denoise(x, now).data, then.log_ratio - now.log_ratio
        ahead = data
        if last_data is not None and math.isfinite(h):
            ahead = data + h / (2 * last_h) * (data - last_data)
        x = then.sigma / now.sigma * x - then.alpha * math.expm1(-h) * ahead
        last_data, last_h = data, h
    return x


@torch.no_grad()
def sample_ddim(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502, equation 12).

    eta: 0 adds no noise, and the steps are Euler's; 1 adds that of the posterior, as DDPM does with fixed variance.
    """
    for i, (now, then) in enumerate(pairwise(grid)):
        predicted = denoise(x, now)
        variance = eta**2 * posterior_variance(now.alpha, now.sigma, then.alpha, then.sigma)
        x = then.alpha * predicted.data + math.sqrt(max(then.sigma**2 - variance, 0.0)) * predicted.noise
        if variance > 0:
            x = x + math.sqrt(variance) * noise(i)
    return x


@torch.no_grad()
def sample_ddpm(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, algorithm 2), respaced where the grid leaves steps out.

    The variance is the one that the model learned (Nichol & Dhariwal, arXiv 2102.09672, equation 15), else that of the
    posterior.
    """
    for i, (now, then) in enumerate(pairwise(grid)):
        predicted = denoise(x, now)
        step = (now.alpha, now.sigma, then.alpha, then.sigma)
        of_data, of_x = posterior_mean_weights(*step)
        x = of_data * predicted.data + of_x * x
        if then.sigma == 0:
            continue
        low, high = math.log(posterior_variance(*step)), math.log(step_variance(*step))
        if predicted.variance is None:
            x = x + math.exp(low / 2) * noise(i)
        else:
            x = x + torch.exp((low + (high - low) * predicted.variance) / 2) * noise(i)
    return x


class Sampler(NamedTuple):
    """A sampler, and the objectives that it does not serve, each with the reason."""

    sample: Callable[..., Tensor]
    refuses: Mapping[str, str] = {}


SAMPLERS = {
    "euler": Sampler(sample_euler),
    "heun": Sampler(sample_heun),
    "dpmpp_2m": Sampler(sample_dpmpp_2m),
    "ddim": Sampler(sample_ddim),
    "ddpm": Sampler(
        sample_ddpm,
        refuses={
            "rectified_flow": "it goes back along a chain of betas, and rectified flow has none; "
            "sampling.sampler=ddim sampling.eta=1 adds the noise of the posterior on that path"
        },
    ),
}
"""Samplers by name. All others serve every objective: rectified_flow, epsilon and velocity."""
