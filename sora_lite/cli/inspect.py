"""`sora-lite inspect`: size and work of a model, on the meta device."""

import json
from dataclasses import asdict

import torch

from sora_lite.config import Format, InspectConfig
from sora_lite.errors import UserError
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.patch import token_grid
from sora_lite.training.metrics import count_flops


def main(config: InspectConfig) -> None:
    """Print the table or its JSON."""
    facts = inspect_model(config)
    if config.format is Format.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:<12}{value:>18,}" if isinstance(value, int) else f"{name:<12}{value:>18,.3f}")


def inspect_model(config: InspectConfig) -> dict[str, int | float]:
    """parameters; tokens per clip; gflops: multiply-adds of one forward pass of one clip, in 1e9."""
    channels, *cells = config.latent
    if len(cells) != 3:
        raise UserError(f"latent: must be [channels, frames, height, width], not {config.latent}")
    p, q, r = config.model.patch
    try:
        t, h, w = token_grid((cells[0], cells[1], cells[2]), (p, q, r))
    except ValueError as error:
        raise UserError(f"latent: {error}") from error
    with torch.device("meta"):
        dit = VideoDiT(channels=channels, **asdict(config.model))
        latent, time = torch.empty(1, channels, *cells), torch.empty(1)
        text = torch.ones(1, (config.model.text.max_bytes if config.model.text else 0) + 1, dtype=torch.int64)
        conditions = Conditions(labels=torch.zeros(1, dtype=torch.int64), text=text)
    flops = count_flops(lambda: dit(latent, time, conditions))
    return {
        "parameters": sum(parameter.numel() for parameter in dit.parameters()),
        "tokens": t * h * w,
        "gflops": flops / 2 / 1e9,
    }
