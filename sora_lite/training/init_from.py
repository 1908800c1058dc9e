"""Starting a run from the weights of another: what fits is taken, patches of another size are resized, the rest is new.

Resuming is another thing: a run that has a checkpoint goes on from it and does not look here.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sora_lite.errors import UserError
from sora_lite.generation.export import read_weights

RECORD = "init_from.json"
"""In the run folder: the table of what became of each weight."""

_STARTS_AT_ZERO = ("embed_label.", "embed_frames.", "pool_text.")
"""Parts that add to others. Where they are new they start at zero, so that the model goes on as it was."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Row:
    """What became of one weight: `taken`, `resized`, `new` (own initialisation, or zero), or `left out`."""

    name: str
    fate: str
    why: str = ""


def start_from(folder: Path, kind: str, module: nn.Module, patch: tuple[int, ...] | None) -> list[Row]:
    """Write the weights of an export (or of a run folder that holds one) into a module; a row for each weight.

    Args:
        folder: an export in safetensors.
        kind: `vae` or `dit`.
        module: gets the weights.
        patch: of a DiT, (frames, height, width); None for a VAE.

    Raises:
        UserError: there is no such export, it is damaged, or nothing of it fits.
    """
    weights, contract = read_weights(folder, kind)
    old_patch = tuple(contract.architecture["patch"]) if patch is not None else None
    rows, state = [], module.state_dict()
    with torch.no_grad():
        for name, ours in state.items():
            theirs = weights.pop(name, None)
            rows.append(_take(name, ours, theirs, old_patch, patch))
    rows += [Row(name=name, fate="left out", why="this model has no such weight") for name in weights]
    if not any(row.fate == "taken" for row in rows):
        raise UserError(f"init_from: nothing in {folder} fits this model; give one of the same width")
    return rows


def table(rows: list[Row]) -> list[str]:
    """Lines for people: what was taken in one, all else by name."""
    taken = sum(row.fate == "taken" for row in rows)
    others = [f"  {row.fate:<9}{row.name}: {row.why}" for row in rows if row.fate != "taken"]
    return [f"init_from: {taken} of {len(rows)} weights taken as they are", *others]


def _take(
    name: str, ours: Tensor, theirs: Tensor | None, old: tuple[int, ...] | None, new: tuple[int, ...] | None
) -> Row:
    if theirs is not None and theirs.shape == ours.shape and (old == new or name not in _PATCHED):
        ours.copy_(theirs)
        return Row(name=name, fate="taken")
    if theirs is not None and old is not None and new is not None and name in _PATCHED:
        resized = _PATCHED[name](theirs, old, new)
        if resized is not None and resized.shape == ours.shape:
            ours.copy_(resized)
            return Row(name=name, fate="resized", why=f"patch {list(old)} to {list(new)}")
    why = "the export has none" if theirs is None else f"shape {list(ours.shape)}, not {list(theirs.shape)}"
    if theirs is None and name.startswith(_STARTS_AT_ZERO):
        ours.zero_()
        return Row(name=name, fate="new", why=f"{why}; starts at zero")
    return Row(name=name, fate="new", why=why)


def _interpolation(old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """The linear map that resizes one patch bilinearly, new cells x old cells, float64."""
    _, height, width = old
    unit = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    wide = nn.functional.interpolate(unit, size=new[1:], mode="bilinear", antialias=True)
    return wide.flatten(1).T


def _resize_embed(weight: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor | None:
    """D (p q r C): the tokens of resized patches stay, as far as they can (FlexiViT, arXiv 2212.08013, equation 4)."""
    if old[0] != new[0]:
        return None
    width = weight.shape[0]
    cells = weight.double().view(width, old[0], old[1] * old[2], -1)
    inverse = torch.linalg.pinv(_interpolation(old, new).T)  # new cells x old cells
    return torch.einsum("no,dpoc->dpnc", inverse, cells).reshape(width, -1).float()


def _resize_out(weight: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor | None:
    """(p q r C) ...: the predicted patch, resized bilinearly."""
    if old[0] != new[0]:
        return None
    rest = weight.shape[1:]
    channels = weight.shape[0] // (old[0] * old[1] * old[2])
    cells = weight.double().view(old[0], old[1] * old[2], channels, -1)
    return torch.einsum("no,pocr->pncr", _interpolation(old, new), cells).reshape(-1, *rest).float()


_PATCHED = {"embed.weight": _resize_embed, "final.out.weight": _resize_out, "final.out.bias": _resize_out}
"""Weights of the DiT that see single cells of a patch."""
