"""The smallest inputs of training, which many tests share through the fixture `tiny`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(kw_only=True, frozen=True)
class Tiny:
    """The smallest input that training takes. Read only: a test that damages it works on a copy."""

    shards: Path
    """48 moving digits in two splits."""
    vae: Path
    """Export of a VAE that is not trained, but whose statistics are those of its latents."""


def make_vae(folder: Path, shards: Path, *, seed: int) -> Path:
    """Export an untrained VAE of experiment tiny_vae into a folder, without the cost of a training run."""
    import numpy as np
    import torch

    from sora_lite.cli.compose import compose
    from sora_lite.data.index import Index
    from sora_lite.data.loader import ClipReader
    from sora_lite.generation import export
    from sora_lite.generation.pipeline import to_float
    from sora_lite.models.vae import CausalVAE

    torch.manual_seed(seed)
    architecture = asdict(compose("train_vae", ["experiment=tiny_vae", f"data.shards={shards}"]).vae)
    vae = CausalVAE(**architecture)
    reader = ClipReader(Index.load(shards, "train"), cache_bytes=0)
    clips = np.stack([reader.read(sample, (17, 32, 32)).frames for sample in range(16)])
    with torch.no_grad():
        posterior = vae.encode(to_float(torch.from_numpy(clips).permute(0, 4, 1, 2, 3)))
        variance, mean = torch.var_mean(posterior.mean, (0, 2, 3, 4))
        vae.latent_mean.copy_(mean)
        vae.latent_std.copy_((variance + posterior.logvar.exp().mean((0, 2, 3, 4))).sqrt())
    contract = export.Contract(
        kind="vae",
        architecture=architecture,
        run="vae",
        step=0,
        weights="raw",
        clip=[17, 32, 32],
        fps=0.0,
        vae_fingerprint=vae.fingerprint(),
    )
    export.write(folder, contract, vae.state_dict())
    return folder


class Plain:
    """A model as an objective calls it, without an engine."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)


def call(*argv: str) -> int:
    """`sora-lite` in this process, as often as a test likes. Returns the exit status."""
    from sora_lite.cli import main

    return main(list(argv))
