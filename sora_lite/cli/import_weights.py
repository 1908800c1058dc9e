"""`sora-lite import`: weights that others published, as an export of this project.

The one place that opens a `.pt` file: of the paper's code, and only its tensors.
"""

from pathlib import Path

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
    contract, weights = read_folder(source) if source.is_dir() else read_paper(source, config.heads)
    with torch.device("meta"):
        model = VideoDiT(**contract.architecture)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{source}: the weights do not fit their description ({error})") from error
    out = Path(config.out)
    exports.write(out, contract, weights)
    size = sum(tensor.numel() for tensor in weights.values())
    print(f"imported {size:,} parameters to {out}")
    print("its VAE is none of this project, so it cannot make clips by itself")


def read_paper(path: Path, heads: int | None) -> tuple[exports.Contract, dict[str, Tensor]]:
    """The contract and the weights, under our names, of a `.pt` file of the paper's code.

    Raises:
        UserError: the file is none of these, or the heads of a size that the paper does not have are not given.
    """
    if not path.is_file():
        raise UserError(f"weights_from: {path} does not exist; name a .pt file of the paper or a folder of diffusers")
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise of every kind; the reader of untrusted files reports them all
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: holds more or other than tensors, or is damaged ({why})") from error
    if not isinstance(theirs, dict) or not all(isinstance(one, Tensor) for one in theirs.values()):
        raise UserError(f"{path}: is no table of tensors; of a training checkpoint save its `ema` alone")
    try:
        architecture = paper_architecture(theirs, heads)
        table = theirs.pop("pos_embed", None)
        if table is None:
            raise ValueError("the weights lack pos_embed")
        check_positions(table)
        weights = to_ours(paper_entries(architecture), theirs)
    except ValueError as error:
        cure = "; set heads" if "heads" in str(error) else ""
        raise UserError(f"{path}: {error}{cure}") from error
    side = round(table.shape[1] ** 0.5) * architecture["patch"][1] * 8  # pixels; the paper's VAE has cells of 8
    return imported(path, "paper", architecture, [1, side, side]), weights
