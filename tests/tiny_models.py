"""The smallest DiTs to start from: one of this project, and one that diffusers has saved."""

from dataclasses import asdict
from pathlib import Path

import torch
from tiny_inputs import Tiny
from torch import nn


def make_dit(folder: Path, tiny: Tiny, *, seed: int) -> Path:
    """Export a DiT of experiment tiny with random weights throughout, so that all of it matters."""
    from sora_lite.cli.compose import compose
    from sora_lite.generation import export
    from sora_lite.models.dit import VideoDiT

    vae, vae_contract = export.load_vae(tiny.vae)
    model = compose("train", ["experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}"]).model
    architecture = {"channels": vae.latent_channels, **asdict(model)}
    torch.manual_seed(seed)
    dit = VideoDiT(**architecture)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    contract = export.Contract(
        kind="dit", architecture=architecture, run="base", step=0, weights="raw", clip=[17, 32, 32], fps=0.0,
        vae_fingerprint=vae.fingerprint(), diffusion={"objective": "rectified_flow"},
    )  # fmt: skip
    export.write(folder / "vae", vae_contract, vae.state_dict())
    export.write(folder, contract, dit.state_dict())
    return folder


WAN = [
    "model=wan_1_3b", "model.width=24", "model.depth=2", "model.heads=2", "model.mlp_ratio=1.66667",
    "model.text_features=16",
]  # fmt: skip
"""Settings of `tiny_wan(text=16)`."""


def tiny_wan(channels: int = 4, text: int = 10) -> nn.Module:
    """diffusers' Wan with random weights throughout: 2 blocks, width 24. text: width of its features."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels, text_dim=text,
        ffn_dim=40, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
