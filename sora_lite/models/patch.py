"""Latents to spacetime patches and back. One patch is one token.

Shapes: B batch, C channels, T H W latent frames and cells, (p q r) the patch in (frames, height, width),
N = T/p * H/q * W/r tokens, ordered frame by frame, row by row.
"""

from einops import rearrange
from torch import Tensor

Grid = tuple[int, int, int]
"""Tokens along (frames, height, width)."""


def token_grid(latent_shape: tuple[int, int, int], patch: Grid) -> Grid:
    """Tokens along each axis of a latent of shape (T, H, W).

    Raises:
        ValueError: the patch does not divide the latent.
    """
    if any(cells % side for cells, side in zip(latent_shape, patch, strict=True)):
        raise ValueError(f"patches of {tuple(patch)} do not divide a latent of {tuple(latent_shape)} (T, H, W)")
    t, h, w = (cells // side for cells, side in zip(latent_shape, patch, strict=True))
    return t, h, w


def patchify(latent: Tensor, patch: Grid) -> Tensor:
    """B C T H W -> B N (p q r C)."""
    p, q, r = patch
    return rearrange(latent, "b c (t p) (h q) (w r) -> b (t h w) (p q r c)", p=p, q=q, r=r)


def unpatchify(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """B N (p q r C) -> B C T H W: the inverse of `patchify`."""
    (t, h, w), (p, q, r) = grid, patch
    return rearrange(tokens, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", t=t, h=h, w=w, p=p, q=q, r=r)
