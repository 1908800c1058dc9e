"""The causal VAE: its architecture and its loss."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class VAEConfig:
    """Architecture of the causal spatiotemporal VAE. Part of every VAE checkpoint."""

    latent_channels: int = 16
    """Channels of the latent."""
    patch: int = 2
    """Pixels of a side that are folded into channels before the first convolution (space to depth)."""
    widths: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Channels of each level, from fine to coarse."""
    strides: list[list[int]] = field(default_factory=lambda: [[2, 2], [2, 2]])
    """[time, space] factors (1 or 2) between one level and the next; with two 2s in time, T = 4k+1."""
    encoder_blocks: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Residual blocks of each level in the encoder, fine to coarse."""
    decoder_blocks: list[int] = field(default_factory=lambda: [2, 3, 3])
    """Residual blocks of each level in the decoder, fine to coarse."""


@dataclass(kw_only=True, slots=True)
class VAELossConfig:
    """Weights of the VAE's loss terms."""

    l1: float = 1.0
    """Mean absolute error of the pixels in [-1, 1]."""
    mse: float = 0.0
    """Mean squared error of the pixels in [-1, 1]."""
    kl: float = 1e-6
    """Kullback-Leibler divergence from the standard normal, mean over the latent's elements."""
