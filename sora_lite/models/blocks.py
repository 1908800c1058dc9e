"""The blocks of the Diffusion Transformer, and how the condition (time, label, pooled text) modulates them.

Shapes: B batch, N video tokens, M text tokens, D width. With modulation "per_block" a block gets the condition as B D,
after SiLU; with "shared" as B 6 D, after the layer that all blocks share.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sora_lite.models.layers import MLP, CrossAttention, InnerAttention, SelfAttention, Span, attend, modulate
from sora_lite.models.linear import Linear
from sora_lite.models.patch import Grid
from sora_lite.models.positions import rotate


@dataclass(kw_only=True, slots=True, frozen=True)
class BlockStyle:
    """What all blocks of a model have in common; see `dit.VideoDiT` for the choices."""

    width: int
    heads: int
    mlp_width: int
    qk_norm: Literal["head", "full", "none"]
    gelu: Literal["erf", "tanh"]
    modulation: Literal["per_block", "shared"]

    def attention(self, span: Span = "all") -> SelfAttention:
        """Self-attention of this style."""
        return SelfAttention(self.width, self.heads, self.qk_norm, span)

    def mlp(self) -> MLP:
        """MLP of this style."""
        return MLP(self.width, self.mlp_width, gelu=self.gelu)

    def norm(self) -> nn.LayerNorm:
        """Layer norm before a modulation, which has the gain and the bias."""
        return nn.LayerNorm(self.width, eps=1e-6, elementwise_affine=False)

    def modulator(self, parts: int) -> nn.Module:
        """condition -> B parts D: shifts, scales and gates."""
        return PerBlock(self.width, parts) if self.modulation == "per_block" else Shared(self.width, parts)


class PerBlock(nn.Module):
    """adaLN-Zero: a linear layer of the block's own (Peebles & Xie)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = Linear(width, parts * width)

    def forward(self, condition: Tensor) -> Tensor:  # B D -> B parts D
        return self.linear(condition).unflatten(-1, (self.parts, -1))


class Shared(nn.Module):
    """adaLN-single: offsets of the block's own to what all blocks share (PixArt, arXiv 2310.00426; Wan)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(parts, width))

    def forward(self, condition: Tensor) -> Tensor:  # B n D, of which the first parts count; or B 1 D -> B parts D
        return self.scale_shift_table + condition[:, : len(self.scale_shift_table)]


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to text if there is any, MLP.

    Args:
        text_width: width of the text; None for a block that reads none.
        cross_norm: a layer norm before the cross-attention.
        span: which tokens attend to each other.
    """

    def __init__(self, style: BlockStyle, text_width: int | None, *, cross_norm: bool, span: Span) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = style.norm(), style.norm()
        self.attention, self.mlp, self.modulation = style.attention(span), style.mlp(), style.modulator(6)
        self.cross = self.norm_text = None
        if text_width is not None:
            self.norm_text = nn.LayerNorm(style.width, eps=1e-6) if cross_norm else nn.Identity()
            self.cross = CrossAttention(style.width, text_width, style.heads, style.qk_norm)

    def forward(
        self, x: Tensor, condition: Tensor, rope: Tensor | None, grid: Grid, text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """x: B N D; text: B M D_text; mask: B 1 1 M, True where a text token is real."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).unbind(1)  # each B D
        h = self.attention(modulate(self.norm_attention, x, shift_a, scale_a), rope, frames=grid[0])  # B N D
        x = torch.addcmul(x, gate_a.unsqueeze(1), h)  # B N D
        if self.cross is not None:
            x = x + self.cross(self.norm_text(x), text, mask)  # B N D
        h = self.mlp(modulate(self.norm_mlp, x, shift_m, scale_m))  # B N D
        return torch.addcmul(x, gate_m.unsqueeze(1), h)  # B N D


class JointStream(nn.Module):
    """The weights of one of the two streams of a joint block.

    keys_only: nothing reads what becomes of this stream, so it has no more than the other one needs to attend to it.
    """

    def __init__(self, style: BlockStyle, *, keys_only: bool = False) -> None:
        super().__init__()
        self.norm_attention, self.attention = style.norm(), style.attention()
        self.modulation = style.modulator(2 if keys_only else 6)
        if keys_only:
            self.attention.out = nn.Identity()
        else:
            self.norm_mlp, self.mlp = style.norm(), style.mlp()

    def project(self, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each B n heads d."""
        return self.attention.project(modulate(self.norm_attention, x, parts[0], parts[1]))

    def finish(self, x: Tensor, y: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """What the attention gave (B n heads d) and the MLP, added to x: B n D."""
        _, _, gate_a, shift_m, scale_m, gate_m = parts
        x = torch.addcmul(x, gate_a.unsqueeze(1), self.attention.out(y.flatten(2)))
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(modulate(self.norm_mlp, x, shift_m, scale_m)))


class JointBlock(nn.Module):
    """MMDiT block (Esser et al., arXiv 2403.03206): video and text attend to each other as one sequence, and each has
    weights of its own."""

    def __init__(self, style: BlockStyle, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.video, self.text = JointStream(style), JointStream(style, keys_only=last)
        self.inner = InnerAttention()

    def forward(
        self, x: Tensor, condition: Tensor, rope: Tensor | None, grid: Grid, text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """x: B N+M D, video tokens first; rope: for N+M tokens; mask: B 1 1 N+M. `text` is in x.

        Returns the like, the last block video tokens alone.
        """
        tokens = math.prod(grid)
        video, words = x[:, :tokens], x[:, tokens:]
        of_video, of_text = self.video.modulation(condition).unbind(1), self.text.modulation(condition).unbind(1)
        streams = self.video.project(video, of_video), self.text.project(words, of_text)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*streams, strict=True))  # each B N+M heads d
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = attend(self.inner, q, k, v, mask)  # B N+M heads d
        video = self.video.finish(video, y[:, :tokens], of_video)  # B N D
        return video if self.last else torch.cat([video, self.text.finish(words, y[:, tokens:], of_text)], dim=1)


class FinalLayer(nn.Module):
    """Modulation, then a linear map from tokens to patches."""

    def __init__(self, style: BlockStyle, out_features: int) -> None:
        super().__init__()
        self.norm, self.modulation = style.norm(), style.modulator(2)
        self.out = Linear(style.width, out_features)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # B N D -> B N out_features
        shift, scale = self.modulation(condition).unbind(1)
        return self.out(modulate(self.norm, x, shift, scale))
