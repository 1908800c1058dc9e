"""Spatiotemporal causal VAE: video to latent and back.

Shapes: B batch, C latent channels, T H W frames and pixels, t h w latent frames and cells; T = time_factor * (t-1) + 1.
Pixels are floats in [-1, 1].
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from sora_lite.models.causal import ChannelNorm, Down, ResBlock, Up, per_frame


@dataclass(kw_only=True, slots=True, frozen=True)
class Posterior:
    """Diagonal Gaussian over latents, unnormalised. mean, logvar: B C t h w."""

    mean: Tensor
    logvar: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 5 or self.mean.shape != self.logvar.shape:
            raise ValueError(f"posterior of shapes {tuple(self.mean.shape)} and {tuple(self.logvar.shape)}")

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal noise of the same shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, mean over all elements (Kingma & Welling, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).mean()


class CausalVAE(nn.Module):
    """Causal 3-D VAE.

    Args:
        latent_channels: channels C of the latent.
        patch: side of the pixel squares that are folded into channels first.
        widths: channels of each level, fine to coarse.
        strides: (time, space) factors between levels, each 1 or 2.
        encoder_blocks, decoder_blocks: residual blocks of each level, fine to coarse.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        *,
        latent_channels: int,
        patch: int,
        widths: Sequence[int],
        strides: Sequence[Sequence[int]],
        encoder_blocks: Sequence[int],
        decoder_blocks: Sequence[int],
    ) -> None:
        super().__init__()
        levels = len(widths)
        if not len(strides) == levels - 1 or not len(encoder_blocks) == len(decoder_blocks) == levels:
            raise ValueError(f"{levels} widths need {levels - 1} strides and {levels} block counts on either side")
        self.latent_channels = latent_channels
        self.patch = patch
        self.time_factor = math.prod(time for time, _ in strides)
        self.space_factor = patch * math.prod(space for _, space in strides)
        pixels = 3 * patch * patch

        self.fold = nn.Conv2d(pixels, widths[0], 3, padding=1)
        encoder: list[nn.Module] = []
        for level, width in enumerate(widths):
            encoder += [ResBlock(width) for _ in range(encoder_blocks[level])]
            if level < levels - 1:
                time, space = strides[level]
                encoder.append(Down(width, widths[level + 1], time=time, space=space))
        self.encoder = nn.Sequential(*encoder, ChannelNorm(widths[-1]))
        self.to_posterior = nn.Conv2d(widths[-1], 2 * latent_channels, 1)

        self.from_latent = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        decoder: list[nn.Module] = []
        for level, width in reversed(list(enumerate(widths))):
            if level < levels - 1:
                time, space = strides[level]
                decoder.append(Up(widths[level + 1], width, time=time, space=space))
            decoder += [ResBlock(width) for _ in range(decoder_blocks[level])]
        self.decoder = nn.Sequential(*decoder, ChannelNorm(widths[0]))
        self.unfold = nn.Conv2d(widths[0], pixels, 3, padding=1)

        # Statistics of the training set's latents, set once when training ends; they travel with the weights.
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks, whose activations are most of the memory."""
        return [module for module in self.modules() if isinstance(module, ResBlock)]

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent shape (C, t, h, w) of a clip.

        Raises:
            ValueError: the clip's size is no multiple of the compression (frames: a multiple plus one).
        """
        if (frames - 1) % self.time_factor or height % self.space_factor or width % self.space_factor:
            raise ValueError(
                f"a clip of {frames} frames, {height}x{width} does not fit a VAE of {self.time_factor}k+1 frames "
                f"and sides in multiples of {self.space_factor}"
            )
        cells = (height // self.space_factor, width // self.space_factor)
        return (self.latent_channels, (frames - 1) // self.time_factor + 1, *cells)

    def encode(self, video: Tensor) -> Posterior:
        """video: B 3 T H W in [-1, 1]. The posterior is unnormalised."""
        p = self.patch
        x = rearrange(video, "b c t (h p) (w q) -> b t (c p q) h w", p=p, q=p)
        x = per_frame(self.fold, x)
        x = self.encoder(x)
        mean, logvar = per_frame(self.to_posterior, x).transpose(1, 2).chunk(2, dim=1)  # B C t h w
        # Bounded, so that an early step cannot overflow exp().
        return Posterior(mean=mean, logvar=logvar.clamp(-20, 10))

    def decode(self, latent: Tensor) -> Tensor:
        """latent: B C t h w, unnormalised. Returns B 3 T H W, about [-1, 1], not clamped."""
        x = per_frame(self.from_latent, latent.transpose(1, 2))  # B t D h w
        x = self.decoder(x)  # B T D' H/p W/p
        x = per_frame(self.unfold, x)
        p = self.patch
        return rearrange(x, "b t (c p q) h w -> b c t (h p) (w q)", p=p, q=p)

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What training needs: (reconstruction B 3 T H W, posterior mean and logvar, each B C t h w).

        noise: B C t h w, standard normal.
        """
        posterior = self.encode(video)
        return self.decode(posterior.sample(noise)), posterior.mean, posterior.logvar

    def normalize(self, latent: Tensor) -> Tensor:
        """Unnormalised latent to zero mean and unit variance per channel: what the DiT sees. B C t h w."""
        return (latent - self._channel(self.latent_mean)) / self._channel(self.latent_std)

    def denormalize(self, latent: Tensor) -> Tensor:
        """Inverse of `normalize`. B C t h w."""
        return latent * self._channel(self.latent_std) + self._channel(self.latent_mean)

    @staticmethod
    def _channel(statistic: Tensor) -> Tensor:
        return statistic.view(1, -1, 1, 1, 1)

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and values of all weights and statistics: what a DiT was trained against."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
