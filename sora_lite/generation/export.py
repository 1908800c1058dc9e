"""Exported models: safetensors and the contract that says what they are. Inference reads nothing else.

EXPORT/
  export.json          the contract: kind, architecture, step, and what the model expects around it
  model.safetensors    weights in fp32
  adapter/             (of a DiT whose adapters were trained) these alone, as peft reads them
  vae/                 (of a DiT) the export of the VAE that it was trained against
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sora_lite.data.files import replace_file
from sora_lite.diffusion.process import Process
from sora_lite.errors import UserError
from sora_lite.models.dit import VideoDiT
from sora_lite.models.vae import CausalVAE

Model = TypeVar("Model", CausalVAE, VideoDiT)
FORMAT = 1
_WEIGHTS, _CONTRACT, _VAE = "model.safetensors", "export.json", "vae"
CELL = 8
"""Pixels along a side of a latent cell, in the VAEs of all models that can be imported."""
ADAPTER = "adapter"
"""Folder of the adapters in an export that they are merged into; see `models.lora`."""


@dataclass(kw_only=True, slots=True)
class Contract:
    """What an exported model is.

    architecture: keyword arguments of `CausalVAE` or `VideoDiT`. clip: (T, H, W) in frames and pixels, and fps
    (0: each clip's own rate), of the first bucket that it was trained on. vae_fingerprint: of the VAE itself, or of the
    one that a DiT was trained against; None where that is not of this project (`sora-lite import`). diffusion: keyword
    arguments of `Process` (DiT). text_encoders: `FrozenTextEncoder.identity` of those whose features a DiT was
    trained on, by the setting that names them. They are no part of the export, being larger than most models and the
    same for many. base: SHA-256 of the weights that adapters were trained on and are merged into here; None for a model
    that was trained whole.
    """

    kind: Literal["vae", "dit"]
    architecture: dict[str, Any]
    run: str
    step: int
    weights: str
    clip: list[int]
    fps: float
    vae_fingerprint: str | None
    diffusion: dict[str, Any] = field(default_factory=dict)
    text_encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: str | None = None
    sha256: str = ""
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Raise ValueError if the clip is none."""
        if len(self.clip) != 3 or not all(isinstance(side, int) and side >= 1 for side in self.clip):
            raise ValueError(f"clip must be [frames, height, width], not {self.clip}")


def begin(folder: Path) -> None:
    """What is in a folder is no export any more, until it is written anew."""
    (folder / _CONTRACT).unlink(missing_ok=True)


def write(folder: Path, contract: Contract, weights: Mapping[str, Tensor]) -> None:
    """Write an export. The contract comes last, so that a folder with a contract is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    begin(folder)
    if contract.base is None and (folder / ADAPTER).is_dir():  # of what lay here before
        shutil.rmtree(folder / ADAPTER)
    save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, folder / _WEIGHTS)
    contract.sha256 = _sha256(folder / _WEIGHTS)
    replace_file(folder / _CONTRACT, json.dumps(asdict(contract), indent=2).encode())


def read_contract(folder: Path, kind: str) -> tuple[Path, Contract]:
    """The contract of an export, and its folder: the one given, or the `export` folder of a run.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an export or a run folder that holds one")
    if not (folder / _CONTRACT).is_file():
        if (folder / "export" / _CONTRACT).is_file():
            folder = folder / "export"
        else:
            raise UserError(f"{folder}: holds no export; {_cure(folder, kind)}")
    path = folder / _CONTRACT
    try:
        values = json.loads(path.read_text())
        contract = Contract(**values)
        Process(**contract.diffusion)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is no contract of an export ({error}); export the run again") from error
    if contract.format != FORMAT:
        raise UserError(f"{path}: has format {contract.format}, this version reads {FORMAT}; export the run again")
    if contract.kind != kind:
        raise UserError(f"{folder}: is the export of a {contract.kind}, not of a {kind}; give the right folder")
    return folder, contract


def _cure(folder: Path, kind: str) -> str:
    """How to get an export of that kind from what lies in a folder."""
    if (folder / "adapter_config.json").is_file():
        return "adapters are read with the export around them: name that"
    if any((folder / part / "config.json").is_file() for part in (".", "transformer")):
        if kind == "vae":
            return "VAEs of others are not read; name a run of `sora-lite train-vae`, or an export of one"
        return f"a DiT of diffusers is taken in with `sora-lite import weights_from={folder} out=...`"
    return f"make one with `sora-lite export run={folder}`"


def load_vae(folder: Path) -> tuple[CausalVAE, Contract]:
    """The VAE of an export or run folder, frozen, in eval mode, on the CPU."""
    folder, contract = read_contract(folder, "vae")
    vae = _built(CausalVAE, folder, contract)
    _load(vae, folder, contract)
    if vae.fingerprint() != contract.vae_fingerprint:
        raise UserError(f"{folder}: the weights are not those that the contract names; export the run again")
    return vae, contract


def load_dit(folder: Path) -> tuple[VideoDiT, CausalVAE, Contract]:
    """The DiT of an export or run folder and the VAE that belongs to it, frozen, in eval mode, on the CPU.

    Raises:
        UserError: something is missing or damaged, or the VAE is not the one that the DiT was trained against.
    """
    folder, contract = read_contract(folder, "dit")
    if contract.vae_fingerprint is None:
        raise UserError(
            f"{folder}: was imported, and its VAE is none of this project, so it cannot make clips; "
            "train a DiT from it, or export it with layout=diffusers"
        )
    vae, vae_contract = load_vae(folder / _VAE)
    if vae_contract.vae_fingerprint != contract.vae_fingerprint:
        raise UserError(
            f"{folder / _VAE}: is not the VAE that this DiT was trained against (fingerprint "
            f"{str(vae_contract.vae_fingerprint)[:12]}, not {contract.vae_fingerprint[:12]}); export the run again"
        )
    dit, _ = load_transformer(folder)
    return dit, vae, contract


def latent_grid(folder: Path, contract: Contract) -> tuple[int, int, int]:
    """(T, H, W) of the latents of the clips that the DiT of an export was trained on."""
    frames, height, width = contract.clip
    if contract.vae_fingerprint is None:  # imported: frames are those that the description has, of latents
        return frames, height // CELL, width // CELL
    return load_vae(folder / _VAE)[0].latent_shape(frames, height, width)[1:]


def load_transformer(folder: Path) -> tuple[VideoDiT, Contract]:
    """The DiT of an export or run folder without its VAE, frozen, in eval mode, on the CPU."""
    folder, contract = read_contract(folder, "dit")
    with torch.device("meta"):
        dit = _built(VideoDiT, folder, contract)
    _load(dit.to_empty(device="cpu"), folder, contract)
    return dit, contract


def _built(kind: type[Model], folder: Path, contract: Contract) -> Model:
    try:
        return kind(**contract.architecture)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / _CONTRACT}: architecture: {error}; export the run again") from error


def _load(module: nn.Module, folder: Path, contract: Contract) -> None:
    try:
        module.load_state_dict(_read(folder, contract))
    except RuntimeError as error:
        raise UserError(f"{folder / _WEIGHTS}: does not fit its contract ({error}); export the run again") from error
    module.eval().requires_grad_(False)


def read_weights(folder: Path, kind: str) -> tuple[dict[str, Tensor], Contract]:
    """Weights by name, fp32, and the contract of an export or run folder.

    Raises:
        UserError: there is no export, it is of another kind, or it is damaged.
    """
    folder, contract = read_contract(folder, kind)
    return _read(folder, contract), contract


def _read(folder: Path, contract: Contract) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: is missing; export the run again")
    if _sha256(path) != contract.sha256:
        raise UserError(f"{path}: is damaged (its SHA-256 is not the contract's); export the run again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: is no safetensors file ({error}); export the run again") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
