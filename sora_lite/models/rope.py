"""Rotary position embedding over (t, h, w) (Su et al., arXiv 2104.09864; the axis split is Wan's).

A head of width d gives d - 4*floor(d/6) channels to time and 2*floor(d/6) each to height and width. Pairs of
neighbouring channels turn by an angle proportional to the position, so attention sees differences of positions only.
"""

from functools import lru_cache

import torch
from torch import Tensor


def axis_split(head_width: int) -> tuple[int, int, int]:
    """Channels of a head for (t, h, w). head_width is even and at least 6."""
    if head_width % 2 or head_width < 6:
        raise ValueError(f"3-D RoPE needs an even head width of at least 6, not {head_width}")
    side = 2 * (head_width // 6)
    return head_width - 2 * side, side, side


@lru_cache(maxsize=64)
def rotation(grid: tuple[int, int, int], head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, each N x head_width/2, float32, tokens ordered as in `patch`."""
    angles = []
    positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    for position, width in zip(positions, axis_split(head_width), strict=True):
        frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(position.reshape(-1, 1) * frequency)
    angle = torch.cat(angles, dim=1)  # N d/2
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (2i, 2i+1) of queries or keys. x: B heads N d; cos, sin: N d/2."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).type_as(x)
