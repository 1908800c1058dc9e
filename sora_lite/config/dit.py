"""Architecture of the video Diffusion Transformer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Positions(StrEnum):
    """How a token knows its place: rotary positions over (t, h, w), or fixed sines and cosines added to the tokens."""

    rope = "rope"
    sincos = "sincos"


class Attention(StrEnum):
    """Which tokens attend to each other: all; or in turn those of a frame and those of a place (Latte)."""

    full = "full"
    factorised = "factorised"


class QKNorm(StrEnum):
    """What the root mean square norm of queries and keys spans: a head, the full width (Wan), or nothing."""

    head = "head"
    full = "full"
    none = "none"


class Modulation(StrEnum):
    """adaLN-Zero with a layer in each block, or one shared layer with offsets in each block (PixArt, Wan)."""

    per_block = "per_block"
    shared = "shared"


class Gelu(StrEnum):
    """Exact GELU, or its tanh form (the paper, Wan), which is 4 times slower on CPUs."""

    erf = "erf"
    tanh = "tanh"


class TextAttention(StrEnum):
    """Text is read by cross-attention, or goes along with the video tokens in joint blocks (MMDiT)."""

    cross = "cross"
    joint = "joint"


@dataclass(kw_only=True, slots=True)
class TextConfig:
    """Byte-level text encoder that is trained along with the DiT."""

    width: int = 128
    """Width of the encoder."""
    depth: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    max_bytes: int = 128
    """Longest prompt in UTF-8 bytes; longer ones are cut."""


@dataclass(kw_only=True, slots=True)
class DiTConfig:
    """Architecture of the video Diffusion Transformer. Part of every DiT checkpoint."""

    width: int = 384
    """Token width D."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 6
    """Attention heads; width / heads must be even and at least 6."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP, in token widths."""
    patch: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Latent cells (frames, height, width) in one token."""
    positions: Positions = Positions.rope
    """Rotary, or fixed sines and cosines: 2-D for a still image, 3-D for more frames."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    attention: Attention = Attention.full
    """Over all tokens, or factorised into frames and time."""
    qk_norm: QKNorm = QKNorm.head
    """Norm of queries and keys."""
    modulation: Modulation = Modulation.per_block
    """Where the layer is that turns time, label and pooled text into shifts, scales and gates."""
    gelu: Gelu = Gelu.erf
    """Activation of the MLPs."""
    num_classes: int = 0
    """Number of class labels; 0 for a model without labels."""
    text: TextConfig | None = field(default_factory=TextConfig)
    """Encoder over bytes, trained along; null for a model without it."""
    text_features: int = 0
    """Width of the features of the frozen text encoder `text_from` (T5: 4096), read instead of bytes; 0 for none."""
    text_tokens: int = 512
    """Tokens of its longest text; longer ones are cut."""
    pad_text: bool = False
    """Pad its texts with zeros to `text_tokens`, which are attended to (Wan); otherwise padding is masked."""
    text_attention: TextAttention = TextAttention.cross
    """How blocks read text."""
    cross_norm: bool = True
    """A layer norm before the cross-attention to text."""
    pooled_features: int = 0
    """Width of the pooled features of `pooled_from`, a CLIP (768), that join time and label; 0 for none."""
    learn_variance: bool = False
    """Predict twice the channels: the second half is the variance of the reverse step (with diffusion=ddpm)."""
    frame_conditions: bool = False
    """Read given frames: image to video, extension, interpolation."""
    time_frequencies: int = 128
    """Frequencies over which a time embedding falls to 1/10000: 128; 127 in diffusers' DiTTransformer2DModel."""


def unread(architecture: Mapping[str, Any]) -> set[str]:
    """Settings of a DiT that do nothing, whatever they are, since others leave them no part."""
    features = architecture["text_features"] or architecture["pooled_features"]
    text = architecture["text"] is not None or architecture["text_features"]
    idle = {
        "text_tokens": not features,
        "rope_theta": architecture["positions"] != "rope",
        "cross_norm": not text or architecture["text_attention"] == "joint",
    }
    return {name for name, is_idle in idle.items() if is_idle}
