"""Building blocks shared by the transformers here.

Shapes: B batch, N tokens (T frames of S), M context tokens, D width, d head width.
"""

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sora_lite.models.attention import attention, suits
from sora_lite.models.linear import Linear
from sora_lite.models.positions import rotate
from sora_lite.models.rms_norm import RMSNorm

Span = Literal["all", "frame", "time"]
"""Which tokens attend to each other: all, those of a frame, or those of one place at all times."""


class InnerAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v. A module of its own, so that sequence parallelism can swap it from outside."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q: B heads N d; k, v: B heads M d; mask: B 1 1 M, True where attended. Returns B heads N d."""
        if mask is None and suits(q, k, v):
            return attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend(inner: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`inner` on tensors as projections make them: q B N heads d; k, v B M heads d. Returns B N heads d.

    The attention writes its result in the layout of q, so that nothing has to be copied on the way in or out.
    """
    return inner(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


class QKNorm(nn.Module):
    """Root mean square normalisation of queries or keys (arXiv 2302.05442), with a gain: of each head's channels, of
    all heads' together (as in Wan), or none."""

    def __init__(self, width: int, heads: int, over: Literal["head", "full", "none"]) -> None:
        super().__init__()
        self.full = over == "full"
        self.norm = nn.Identity() if over == "none" else RMSNorm(width if self.full else width // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # B N heads d
        return self.norm(x.flatten(2)).unflatten(-1, (x.shape[2], -1)) if self.full else self.norm(x)


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
        self.qkv = Linear(width, 3 * width)
        self.norm_q = QKNorm(width, heads, qk_norm)
        self.norm_k = QKNorm(width, heads, qk_norm)
        self.inner = InnerAttention()
        self.out: nn.Module = Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None, frames: int = 1) -> Tensor:
        """x: B N D; rope: of `positions.rotation`; mask: B 1 1 N, for span "all" only; frames: T, by which the other
        spans group."""
        q, k, v = self.project(x)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if self.span == "all":
            return self.out(attend(self.inner, q, k, v, mask).flatten(2))  # B N D
        group = "(b t) s h d" if self.span == "frame" else "(b s) t h d"
        q, k, v = (rearrange(one, f"b (t s) h d -> {group}", t=frames) for one in (q, k, v))
        y = rearrange(attend(self.inner, q, k, v), f"{group} -> b (t s) (h d)", b=len(x), t=frames)
        return self.out(y)  # B N D

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each B N heads d, normalised."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.norm_q(q), self.norm_k(k), v


class CrossAttention(nn.Module):
    """Tokens attend to a context of another width, such as text."""

    def __init__(
        self, width: int, context_width: int, heads: int, qk_norm: Literal["head", "full", "none"] = "head"
    ) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(context_width, 2 * width)
        self.norm_q = QKNorm(width, heads, qk_norm)
        self.norm_k = QKNorm(width, heads, qk_norm)
        self.inner = InnerAttention()
        self.out = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x: B N D; context: B M C; mask: B 1 1 M, True where a context token is real."""
        q = self.q(x).unflatten(-1, (self.heads, -1))  # B N heads d
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).unbind(2)  # each B M heads d
        y = attend(self.inner, self.norm_q(q), self.norm_k(k), v, mask)  # B N heads d
        return self.out(y.flatten(2))  # B N D


class MLP(nn.Sequential):
    """Linear, GELU, linear. The exact GELU is 4 times faster on CPUs than the tanh form that older models use."""

    def __init__(
        self, width: int, hidden: int, out: int | None = None, *, gelu: Literal["erf", "tanh"] = "erf"
    ) -> None:
        approximate = "tanh" if gelu == "tanh" else "none"
        super().__init__(Linear(width, hidden), nn.GELU(approximate), Linear(hidden, out or width))


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
        self.mlp = nn.Sequential(Linear(2 * self.FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:  # B -> B D
        exponent = torch.arange(self.FREQUENCIES, device=time.device, dtype=torch.float32) / self.last_frequency
        # In float64, so that a time of k thousandths is step k of a schedule, exactly.
        thousandths = (1000 * time.double()).float()
        angle = thousandths[:, None] * torch.exp(-math.log(10_000) * exponent)  # B 128
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # B 256
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


def modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, one shift and scale per sample. norm: without gain and bias; x: B N D; shift,
    scale: B D."""
    # Of a single sample they are a layer norm's gain and bias: one pass over memory, where the plain form takes three.
    if len(x) == 1:
        return F.layer_norm(x, norm.normalized_shape, 1 + scale[0], shift[0], norm.eps)
    return torch.addcmul(shift.unsqueeze(1), norm(x), 1 + scale.unsqueeze(1))
