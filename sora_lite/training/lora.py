"""Adapters that are trained in place of a model's weights, and the base that they stand on.

The base is frozen: it is in no checkpoint, and comes from `init_from` again at every start. So that adapters never meet
another one, its SHA-256 belongs to the run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sora_lite.config import LoraConfig, unread
from sora_lite.errors import UserError
from sora_lite.generation.export import read_weights
from sora_lite.models.lora import Adapters, linear_layers


@dataclass(kw_only=True, slots=True, frozen=True)
class Adapted:
    """What stands beside the adapters' weights in a checkpoint.

    init_from: the base, as the setting names it. sha256: of the base's weights. parameters: how many it has.
    adapters: their layers, rank and scale.
    """

    init_from: str
    sha256: str
    parameters: int
    adapters: Adapters


def adapt(module: nn.Module, architecture: dict[str, Any], lora: LoraConfig, init_from: str) -> Adapted:
    """Give a DiT the weights of an export and freeze them, with new adapters on them.

    Args:
        module: a plain `VideoDiT`.
        architecture: its arguments.
        lora: rank, scale and layers.
        init_from: an export or import, or a run folder that holds one.

    Raises:
        UserError: the export is missing, damaged, or of another architecture; or no layer is called as configured.
    """
    weights, contract = read_weights(Path(init_from), "dit")
    try:
        layers = linear_layers(module, lora.targets)
    except ValueError as error:
        raise UserError(f"lora.targets: {error}") from error
    full = max(min(module.get_parameter(f"{name}.weight").shape) for name in layers)
    if lora.rank > full:
        raise UserError(
            f"lora.rank: {lora.rank} is above the full rank of every layer, at most {full}; take less, such as 16"
        )
    for name, ours in architecture.items():
        theirs = contract.architecture.get(name, ours)
        # The width of the MLPs is a shape, which is compared below; its ratio may be rounded.
        if ours != theirs and name not in ("mlp_ratio", *unread(architecture)):
            raise UserError(
                f"init_from: adapters need the very model of {init_from}, whose {name} is {theirs}, not {ours}; "
                f"give the `model` of that one"
            )
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise UserError(f"init_from: adapters need the very model of {init_from}; {why}") from error
    adapters = Adapters(rank=lora.rank, alpha=lora.alpha or float(lora.rank), layers=layers)
    adapters.inject(module)
    count = sum(weight.numel() for weight in weights.values())
    return Adapted(init_from=init_from, sha256=contract.sha256, parameters=count, adapters=adapters)


def describe(adapted: Adapted, trained: Mapping[str, tuple[int, ...]]) -> str:
    """A line for people. trained: shapes of the parameters that train."""
    count, adapters = sum(map(math.prod, trained.values())), adapted.adapters
    return (
        f"lora: {count:,} parameters train, beside {adapted.parameters:,} frozen ones of {adapted.init_from}: "
        f"rank {adapters.rank} on {len(adapters.layers)} linear layers"
    )
