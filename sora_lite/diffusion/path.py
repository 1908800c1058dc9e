"""Paths from data to noise, x_t = alpha data + sigma noise, and what a model predicts on them.

Time t in [0, 1]: 0 is data, 1 is noise. Tensors are B ..., alpha and sigma broadcast against them.

| objective | the model predicts | path |
|---|---|---|
| rectified_flow | noise - data = dx_t/dt (Liu et al., arXiv 2209.03003) | straight: alpha = 1 - t, sigma = t |
| epsilon | noise (Ho et al., arXiv 2006.11239) | variance preserving, a `schedule.Schedule` |
| velocity | v = alpha noise - sigma data (Salimans & Ho, arXiv 2202.00512) | the same |
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(kw_only=True, slots=True, frozen=True)
class PathSample:
    """A point on the path and what a model should predict there. Both have the data's shape."""

    x_t: Tensor
    target: Tensor

    def __post_init__(self) -> None:
        if self.x_t.shape != self.target.shape:
            raise ValueError(f"x_t {tuple(self.x_t.shape)} and target {tuple(self.target.shape)} differ in shape")


@dataclass(kw_only=True, slots=True, frozen=True)
class Prediction:
    """What a model's output says about a point, whatever it predicts. All have the shape of x.

    flow is noise - data. variance: where a model has learned it, the logarithm of a reverse step's variance as a
    position in [0, 1] between that of the posterior and beta (Nichol & Dhariwal, arXiv 2102.09672, equation 15).
    """

    data: Tensor
    noise: Tensor
    flow: Tensor
    variance: Tensor | None = None


def expand(time: Tensor, like: Tensor) -> Tensor:
    """Times B as B 1 1 ... for broadcasting against `like`."""
    return time.view(-1, *[1] * (like.ndim - 1))


def _flow_target(data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return noise - data


def _epsilon_target(data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return noise


def _velocity_target(data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * noise - sigma * data


TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "rectified_flow": _flow_target,
    "epsilon": _epsilon_target,
    "velocity": _velocity_target,
}
"""target(data, noise, alpha, sigma) of each objective."""


def on_path(objective: str, data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> PathSample:
    """The point alpha data + sigma noise and the objective's target."""
    return PathSample(x_t=alpha * data + sigma * noise, target=TARGETS[objective](data, noise, alpha, sigma))


def prediction(objective: str, output: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Prediction:
    """Data, noise and flow from an output for x: B C ..., or B 2C ... from a model that also learned the variance.

    These are the objective's target and x = alpha data + sigma noise, solved for the two. Where alpha is 0 the noise is
    x itself, so epsilon would say nothing about the data.
    """
    variance = None
    if output.shape[1] == 2 * x.shape[1]:
        output, fraction = output.chunk(2, dim=1)
        variance = (fraction + 1) / 2
    if objective == "rectified_flow":
        return Prediction(data=x - sigma * output, noise=x + alpha * output, flow=output, variance=variance)
    if objective == "epsilon":
        data, noise = (x - sigma * output) / alpha, output
    else:
        data, noise = alpha * x - sigma * output, sigma * x + alpha * output
    return Prediction(data=data, noise=noise, flow=noise - data, variance=variance)
