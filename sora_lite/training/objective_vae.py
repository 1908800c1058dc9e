"""Training the VAE: reconstruction and divergence, then the statistics of its latents.

Shapes: B batch, C latent channels, T H W frames and pixels, t h w latent frames and cells.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sora_lite.config import VAEConfig, VAELossConfig
from sora_lite.data.batch import ClipBatch
from sora_lite.data.order import hash_seed
from sora_lite.errors import UserError
from sora_lite.evaluation.page import contact_sheet
from sora_lite.generation.pipeline import seeded_normal, to_float, to_uint8
from sora_lite.models.vae import CausalVAE, Posterior
from sora_lite.parallel.env import Rank
from sora_lite.training.engine import Engine
from sora_lite.training.metrics import Means, count_flops
from sora_lite.training.objective import HeldOut, Loss


class VAEObjective:
    """L1 and squared error of the pixels in [-1, 1], and the divergence of the posterior from a standard normal.

    Further terms (perceptual, adversarial) join in `loss`.
    """

    name = "vae"

    def __init__(self, vae: VAEConfig, weights: VAELossConfig, *, seed: int, rank: Rank) -> None:
        self.config, self.weights, self.seed, self.rank = vae, weights, seed, rank
        self.module: nn.Module = CausalVAE(**asdict(vae))

    def _vae(self, engine: Engine) -> CausalVAE:
        assert isinstance(engine.module, CausalVAE)
        return engine.module

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Latent cells."""
        assert isinstance(self.module, CausalVAE)
        _, t, h, w = self.module.latent_shape(frames, height, width)
        return t * h * w

    def flops(self, frames: int, height: int, width: int) -> int:
        with torch.device("meta"):
            vae = CausalVAE(**asdict(self.config))
            video = torch.empty(1, 3, frames, height, width)
            noise = torch.empty(1, *vae.latent_shape(frames, height, width))
        return count_flops(lambda: vae(video, noise))

    def cost(self, frames: int, height: int, width: int) -> float:
        """FLOPs of a forward and a backward pass, which is two of it."""
        return 3 * self.flops(frames, height, width)

    def loss(self, engine: Engine, batch: ClipBatch) -> Loss:
        vae = self._vae(engine)
        video = to_float(batch.video.to(self.rank.device, non_blocking=True))  # B 3 T H W
        shape = vae.latent_shape(video.shape[2], video.shape[3], video.shape[4])
        seeds = [hash_seed(self.seed, batch.step, int(p), "posterior") for p in batch.positions]
        noise = seeded_normal(shape, seeds, self.rank.device)
        dtype = next(vae.parameters()).dtype
        reconstruction, mean, logvar = engine(video.to(dtype), noise.to(dtype))
        error = reconstruction.float() - video
        l1, mse = error.abs().mean(), error.square().mean()
        kl = Posterior(mean=mean.float(), logvar=logvar.float()).kl()
        loss = self.weights.l1 * l1 + self.weights.mse * mse + self.weights.kl * kl
        with torch.no_grad():
            clip_l1, clip_mse = error.abs().flatten(1).mean(1), error.square().flatten(1).mean(1)  # each B
            each = self.weights.l1 * clip_l1 + self.weights.mse * clip_mse + self.weights.kl * kl
        return Loss(
            loss=loss, each=each, parts={"l1": (l1.detach(), 1.0), "mse": (mse.detach(), 1.0), "kl": (kl.detach(), 1.0)}
        )

    def validate(self, engine: Engine, held_out: HeldOut) -> dict[str, float]:
        """Reconstruction of held-out clips from the posterior mean: PSNR in dB, mean over clips, and L1."""
        means = Means(self.rank)
        for batch, weights in held_out.batches():
            original, decoded = self._reconstruct(engine, batch.video)
            # Over the pixels as they are stored, 8 bits, peak 1.
            error = (decoded.float() - original.float()) / 255
            mse = error.square().flatten(1).mean(1).clamp_min(1e-10)
            for weight, clip_mse, clip_l1 in zip(weights, mse, error.abs().flatten(1).mean(1), strict=True):
                means.add("val_psnr_db", float(-10 * clip_mse.log10()), weight)
                means.add("val_loss", 2 * float(clip_l1), weight)
        return means.read()

    def _reconstruct(self, engine: Engine, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(original, reconstruction from the posterior mean), both uint8 B 3 T H W."""
        vae = self._vae(engine)
        video = video.to(self.rank.device)
        shape = vae.latent_shape(video.shape[2], video.shape[3], video.shape[4])
        dtype = next(vae.parameters()).dtype
        # Without noise the sample is the mean; through `engine`, which gathers weights under ZeRO-3.
        zero = torch.zeros(len(video), *shape, device=self.rank.device, dtype=dtype)
        decoded, _, _ = engine(to_float(video).to(dtype), zero)
        return video, to_uint8(decoded)

    def sample(self, engine: Engine, held_out: HeldOut, path: Path) -> None:
        """Held-out clips above their reconstructions."""
        batch, _ = held_out.batches()[0]
        original, decoded = self._reconstruct(engine, batch.video[:4])
        if self.rank.is_main:
            rows, captions = [], []
            for i, caption in enumerate(batch.captions[:4]):
                for source, name in ((original, "real"), (decoded, "reconstruction")):
                    rows.append(source[i].permute(1, 2, 3, 0).cpu().numpy())
                    captions.append(f"{name}: {caption}")
            contact_sheet(rows, captions).save(path)

    def finish(self, engine: Engine, training: HeldOut) -> None:
        """Mean and standard deviation of each latent channel over training clips, into the VAE's own buffers."""
        vae = self._vae(engine)
        channels = vae.latent_channels
        total = torch.zeros(3, channels, dtype=torch.float64)
        for batch, weights in training.batches():
            video = batch.video
            dtype = next(vae.parameters()).dtype
            shape = vae.latent_shape(video.shape[2], video.shape[3], video.shape[4])
            zero = torch.zeros(len(video), *shape, device=self.rank.device, dtype=dtype)
            _, mean, logvar = engine(to_float(video.to(self.rank.device)).to(dtype), zero)
            weight = torch.from_numpy(weights).view(-1, 1, 1, 1, 1)
            mean, variance = mean.double().cpu(), logvar.double().exp().cpu()
            total[0] += (weight * torch.ones_like(mean)).sum((0, 2, 3, 4))
            total[1] += (weight * mean).sum((0, 2, 3, 4))
            total[2] += (weight * (mean.square() + variance)).sum((0, 2, 3, 4))
        count, first, second = self.rank.sum(total)
        if not count.all():
            raise UserError(
                "data.shards: none of the clips that the statistics of latents are taken of can be read; "
                "`sora-data verify` says which shards are damaged"
            )
        mean = first / count
        vae.latent_mean.copy_(mean)
        vae.latent_std.copy_((second / count - mean.square()).clamp_min(1e-12).sqrt())

    def frozen(self) -> dict[str, torch.Tensor]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"vae": asdict(self.config)}

    def inputs(self) -> dict[str, str]:
        return {}
