"""Text for the DiT: features of a frozen encoder, or a small encoder over bytes, which is trained along with the DiT
and needs no vocabulary and no download and reads any language.

Shapes: B batch, M tokens of a batch (its longest prompt plus one), D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_lite.models.layers import MLP, SelfAttention

PAD, BEGIN = 0, 1
_FIRST_BYTE = 2


def tokenize(prompts: Sequence[str], max_bytes: int) -> Tensor:
    """UTF-8 bytes as token ids, padded to the batch's longest. Returns int64 B M.

    Every row starts with BEGIN, so the empty prompt is BEGIN alone: that is "no text", the null condition.
    """
    rows = [[BEGIN] + [_FIRST_BYTE + byte for byte in prompt.encode()[:max_bytes]] for prompt in prompts]
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


class ByteTextEncoder(nn.Module):
    """Pre-norm transformer over bytes with learned positions.

    A convolution over five neighbouring bytes comes first: it spells, so that words are found wherever they stand.

    Args:
        width, depth, heads: of the transformer.
        max_bytes: longest prompt; `tokenize` must be called with the same.
    """

    def __init__(self, *, width: int, depth: int, heads: int, max_bytes: int) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.width = width
        self.token_embedding = nn.Embedding(_FIRST_BYTE + 256, width)
        self.position_embedding = nn.Embedding(max_bytes + 1, width)
        self.spell = nn.Conv1d(width, width, 5, padding=2)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: B M. Returns (features B M D, mask B M, True where a token is real)."""
        mask = tokens != PAD  # B M
        # Padding is zero before the convolution, so that it is the same as the end of the tensor.
        x = self.token_embedding(tokens) * mask.unsqueeze(-1)  # B M D
        x = x + F.gelu(self.spell(x.transpose(1, 2)).transpose(1, 2))  # B M D
        x = x + self.position_embedding.weight[: tokens.shape[1]]  # B M D
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return self.norm(x), mask


class TextProjection(nn.Module):
    """Features of a frozen text encoder, brought to the width of the DiT by two layers (PixArt, Wan).

    Args:
        features: width C of the encoder's features.
        width: width D of the DiT.
        tokens: of the longest text.
        pad: as Wan was trained: a text with a mask is padded with zeros to so many tokens, which are attended to.
            Otherwise padding is masked.
    """

    def __init__(self, features: int, width: int, *, tokens: int, pad: bool = False) -> None:
        super().__init__()
        self.features, self.tokens, self.pad = features, tokens, pad
        self.mlp = MLP(features, width, width, gelu="tanh")

    def forward(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """text: B M C; mask: B M, True where a token is real, None for all. Returns (B M' D, mask B M' or None).

        Where no token is real, one of zeros stands for "no text"; what that is to the DiT is learned by the biases.

        Raises:
            ValueError: there are more than `tokens`, or they have another width.
        """
        if text.shape[-1] != self.features:
            raise ValueError(f"text features are {text.shape[-1]} wide; the model reads {self.features}")
        if text.shape[1] > self.tokens:
            raise ValueError(f"a text has {text.shape[1]} tokens; the model reads at most {self.tokens}")
        if mask is None:
            return self.mlp(text), None
        if not text.shape[1]:  # no token at all is "no text", too
            text, mask = F.pad(text, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        text = text.masked_fill(~mask.unsqueeze(-1), 0)  # B M C
        if not self.pad:
            nothing = F.pad(~mask.any(1, keepdim=True), (0, mask.shape[1] - 1))  # B M, only ever the first
            return self.mlp(text), mask | nothing
        return self.mlp(F.pad(text, (0, 0, 0, self.tokens - text.shape[1]))), None


class TextBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x), mask=mask)
        return x + self.mlp(self.norm_mlp(x))
