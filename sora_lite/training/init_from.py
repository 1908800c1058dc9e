"""Starting a run from the weights of another: what fits is taken, patches of another size are resized, the rest is new.

Resuming is another thing: a run that has a checkpoint goes on from it and does not look here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sora_lite.config import unread
from sora_lite.diffusion.process import Process
from sora_lite.errors import UserError
from sora_lite.generation.export import Contract, read_weights

RECORD = "init_from.json"
"""In the run folder: the table of what became of each weight."""

_ADDED = r"embed_label\.|embed_frames\.|pool_text\.(2\.)?(weight|bias)$"
"""Parts that add to others: of each the last layer, since behind two layers of zeros nothing would ever be learned.
Where they are new they start at zero, so that the model goes on as it was."""
_ADDED_BY_BLOCKS = r"|blocks\.\d+\.(video\.|text\.)?(attention\.out|mlp\.2)\."
"""The same of blocks whose gates are open from the start, since their modulation is that of all blocks. Blocks with a
modulation of their own start with closed gates."""

_TEXT_MODULATION = re.compile(r"\.text\.modulation\.")
"""Of a joint block. Its first two parts of six are all that the last block has of it."""

_MEANING = {
    "model": ("heads", "positions", "rope_theta", "attention", "gelu", "time_frequencies", "text_tokens", "pad_text"),
    "diffusion": ("objective", "noise_schedule", "zero_terminal_snr", "shift", "shift_by"),
}
"""Arguments of `VideoDiT` and `Process` by which weights mean something else while their names and shapes stay."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Row:
    """What became of one weight: `taken`, `resized`, `new` (own initialisation, or zero), or `left out`; or a setting
    that `differs`."""

    name: str
    fate: str
    why: str = ""


def start_from(folder: Path, kind: str, module: nn.Module, state: Mapping[str, Any] | None = None) -> list[Row]:
    """Write the weights of an export (or of a run folder that holds one) into a module; a row for each weight.

    Args:
        folder: an export in safetensors.
        kind: `vae` or `dit`.
        module: gets the weights.
        state: of a DiT, what its checkpoints say of it (`DiTObjective.state`).

    Raises:
        UserError: there is no such export, it is damaged, or nothing of it fits.
    """
    weights, contract = read_weights(folder, kind)
    at_zero = _ADDED + (_ADDED_BY_BLOCKS if "modulation.linear.weight" in weights else "")
    old = new = None
    same_width = False
    if state is not None:
        same_width = contract.architecture["width"] == state["model"]["width"]
        old, new = tuple(contract.architecture["patch"]), tuple(state["model"]["patch"])
    rows, tensors = [], module.state_dict()
    with torch.no_grad():
        for name, ours in tensors.items():
            theirs = weights.pop(name, None)
            if same_width and theirs is not None and len(theirs) != len(ours) and _TEXT_MODULATION.search(name):
                parts = min(len(theirs), len(ours))
                ours[:parts].copy_(theirs[:parts])
                rows.append(Row(name=name, fate="resized", why="a last block's text has 2 of the 6 parts of others'"))
                continue
            rows.append(_take(name, ours, theirs, old, new))
            if rows[-1].fate == "new" and re.match(at_zero, name):
                ours.zero_()
                rows[-1] = replace(rows[-1], why=f"{rows[-1].why}; starts at zero")
    # Vectors alone fit by chance, such as the bias of the last layer.
    if not any(row.fate == "taken" and tensors[row.name].ndim > 1 for row in rows):
        raise UserError(f"init_from: nothing in {folder} fits this model; give one of the same width")
    rows += [Row(name=name, fate="left out", why="this model has no such weight") for name in weights]
    return rows if state is None else rows + differences(contract, state)


def differences(contract: Contract, state: Mapping[str, Any]) -> list[Row]:
    """A row for each thing that changes what a DiT's weights mean, or what they see, and is another than the export's.

    state: of `DiTObjective.state`.
    """
    theirs = {"model": contract.architecture, "diffusion": asdict(Process(**contract.diffusion))}
    pairs = {
        f"{group}.{key}": (theirs[group][key], state[group][key])
        for group, keys in _MEANING.items()
        for key in keys
        if key not in unread(state["model"])
    }
    pairs["vae_from"] = contract.vae_fingerprint, state["vae_fingerprint"]
    for key, encoder in contract.text_encoders.items():
        if key in state["text_encoders"]:
            pairs[key] = encoder["fingerprint"], state["text_encoders"][key]["fingerprint"]
    return [
        Row(name=name, fate="differs", why=f"{str(there)[:16]} of the export, {str(here)[:16]} here")
        for name, (there, here) in pairs.items()
        if there != here
    ]


def table(rows: list[Row]) -> list[str]:
    """Lines for people: what was taken in one, all else by name."""
    taken, settings = (sum(row.fate == fate for row in rows) for fate in ("taken", "differs"))
    return [f"init_from: {taken} of {len(rows) - settings} weights taken as they are", *by_name(rows)]


def by_name(rows: list[Row]) -> list[str]:
    """A line for all that is not taken as it is."""
    return [f"  {row.fate:<9}{row.name}: {row.why}" for row in rows if row.fate != "taken"]


def _take(
    name: str, ours: Tensor, theirs: Tensor | None, old: tuple[int, ...] | None, new: tuple[int, ...] | None
) -> Row:
    if theirs is not None and theirs.shape == ours.shape and (old == new or name not in _PATCHED):
        ours.copy_(theirs)
        return Row(name=name, fate="taken")
    if theirs is not None and old is not None and new is not None and name in _PATCHED:
        resized = _PATCHED[name](theirs, old, new)
        if resized.shape == ours.shape:
            ours.copy_(resized)
            return Row(name=name, fate="resized", why=f"patch {list(old)} to {list(new)}")
    why = "the export has none" if theirs is None else f"shape {list(ours.shape)}, not {list(theirs.shape)}"
    return Row(name=name, fate="new", why=why)


def _interpolation(old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """The linear map that resizes one patch along each of its axes linearly, new cells x old cells, float64."""

    def along(before: int, after: int) -> Tensor:  # after x before
        unit = torch.eye(before, dtype=torch.float64).view(before, 1, 1, before)
        return nn.functional.interpolate(unit, size=(1, after), mode="bilinear", antialias=True).flatten(1).T

    axes = [along(before, after) for before, after in zip(old, new, strict=True)]
    return torch.einsum("pt,qh,rw->pqrthw", *axes).reshape(math.prod(new), math.prod(old))


def _resize_in(weight: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """D (p q r C): the tokens of resized patches stay, as far as they can (FlexiViT, arXiv 2212.08013, equation 4)."""
    cells = weight.double().unflatten(1, (math.prod(old), -1))
    inverse = torch.linalg.pinv(_interpolation(old, new).T)  # new cells x old cells
    return torch.einsum("no,doc->dnc", inverse, cells).flatten(1).float()


def _resize_out(weight: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """(p q r C) ...: the predicted patch, resized linearly."""
    cells = weight.double().unflatten(0, (math.prod(old), -1))
    return torch.einsum("no,oc...->nc...", _interpolation(old, new), cells).flatten(0, 1).float()


_PATCHED = {
    "embed.weight": _resize_in,
    "embed_frames.weight": _resize_in,
    "final.out.weight": _resize_out,
    "final.out.bias": _resize_out,
}
"""Weights of the DiT that see single cells of a patch."""
