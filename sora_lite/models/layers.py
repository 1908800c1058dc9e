"""Building blocks shared by the transformers here.

Shapes: B batch, N tokens, M context tokens, D width, d head width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_lite.models.rope import rotate


class InnerAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v. A module of its own, so that sequence parallelism can swap it from outside."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q: B heads N d; k, v: B heads M d; mask: B 1 1 M, True where attended. Returns B heads N d."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class SelfAttention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys (arXiv 2302.05442), optionally rotated by position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.inner = InnerAttention()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads N d
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = self.inner(q, k, v, mask)  # B heads N d
        return self.out(y.transpose(1, 2).flatten(2))  # B N D


class CrossAttention(nn.Module):
    """Tokens attend to a context of another width, such as text."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.inner = InnerAttention()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """x: B N D; context: B M C; mask: B 1 1 M, True where a context token is real."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B heads N d
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads M d
        y = self.inner(self.norm_q(q), self.norm_k(k), v, mask)  # B heads N d
        return self.out(y.transpose(1, 2).flatten(2))  # B N D


class MLP(nn.Sequential):
    """Linear, GELU (exact: on CPUs 4 times faster than the tanh form), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class TimestepEmbedding(nn.Module):
    """Sinusoids of the time, then an MLP (Peebles & Xie). Time in [0, 1] is scaled to the usual 0..1000.

    Of float64 times the product is rounded once, so thousandths come out as whole numbers.
    """

    FREQUENCIES = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:  # B -> B D
        exponent = torch.arange(self.FREQUENCIES, device=time.device, dtype=torch.float32) / self.FREQUENCIES
        angle = (1000 * time).float()[:, None] * torch.exp(-math.log(10_000) * exponent)  # B 128
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # B 256
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, one shift and scale per sample. x: B N D; shift, scale: B D."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))
