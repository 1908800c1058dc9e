"""Rectified flow: the straight path from data to noise (Liu et al., arXiv 2209.03003).

Time t in [0, 1]: 0 is data, 1 is noise. Tensors are B ..., times B.
"""

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


def expand(time: Tensor, like: Tensor) -> Tensor:
    """Times B as B 1 1 ... for broadcasting against `like`."""
    return time.view(-1, *[1] * (like.ndim - 1))


def rectified_flow(data: Tensor, noise: Tensor, time: Tensor) -> PathSample:
    """x_t = (1 - t) data + t noise; target = dx_t/dt = noise - data."""
    t = expand(time, data)
    return PathSample(x_t=(1 - t) * data + t * noise, target=noise - data)
