"""Building blocks shared by the transformers here.

Shapes: B batch, N tokens (T frames of S), M context tokens, D width, d head width.
"""

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sora_lite.models.positions import rotate

Rope = tuple[Tensor, Tensor]
"""Cosine and sine of `positions.rotation`, each N d/2."""
Span = Literal["all", "frame", "time"]
"""Which tokens attend to each other: all, those of a frame, or those of one place at all times."""


class InnerAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v. A module of its own, so that sequence parallelism can swap it from outside."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q: B heads N d; k, v: B heads M d; mask: B 1 1 M, True where attended. Returns B heads N d."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class QKNorm(nn.Module):
    """Root mean square normalisation of queries or keys (arXiv 2302.05442), with a gain: of each head's channels, of
    all heads' together (as in Wan), or none."""

    def __init__(self, width: int, heads: int, over: Literal["head", "full", "none"]) -> None:
        super().__init__()
        self.full = over == "full"
        self.norm = nn.Identity() if over == "none" else nn.RMSNorm(width if self.full else width // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # B heads N d
        if not self.full:
            return self.norm(x)
        return self.norm(x.transpose(1, 2).flatten(2)).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention among tokens, which may be rotated by position.

    Args:
        span: which tokens attend to each other. Rotary positions need no change for it: what two tokens share cancels.
    """

    def __init__(
        self, width: int, heads: int, qk_norm: Literal["head", "full", "none"] = "head", span: Span = "all"
    ) -> None:
        super().__init__()
        self.heads, self.span = heads, span
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = QKNorm(width, heads, qk_norm)
        self.norm_k = QKNorm(width, heads, qk_norm)
        self.inner = InnerAttention()
        self.out: nn.Module = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope | None = None, mask: Tensor | None = None, frames: int = 1) -> Tensor:
        """x: B N D; mask: B 1 1 N, for span "all" only; frames: T, by which the other spans group."""
        q, k, v = self.project(x)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.span == "all":
            y = self.inner(q, k, v, mask)  # B heads N d
        else:
            group = "(b t) h s d" if self.span == "frame" else "(b s) h t d"
            q, k, v = (rearrange(one, f"b h (t s) d -> {group}", t=frames) for one in (q, k, v))
            y = rearrange(self.inner(q, k, v), f"{group} -> b h (t s) d", b=len(x), t=frames)
        return self.merge(y)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each B heads N d, normalised."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.norm_q(q), self.norm_k(k), v

    def merge(self, y: Tensor) -> Tensor:
        """B heads N d -> B N D, through the output projection."""
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Tokens attend to a context of another width, such as text."""

    def __init__(
        self, width: int, context_width: int, heads: int, qk_norm: Literal["head", "full", "none"] = "head"
    ) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.norm_q = QKNorm(width, heads, qk_norm)
        self.norm_k = QKNorm(width, heads, qk_norm)
        self.inner = InnerAttention()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x: B N D; context: B M C; mask: B 1 1 M, True where a context token is real."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B heads N d
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads M d
        y = self.inner(self.norm_q(q), self.norm_k(k), v, mask)  # B heads N d
        return self.out(y.transpose(1, 2).flatten(2))  # B N D


class MLP(nn.Sequential):
    """Linear, GELU, linear. The exact GELU is 4 times faster on CPUs than the tanh form that older models use."""

    def __init__(
        self, width: int, hidden: int, out: int | None = None, *, gelu: Literal["erf", "tanh"] = "erf"
    ) -> None:
        approximate = "tanh" if gelu == "tanh" else "none"
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate), nn.Linear(hidden, out or width))


class TimestepEmbedding(nn.Module):
    """Sinusoids of the time, then an MLP (Peebles & Xie). Time in [0, 1] becomes the usual 0..1000.

    Args:
        last_frequency: number of the frequency that is 1/10000 of the first: 128, one after the last; or 127, the last,
            with which diffusers' DiTTransformer2DModel embeds time.
    """

    FREQUENCIES = 128

    def __init__(self, width: int, last_frequency: int = FREQUENCIES) -> None:
        super().__init__()
        self.last_frequency = last_frequency
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:  # B -> B D
        exponent = torch.arange(self.FREQUENCIES, device=time.device, dtype=torch.float32) / self.last_frequency
        # In float64, so that a time of k thousandths is step k of a schedule, exactly.
        thousandths = (1000 * time.double()).float()
        angle = thousandths[:, None] * torch.exp(-math.log(10_000) * exponent)  # B 128
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # B 256
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, one shift and scale per sample. x: B N D; shift, scale: B D."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))
