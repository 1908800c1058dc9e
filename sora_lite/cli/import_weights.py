"""`sora-lite import`: weights that others published, as an export of this project.

The one place that opens a `.pt` file: of the paper's code, and only its tensors.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_lite.config import ImportConfig
from sora_lite.errors import UserError
from sora_lite.generation import export as exports
from sora_lite.generation.layouts import imported, read_folder
from sora_lite.models.adapters import check_positions, paper_architecture, paper_entries, to_ours
from sora_lite.models.dit import VideoDiT


def main(config: ImportConfig) -> None:
    """Import and say what it is and where it lies."""
    source = Path(config.weights_from)
    if source.is_dir() and config.heads is not None:
        raise UserError(f"heads: is for a .pt file; {source} is a folder, whose config.json tells them: leave it out")
    contract, weights = read_folder(source) if source.is_dir() else read_paper(source, config.heads)
    check_shapes(source, contract, weights)
    out = Path(config.out)
    exports.write(out, contract, weights)
    size = sum(tensor.numel() for tensor in weights.values())
    print(f"imported {size:,} parameters to {out}")
    print("its VAE is none of this project, so it cannot make clips by itself")


def check_shapes(source: Path, contract: exports.Contract, weights: dict[str, Tensor]) -> None:
    """Raise UserError where a weight is not of the size that the model's description says, or no number."""
    with torch.device("meta"):
        expected = VideoDiT(**contract.architecture).state_dict()
    for name, tensor in weights.items():
        shape = expected[name].shape
        if tensor.shape != shape:
            raise UserError(
                f"{source}: weights and description are not of one model: {name} (our name) is {list(tensor.shape)}, "
                f"and should be {list(shape)}; take both from the same place"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} (our name) holds numbers that are not finite; take an undamaged copy")


def read_paper(path: Path, heads: int | None) -> tuple[exports.Contract, dict[str, Tensor]]:
    """The contract and the weights, under our names, of a `.pt` file of the paper's code: published, or a checkpoint of
    its training, of which the averaged weights are taken.

    Raises:
        UserError: the file is none of these, or the heads of a size that the paper does not have are not given.
    """
    theirs = _read_pt(path)
    theirs = theirs.get("ema", theirs)
    if not isinstance(theirs, dict) or not all(isinstance(one, Tensor) for one in theirs.values()):
        raise UserError(f"{path}: is no table of tensors; save the model's state_dict() alone with torch.save")
    try:
        architecture = paper_architecture(theirs, heads)
        table = theirs.pop("pos_embed", None)
        if table is None:
            raise ValueError("the weights lack pos_embed")
        check_positions(table, architecture["width"])
        weights = to_ours(paper_entries(architecture), theirs)
    except ValueError as error:
        cure = "set heads" if "heads" in str(error) else "name a .pt file of the paper, or a folder of diffusers"
        raise UserError(f"{path}: {error}; {cure}") from error
    side = round(table.shape[1] ** 0.5) * architecture["patch"][1] * 8  # pixels; the paper's VAE has cells of 8
    return imported(path, "paper", architecture, [1, side, side]), weights


def _read_pt(path: Path) -> dict[str, Any]:
    """The table of a `.pt` file, read without running anything of it."""
    if not path.is_file():
        raise UserError(f"weights_from: {path} does not exist; name a .pt file of the paper or a folder of diffusers")
    try:
        # Checkpoints of the paper's training hold its arguments, too: a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise of every kind; the reader of untrusted files reports them all
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {code[1]}, and nothing but tensors is read" if code else "is damaged, or no .pt file"
        raise UserError(f"{path}: {what}; save the model's state_dict() alone with torch.save") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: holds a {type(found).__name__}, not a table of tensors; save the model's state_dict()"
        )
    return found
