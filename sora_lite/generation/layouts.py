"""Folders as diffusers writes them, read into exports of this project and written from them.

FOLDER/
  config.json                              what the model is
  diffusion_pytorch_model.safetensors      its weights; or several files, with an index beside them
  pytorch_lora_weights.safetensors         (of a Wan model with adapters merged in) these alone, for `load_lora_weights`
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sora_lite.errors import UserError
from sora_lite.generation.export import ADAPTER, CELL, Contract, latent_grid, load_transformer, read_contract
from sora_lite.models.adapters import (
    CLASSES,
    ENTRIES,
    Entry,
    architecture_of,
    config_of,
    lora_to_theirs,
    to_ours,
    to_theirs,
)
from sora_lite.models.lora import Adapters

_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_LORA = "pytorch_lora_weights.safetensors"


def read_folder(folder: Path) -> tuple[Contract, dict[str, Tensor]]:
    """The contract and the weights, under our names, of a folder of diffusers: a transformer, or a whole pipeline.

    Raises:
        UserError: the folder is none, is damaged, or holds a model that `VideoDiT` cannot be.
    """
    if (folder / "transformer" / _CONFIG).is_file():
        folder = folder / "transformer"
    config = _read_json(folder / _CONFIG)
    layout = next((name for name, kind in CLASSES.items() if kind == config.get("_class_name")), None)
    if layout is None:
        raise UserError(
            f"{folder / _CONFIG}: describes a {config.get('_class_name')}, which cannot be imported; "
            f"{', '.join(CLASSES.values())} can"
        )
    try:
        architecture = architecture_of(layout, config)
        clip = _clip(layout, config)
    except KeyError as error:
        raise UserError(f"{folder / _CONFIG}: lacks {error}; take the file that diffusers has saved") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{folder / _CONFIG}: is of no model that can be imported ({error})") from error
    try:
        weights = to_ours(ENTRIES[layout](architecture), _read_weights(folder))
    except ValueError as error:
        raise UserError(f"{folder}: {error}; take weights and {_CONFIG} from the same place") from error
    return imported(folder, layout, architecture, clip), weights


def imported(source: Path, layout: str, architecture: dict[str, Any], clip: list[int]) -> Contract:
    """The contract of weights that others trained. clip: (T, H, W) in frames and pixels that they trained on."""
    # Wan's own default for sampling; the others predict noise on 1,000 steps.
    process = {"objective": "rectified_flow", "shift": 5.0} if layout == "wan" else {"objective": "epsilon"}
    return Contract(
        kind="dit", architecture=architecture, run=source.name, step=0, weights="imported", clip=clip, fps=0.0,
        vae_fingerprint=None, diffusion=process,
    )  # fmt: skip


def write_folder(export: Path, out: Path) -> None:
    """An export of a DiT as a folder that diffusers' `from_pretrained` reads.

    Raises:
        UserError: diffusers has no class that could be this model, or the folder holds another one in several files.
    """
    if (out / _INDEX).exists():
        raise UserError(f"out: {out / _INDEX} would still lead to the weights that lie there; name another folder")
    export, _ = read_contract(export, "dit")
    dit, contract = load_transformer(export)
    latent = latent_grid(export, contract)
    refused = []
    for layout, kind in CLASSES.items():
        try:
            config = config_of(layout, contract.architecture, latent)
        except (ValueError, KeyError) as error:
            refused.append(f"{kind}: {error}")
            continue
        out.mkdir(parents=True, exist_ok=True)
        for name in (_CONFIG, _LORA):  # the description comes last: a folder that has one is whole
            (out / name).unlink(missing_ok=True)
        entries = ENTRIES[layout](contract.architecture)
        weights = to_theirs(entries, dit.state_dict())
        # Copies share their memory, which the format does not allow.
        save_file({name: tensor.clone() for name, tensor in weights.items()}, out / _WEIGHTS, {"format": "pt"})
        if contract.base is not None and layout == "wan":  # diffusers' DiT and Latte take no adapters
            _write_adapters(export / ADAPTER, entries, out / _LORA)
        (out / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return
    raise UserError(f"layout: this model is none that diffusers has ({'; '.join(refused)}); take layout=sora_lite")


def _write_adapters(folder: Path, entries: list[Entry], path: Path) -> None:
    """Adapters of an export as a file that diffusers loads onto the base. Their scale is in B, so it needs no other."""
    adapters, trained = Adapters.read(folder)
    tensors = {
        f"transformer.{layer}.lora_{side}.weight": tensor
        for layer, pair in lora_to_theirs(entries, adapters.pairs(trained)).items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def _clip(layout: str, config: dict[str, Any]) -> list[int]:
    if layout == "wan":
        return [81, 480, 832]
    side = CELL * config["sample_size"]
    return [config["video_length"] if layout == "latte" else 1, side, side]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: does not exist; name a folder that diffusers has saved")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a table of settings")
    return values


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors."""
    names = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        index = _read_json(folder / _INDEX).get("weight_map")
        names = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / Path(name).name  # never outside of the folder
        if not path.is_file():
            raise UserError(f"{path}: does not exist; weights are read from safetensors alone")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: is damaged ({error})") from error
    return tensors
