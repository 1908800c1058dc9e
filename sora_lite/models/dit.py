"""The video Diffusion Transformer (Peebles & Xie, arXiv 2212.09748) on spacetime patches of a video latent.

Shapes: B batch, C latent channels, T H W latent frames and cells, N tokens, M text tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sora_lite.models.conditions import Conditions
from sora_lite.models.layers import MLP, CrossAttention, SelfAttention, TimestepEmbedding, modulate
from sora_lite.models.patch import patchify, token_grid, unpatchify
from sora_lite.models.rope import rotation
from sora_lite.models.text import ByteTextEncoder


class DiTBlock(nn.Module):
    """adaLN-Zero block: self-attention over all tokens, cross-attention to text, MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, text_width: int | None) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(width, heads)
        self.norm_text = nn.LayerNorm(width, eps=1e-6) if text_width else None
        self.cross = CrossAttention(width, text_width, heads) if text_width else None
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor], text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """x: B N D; condition: B D (after SiLU); text: B M D_text; mask: B 1 1 M."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)  # each B D
        h = self.attention(modulate(self.norm_attention(x), shift_a, scale_a), rope)  # B N D
        x = torch.addcmul(x, gate_a.unsqueeze(1), h)  # B N D
        if self.cross is not None and text is not None:
            x = x + self.cross(self.norm_text(x), text, mask)  # B N D
        h = self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))  # B N D
        return torch.addcmul(x, gate_m.unsqueeze(1), h)  # B N D


class FinalLayer(nn.Module):
    """adaLN, then a linear map from tokens to patches."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out_features)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.out(modulate(self.norm(x), shift, scale))


class VideoDiT(nn.Module):
    """Predicts a velocity (or any target of the latent's shape) from a noisy latent, a time and conditions.

    Args:
        channels: latent channels C.
        width, depth, heads, mlp_ratio: of the transformer.
        patch: latent cells (frames, height, width) in one token.
        rope_theta: base of the rotary frequencies.
        num_classes: number of labels, 0 for none. Label `num_classes` itself is the null label.
        text: arguments of `ByteTextEncoder`, None for a model without text.
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
        rope_theta: float = 10_000.0,
        num_classes: int = 0,
        text: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.width, self.heads, self.rope_theta = channels, width, heads, rope_theta
        self.patch = (patch[0], patch[1], patch[2])
        self.num_classes = num_classes
        features = channels * patch[0] * patch[1] * patch[2]
        self.embed = nn.Linear(features, width)
        self.embed_time = TimestepEmbedding(width)
        self.embed_label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.text = ByteTextEncoder(**text) if text else None
        self.pool_text = nn.Linear(self.text.width, width) if self.text else None
        text_width = self.text.width if self.text else None
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio, text_width) for _ in range(depth))
        self.final = FinalLayer(width, features)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The paper's initialisation, and zeros for the branches that it does not have."""

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        self.apply(xavier)
        if self.embed_label is not None:
            nn.init.normal_(self.embed_label.weight, std=0.02)
        if self.text is not None:  # bytes must differ clearly before anything can be read from them
            nn.init.normal_(self.text.token_embedding.weight)
            nn.init.normal_(self.text.position_embedding.weight)
        nn.init.normal_(self.embed_time.mlp[0].weight, std=0.02)
        nn.init.normal_(self.embed_time.mlp[2].weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, since its gates are zero.
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.modulation.bias)
            if block.cross is not None:  # it has no gate, so its own output starts at zero
                nn.init.zeros_(block.cross.out.weight)
        # The first prediction is zero.
        nn.init.zeros_(self.final.modulation.weight)
        nn.init.zeros_(self.final.modulation.bias)
        nn.init.zeros_(self.final.out.weight)
        nn.init.zeros_(self.final.out.bias)

    def forward(self, latent: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """One prediction.

        Args:
            latent: B C T H W, normalised, noisy.
            time: B in [0, 1]; 0 is data, 1 is noise.
            conditions: of the same batch; what the model does not read is ignored.

        Returns:
            B C T H W.
        """
        grid = token_grid((latent.shape[2], latent.shape[3], latent.shape[4]), self.patch)
        x = self.embed(patchify(latent, self.patch))  # B N D
        condition = self.embed_time(time)  # B D
        if self.embed_label is not None:
            condition = condition + self.embed_label(conditions.labels)  # B D
        features = mask = None
        if self.text is not None:
            features, real = self.text(conditions.text)  # B M D_text, B M
            # The maximum, since a mean over many bytes would bury the few that differ between two prompts.
            pooled = features.masked_fill(~real.unsqueeze(-1), -torch.inf).amax(1)  # B D_text
            condition = condition + self.pool_text(pooled)  # B D
            mask = real[:, None, None, :]  # B 1 1 M
        condition = nn.functional.silu(condition)
        rope = rotation(grid, self.width // self.heads, self.rope_theta, latent.device)
        for block in self.blocks:
            x = block(x, condition, rope, features, mask)  # B N D
        x = self.final(x, condition)  # B N (p q r C)
        return unpatchify(x, grid, self.patch)  # B C T H W
