"""Where a token stands: rotary positions (RoPE) or fixed sines and cosines, over (t, h, w).

Shapes: B batch, T S tokens of time and of a frame (N = T*S, ordered as in `patch`), D token width, d head width.

A grid with more tokens along an axis than the model was trained on has positions that it has never seen. `Scaling`
brings them back into the trained range, axis by axis, by the factor s = tokens / trained tokens where that is above 1:

- linear: positions are divided by s (position interpolation; Chen et al., arXiv 2306.15595).
- ntk: RoPE's base theta becomes theta * s^(d/(d-2)) for the d channels of an axis: the lowest frequency is stretched by
  s, the highest, which tells neighbours apart, stays (NTK-aware; Peng et al., arXiv 2309.00071, section 3.1).

Sines and cosines are always interpolated linearly.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from sora_lite.models.patch import Grid


@dataclass(kw_only=True, slots=True, frozen=True)
class Scaling:
    """How positions outside of the trained `grid` (tokens along t, h, w) are brought into it."""

    method: Literal["linear", "ntk"]
    grid: Grid

    def factors(self, grid: Grid) -> tuple[float, ...]:
        """s of each axis, at least 1."""
        return tuple(max(1.0, tokens / trained) for tokens, trained in zip(grid, self.grid, strict=True))


def axis_split(head_width: int) -> Grid:
    """Channels of a head for (t, h, w): d - 4*floor(d/6), 2*floor(d/6), 2*floor(d/6), as in Wan.

    Raises:
        ValueError: head_width is odd or below 6.
    """
    if head_width % 2 or head_width < 6:
        raise ValueError(f"3-D RoPE needs an even head width of at least 6, not {head_width}")
    side = 2 * (head_width // 6)
    return head_width - 2 * side, side, side


@lru_cache(maxsize=64)
def rotation(grid: Grid, head_width: int, theta: float, device: torch.device, scaling: Scaling | None = None) -> Tensor:
    """Cosine and sine of every token's turns, N x d/2 x 2, float32 (Su et al., arXiv 2104.09864).

    Pairs of neighbouring channels turn by position * theta^(-2i/d), so attention sees differences of positions only.
    """
    factors = scaling.factors(grid) if scaling else (1.0, 1.0, 1.0)
    angles = []
    positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    for position, width, factor in zip(positions, axis_split(head_width), factors, strict=True):
        # With two channels there is but one frequency, 1, whatever the base.
        by_base = scaling is not None and scaling.method == "ntk" and width > 2
        base = theta * factor ** (width / (width - 2)) if by_base else theta
        frequency = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(position.reshape(-1, 1) / (1.0 if by_base else factor) * frequency)
    angle = torch.cat(angles, dim=1)  # N d/2
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float().to(device)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn channel pairs (2i, 2i+1) of queries or keys. x: B N heads d; turns: of `rotation`."""
    pairs, turns = x.float().unflatten(-1, (-1, 2)), turns.unsqueeze(1)  # B N heads d/2 2, N 1 d/2 2
    if torch.compiler.is_compiling():  # into one loop, but not of complex numbers
        (real, imaginary), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    else:  # one pass over memory, and one in the backward pass, where real numbers take seven
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.flatten(-2).type_as(x)


@lru_cache(maxsize=64)
def sincos(grid: Grid, width: int, device: torch.device, scaling: Scaling | None = None) -> tuple[Tensor, Tensor]:
    """Fixed embeddings of the place in a frame, S D, and of the frame, T D, float32.

    In a frame half of the channels tell the column, and then half the row (Peebles & Xie's code, after He et al., arXiv
    2111.06377). Frames have an embedding of full width (Latte, arXiv 2401.03048).
    """
    t, h, w = scaling.factors(grid) if scaling else (1.0, 1.0, 1.0)
    rows = _waves(torch.arange(grid[1], dtype=torch.float64) / h, width // 2)  # H D/2
    columns = _waves(torch.arange(grid[2], dtype=torch.float64) / w, width // 2)  # W D/2
    place = torch.cat([columns.repeat(grid[1], 1), rows.repeat_interleave(grid[2], 0)], dim=1)  # S D
    frame = _waves(torch.arange(grid[0], dtype=torch.float64) / t, width)  # T D
    return place.float().to(device), frame.float().to(device)


def _waves(position: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of position * 10000^(-2i/width). n -> n width."""
    angle = position[:, None] * 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
