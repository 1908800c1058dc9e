"""`sora-lite inspect`: size, work and memory of a model, on the meta device."""

import json
from dataclasses import asdict

import torch
from torch import Tensor, nn

from sora_lite.config import DiTConfig, Format, InspectConfig, Precision
from sora_lite.errors import UserError
from sora_lite.models.dit import VideoDiT
from sora_lite.models.layers import InnerAttention
from sora_lite.models.patch import token_grid
from sora_lite.training.metrics import count_flops

IMAGE, VIDEO = [4, 1, 32, 32], [16, 5, 32, 32]
"""Latents that are looked at where none is named."""
ASSUMED = (
    "memory assumes one process without sharding, AdamW with fp32 master weights and moments, fp32 gradients and "
    "averaged weights, attention that keeps no scores (as on GPUs), and no activation checkpointing"
)


def main(config: InspectConfig) -> None:
    """Print the table or its JSON."""
    facts = inspect_model(config)
    if config.format is Format.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if name.endswith("_bytes"):
            print(f"{name.removesuffix('_bytes'):<24}{value / 2**30:>18,.3f} GiB")
        else:
            print(f"{name:<24}{value:>18,}" if isinstance(value, int) else f"{name:<24}{value:>18,.3f}")
    print(f"for one clip of latent {config.latent or latent_of(config.model)}, in {config.precision.name}; {ASSUMED}")


def latent_of(model: DiTConfig) -> list[int]:
    """Channels, frames, height and width of the latent for which a model was made."""
    image = model.num_classes > 0 and model.text is None and not (model.text_features or model.pooled_features)
    return IMAGE if image else VIDEO


def inspect_model(config: InspectConfig) -> dict[str, int | float]:
    """parameters; tokens per clip; gflops: multiply-adds of one forward pass of one clip, in 1e9; memory in bytes."""
    channels, *cells = config.latent or latent_of(config.model)
    p, q, r = config.model.patch
    try:
        t, h, w = token_grid((cells[0], cells[1], cells[2]), (p, q, r))
    except ValueError as error:
        raise UserError(f"latent: {error}") from error
    dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
    with torch.device("meta"):
        dit = VideoDiT(channels=channels, **asdict(config.model)).to(dtype)
        latent, time = torch.empty(1, channels, *cells, dtype=dtype), torch.empty(1)
    flops = count_flops(lambda: dit(latent, time, dit.no_conditions(1)))
    parameters = sum(parameter.numel() for parameter in dit.parameters())
    return {
        "parameters": parameters,
        "tokens": t * h * w,
        "gflops": flops / 2 / 1e9,
        # In fp32 the weights are their own master.
        "weights_bytes": parameters * dtype.itemsize,
        "gradients_bytes": parameters * 4,
        "optimizer_bytes": parameters * (12 if dtype is torch.bfloat16 else 8),
        "averaged_weights_bytes": parameters * 4,
        "activations_per_clip_bytes": activation_bytes(dit, latent, time),
    }


class _Kept(torch.autograd.Function):
    """What an attention that keeps no scores keeps for its backward pass: queries, keys, values and its result."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class _FlashAttention(nn.Module):
    """Stands for `InnerAttention` when memory is counted."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return _Kept.apply(q, k, v)


def activation_bytes(dit: VideoDiT, latent: Tensor, time: Tensor) -> int:
    """Bytes that autograd keeps of one forward pass besides the weights. Changes the model."""
    for module in dit.modules():
        for name, child in module.named_children():
            if isinstance(child, InnerAttention):
                setattr(module, name, _FlashAttention())
    weights = {parameter.untyped_storage()._cdata for parameter in dit.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = dit(latent, time, dit.no_conditions(1))
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
