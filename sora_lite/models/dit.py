"""The video Diffusion Transformer (Peebles & Xie, arXiv 2212.09748) on spacetime patches of a video latent.

By its arguments it is the paper's model, one of its video forms (our default, Latte's factorised attention, MMDiT's
joint text), or Wan2.1's text-to-video model.

Shapes: B batch, C latent channels, T H W latent frames and cells, N tokens, M text tokens, D width.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_lite.models.blocks import BlockStyle, DiTBlock, FinalLayer, JointBlock, PerBlock
from sora_lite.models.conditions import Conditions
from sora_lite.models.layers import TimestepEmbedding
from sora_lite.models.linear import Linear
from sora_lite.models.patch import Grid, patchify, token_grid, unpatchify
from sora_lite.models.positions import Scaling, rotation, sincos
from sora_lite.models.text import ByteTextEncoder, TextProjection


class VideoDiT(nn.Module):
    """Predicts what its diffusion objective asks for from a noisy latent, a time and conditions.

    Args:
        channels: latent channels C.
        width, depth, heads: of the transformer; depth counts blocks.
        mlp_ratio: hidden width of the MLPs, in widths.
        patch: latent cells (frames, height, width) in one token.
        positions: "rope" turns queries and keys; "sincos" adds fixed sines and cosines to the tokens.
        rope_theta: base of the rotary frequencies.
        attention: "full" over all tokens; "factorised": blocks look in turn within a frame and along time, and only the
            former read text (Latte, arXiv 2401.03048).
        qk_norm: root mean square norm of queries and keys over each "head", the "full" width, or "none".
        modulation: "per_block" (adaLN-Zero), or "shared" by all blocks with offsets of their own (PixArt, Wan).
        gelu: "erf" (exact) or "tanh".
        num_classes: number of labels, 0 for none. Label `num_classes` itself is the null label.
        text: arguments of `ByteTextEncoder`, None for a model without.
        text_features: width of the features of a frozen text encoder, 0 for a model that reads none.
        text_tokens, pad_text: of the longest text of features, and whether all are padded with zeros to so many tokens,
            which are attended to (Wan); otherwise padding is masked.
        text_attention: "cross": blocks have a cross-attention to the text; "joint": text tokens go along with the video
            tokens (MMDiT).
        cross_norm: a layer norm before the cross-attention.
        pooled_features: width of pooled text features for the modulation, 0 for none. The encoder over bytes pools
            its own.
        learn_variance: predict 2C channels; the second half interpolates the logarithm of the reverse step's variance
            (Nichol & Dhariwal, arXiv 2102.09672).
        frame_conditions: read `Conditions.frames`.
        time_frequencies: of `TimestepEmbedding`: 128, or 127 for weights from diffusers' DiTTransformer2DModel.

    Raises:
        ValueError: the arguments do not go together.
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        patch: Sequence[int] = (1, 2, 2),
        positions: Literal["rope", "sincos"] = "rope",
        rope_theta: float = 10_000.0,
        attention: Literal["full", "factorised"] = "full",
        qk_norm: Literal["head", "full", "none"] = "head",
        modulation: Literal["per_block", "shared"] = "per_block",
        gelu: Literal["erf", "tanh"] = "erf",
        num_classes: int = 0,
        text: dict[str, int] | None = None,
        text_features: int = 0,
        text_tokens: int = 512,
        pad_text: bool = False,
        text_attention: Literal["cross", "joint"] = "cross",
        cross_norm: bool = True,
        pooled_features: int = 0,
        learn_variance: bool = False,
        frame_conditions: bool = False,
        time_frequencies: int = 128,
    ) -> None:
        super().__init__()
        self.channels, self.width, self.heads = channels, width, heads
        self.patch: Grid = (patch[0], patch[1], patch[2])
        self.positions, self.rope_theta = positions, rope_theta
        self.factorised, self.joint = attention == "factorised", text_attention == "joint"
        self.num_classes = num_classes
        self.scaling: Scaling | None = None
        """How positions that were not seen in training are treated; not part of the weights."""
        reads_text = bool(text) or bool(text_features)
        if self.joint and (self.factorised or not reads_text):
            raise ValueError("text_attention 'joint' needs text and full attention")
        if text and (text_features or pooled_features):
            raise ValueError("text is read as bytes, or as features (text_features, pooled_features), not both")

        cells = self.patch[0] * self.patch[1] * self.patch[2]
        self.embed = Linear(channels * cells, width)
        self.embed_frames = Linear((channels + 1) * cells, width, bias=False) if frame_conditions else None
        self.embed_time = TimestepEmbedding(width, time_frequencies)
        self.embed_label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self._build_text(text, text_features, text_tokens, pad_text, pooled_features)

        style = BlockStyle(
            width=width, heads=heads, mlp_width=round(width * mlp_ratio), qk_norm=qk_norm, gelu=gelu,
            modulation=modulation,
        )  # fmt: skip
        self.modulation = PerBlock(width, 6) if modulation == "shared" else None
        context = (text["width"] if text else width) if reads_text else None
        self.blocks = nn.ModuleList(self._blocks(style, depth, context, cross_norm))
        self.final = FinalLayer(style, (2 if learn_variance else 1) * channels * cells)
        self.initialize_weights()

    def _build_text(self, text: dict[str, int] | None, features: int, tokens: int, pad: bool, pooled: int) -> None:
        """What reads text: the encoder over bytes, projections of features, or nothing."""
        self.text: ByteTextEncoder | TextProjection | None = None
        self.embed_text: nn.Linear | None = None
        self.pool_text: nn.Module | None = None
        self.pooled_features = pooled
        if text:
            self.text = ByteTextEncoder(**text)
            self.pool_text = Linear(self.text.width, self.width)
            self.embed_text = Linear(self.text.width, self.width) if self.joint else None
        elif features:
            self.text = TextProjection(features, self.width, tokens=tokens, pad=pad)
        if pooled:
            self.pool_text = nn.Sequential(Linear(pooled, self.width), nn.SiLU(), Linear(self.width, self.width))

    def _blocks(self, style: BlockStyle, depth: int, context: int | None, cross_norm: bool) -> Iterator[nn.Module]:
        """context: width of the text; None for a model without."""
        for number in range(depth):
            if self.joint:
                yield JointBlock(style, last=number == depth - 1)
            elif not self.factorised:
                yield DiTBlock(style, context, cross_norm=cross_norm, span="all")
            elif number % 2 == 0:
                yield DiTBlock(style, context, cross_norm=cross_norm, span="frame")
            else:
                yield DiTBlock(style, None, cross_norm=cross_norm, span="time")

    def initialize_weights(self) -> None:
        """The paper's initialisation, and zeros or small numbers for the parts that it does not have."""

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        self.apply(xavier)
        # Embeddings of single numbers start small: among hundreds of inputs of a layer few would be heard otherwise.
        if self.embed_label is not None:
            nn.init.normal_(self.embed_label.weight, std=0.02)
        nn.init.normal_(self.embed_time.mlp[0].weight, std=0.02)
        nn.init.normal_(self.embed_time.mlp[2].weight, std=0.02)
        if isinstance(self.text, ByteTextEncoder):  # bytes must differ clearly before anything can be read from them
            nn.init.normal_(self.text.token_embedding.weight)
            nn.init.normal_(self.text.position_embedding.weight)
        # In the paper's code the patch embedding is a convolution, whose bias stays as torch draws it.
        bound = self.embed.in_features**-0.5
        nn.init.uniform_(self.embed.bias, -bound, bound)
        # adaLN-Zero: every block starts as the identity, since its gates are zero; and the first prediction is zero.
        for module in self.modules():
            if isinstance(module, PerBlock):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)
        nn.init.zeros_(self.final.out.weight)
        nn.init.zeros_(self.final.out.bias)
        # Cross-attention has no gate, so its own output starts at zero.
        for block in self.blocks:
            if isinstance(block, DiTBlock) and block.cross is not None:
                nn.init.zeros_(block.cross.out.weight)
        # A model that was trained without given frames goes on as it was.
        if self.embed_frames is not None:
            nn.init.zeros_(self.embed_frames.weight)

    def forward(self, latent: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """One prediction.

        Args:
            latent: B C T H W, normalised, noisy.
            time: B in [0, 1]; 0 is data, 1 is noise. Step k of a schedule of 1,000 steps is the float64 k / 1000.
            conditions: of the same batch; what the model does not read is ignored.

        Returns:
            B C T H W, or B 2C T H W with `learn_variance`.

        Raises:
            ValueError: a condition that the model reads is missing.
        """
        grid = token_grid((latent.shape[2], latent.shape[3], latent.shape[4]), self.patch)
        x = self.embed(patchify(latent, self.patch))  # B N D
        if self.embed_frames is not None:
            x = x + self.embed_frames(patchify(_given_frames(conditions, latent), self.patch))  # B N D
        condition = self.embed_time(time)  # B D
        text, mask, pooled = self._read_text(conditions, latent.dtype)  # B M D_text, B 1 1 M, B D
        if pooled is not None:
            condition = condition + pooled  # B D
        if self.embed_label is not None:
            condition = condition + self.embed_label(_needed(conditions.labels, "labels"))  # B D
        x, rope, along_time = self._place(x, grid)
        if self.joint:
            x, rope, mask = _join(x, rope, text, mask)  # B N+M D
        c = F.silu(condition)  # B D
        final_c = c if self.modulation is None else condition.unsqueeze(1)
        c = c if self.modulation is None else self.modulation(c)  # B D, or B 6 D
        for number, block in enumerate(self.blocks):
            if number == 1 and along_time is not None:
                x = x + along_time
            x = block(x, c, rope, grid, text, mask)  # B N D
        x = self.final(x, final_c)  # B N (p q r C)
        return unpatchify(x, grid, self.patch)  # B C T H W

    def _read_text(
        self, conditions: Conditions, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Text B M D_text, mask B 1 1 M (True where a token is real; None for all), pooled text B D."""
        text = mask = pooled = None
        if isinstance(self.text, ByteTextEncoder):
            text, mask = self.text(_needed(conditions.text, "text"))
            # The maximum, since a mean over many bytes would bury the few that differ between two prompts.
            assert self.pool_text is not None
            pooled = self.pool_text(text.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1))  # B D
            text = text if self.embed_text is None else self.embed_text(text)
        elif self.text is not None:
            text, mask = self.text(_needed(conditions.text, "text").to(dtype), conditions.text_mask)
        if self.pooled_features and self.pool_text is not None:
            pooled = self.pool_text(_needed(conditions.pooled, "pooled").to(dtype))
        return text, None if mask is None else mask[:, None, None, :], pooled

    def _place(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens with their place, the rotation of queries and keys, and what is added before the second block."""
        if self.positions == "rope":
            return x, rotation(grid, self.width // self.heads, self.rope_theta, x.device, self.scaling), None
        place, frame = (table.to(x.dtype) for table in sincos(grid, self.width, x.device, self.scaling))
        x = x + place.repeat(grid[0], 1)  # B N D
        if grid[0] == 1:  # an image stands at no time
            return x, None, None
        along_time = frame.repeat_interleave(len(place), 0)  # N D
        # As in Latte, blocks within a frame do not see the time before the first one that looks along it.
        return (x, None, along_time) if self.factorised else (x + along_time, None, None)

    def no_conditions(self, batch: int) -> Conditions:
        """Conditions that ask for nothing, on this model's device, with the longest text: for counting its work."""
        weight = self.embed.weight
        text: Tensor | None = None
        mask: Tensor | None = None
        if isinstance(self.text, ByteTextEncoder):
            text = torch.ones(batch, self.text.max_bytes + 1, dtype=torch.int64, device=weight.device)
        elif self.text is not None:
            text = weight.new_zeros(batch, self.text.tokens, self.text.features)
            mask = torch.zeros(text.shape[:2], dtype=torch.bool, device=weight.device)
        label = torch.full((batch,), self.num_classes, device=weight.device) if self.num_classes else None
        pooled = weight.new_zeros(batch, self.pooled_features) if self.pooled_features else None
        return Conditions(labels=label, text=text, text_mask=mask, pooled=pooled)


def _needed(condition: Tensor | None, name: str) -> Tensor:
    if condition is None:
        raise ValueError(f"the model reads `{name}`, which the conditions do not have")
    return condition


def _given_frames(conditions: Conditions, latent: Tensor) -> Tensor:
    """Given frames and their mask side by side, B C+1 T H W: zeros where the conditions have none."""
    if conditions.frames is None or conditions.frame_mask is None:
        return torch.zeros_like(latent[:, :1]).repeat(1, latent.shape[1] + 1, 1, 1, 1)
    mask = conditions.frame_mask.expand(-1, -1, -1, *latent.shape[3:])
    return torch.cat([conditions.frames, mask], dim=1).to(latent.dtype)


def _join(
    x: Tensor, rope: Tensor | None, text: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Video and text tokens as one sequence B N+M D, the rotation (none for text) and the mask B 1 1 N+M for it."""
    assert text is not None
    tokens, words = x.shape[1], text.shape[1]
    if rope is not None:
        cos, sin = torch.ones_like(rope[0, :, 0]), torch.zeros_like(rope[0, :, 0])
        rope = torch.cat([rope, torch.stack([cos, sin], dim=-1).expand(words, -1, -1)])
    if mask is not None:
        mask = F.pad(mask, (tokens, 0), value=True)
    return torch.cat([x, text], dim=1), rope, mask
