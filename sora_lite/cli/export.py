"""`sora-lite export`: a run's newest checkpoint as safetensors with a contract, for inference."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from sora_lite.config import ExportConfig, Layout
from sora_lite.data.files import require_folder
from sora_lite.errors import UserError
from sora_lite.generation import export as exports
from sora_lite.generation.layouts import write_folder
from sora_lite.models.lora import Adapters
from sora_lite.models.vae import CausalVAE
from sora_lite.training import restore, store


def main(config: ExportConfig) -> None:
    """Export and say where it lies."""
    run = Path(config.run)
    out = Path(config.out) if config.out else run / ("export" if config.layout is Layout.sora_lite else "diffusers")
    require_folder(out)
    if config.layout is Layout.sora_lite:
        export(run, out, config.weights, config.init_from)
    else:
        for_diffusers(run, out, config)
    print(f"exported to {out}")


def for_diffusers(run: Path, out: Path, config: ExportConfig) -> None:
    """Write a run, an export or an import as a folder of diffusers."""
    if (run / "export.json").is_file():  # an import, or another export
        if config.weights != "ema" or config.init_from is not None:
            raise UserError(f"weights, init_from: {run} is an export, whose weights are as they are; leave them out")
        write_folder(run, out)
        return
    whole = out.resolve()
    between = whole.with_name(f".{whole.name}.partial")  # an export on the way: the one that the run may have stays
    shutil.rmtree(between, ignore_errors=True)  # of a call that was killed
    try:
        write_folder(export(run, between, config.weights, config.init_from, config.layout), out)
    finally:
        shutil.rmtree(between, ignore_errors=True)


def export(run: Path, out: Path, weights: str, init_from: str | None = None, layout: Layout = Layout.sora_lite) -> Path:
    """Write the export of a run. Returns its folder.

    Args:
        run: folder of the run.
        out: folder of the export.
        weights: `ema` or `raw`.
        init_from: of a run with adapters, where their base lies now.
        layout: what becomes of the export.

    Raises:
        UserError: there is no checkpoint, it is damaged, or has no such weights; the base of adapters is missing, or
            would be written over; or the layout has no such model.
    """
    path = store.latest(run / "checkpoints")
    if path is None:
        raise UserError(f"{run}: holds no checkpoint yet; train it first, or check the path")
    tensors, state = restore.read_full(path, weights)
    extra: dict[str, Any] = state["extra"]
    kind, objective = extra["facts"]["kind"], extra["objective"]
    contract: dict[str, Any] = {
        "kind": kind,
        "run": run.name,
        "step": state["step"],
        "weights": weights,
        "clip": extra["clip"],
        "fps": extra["fps"],
    }
    if kind == "vae" and layout is Layout.diffusers:
        raise UserError(f"layout: {run} trained a VAE, and diffusers has none like it; take layout=sora_lite")
    if kind == "vae":
        contract |= about_vae(run, state, tensors)
    else:
        lora = objective["lora"]
        if lora is None and init_from is not None:
            raise UserError(f"init_from: {run} trained no adapters, so it needs no other weights; leave it out")
        base = None if lora is None else Base.read(init_from or lora["init_from"], lora, out)
        vae, vae_contract = exports.load_vae(run / "vae")
        if vae_contract.vae_fingerprint != objective["vae_fingerprint"]:
            raise UserError(f"{run / 'vae'}: is not the VAE that {run} was trained against; put that one back")
        exports.write(out / "vae", vae_contract, vae.state_dict())
        contract |= {
            "architecture": objective["model"],
            "vae_fingerprint": objective["vae_fingerprint"],
            "diffusion": objective["diffusion"],
            "text_encoders": objective["text_encoders"],
        }
        if base is not None:
            contract["base"] = lora["sha256"]
            tensors = base.merge(tensors, out)
    exports.write(out, exports.Contract(**contract), tensors)
    return out


def about_vae(run: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the contract of a VAE says beside what all say."""
    if not state["extra"]["finished"]:
        steps = state["extra"]["facts"]["config"]["run"]["steps"]
        raise UserError(
            f"{run}: is at step {state['step']} of {steps}, and the statistics of its latents are "
            "measured at the end; let `sora-lite train-vae` finish, or lower run.steps and repeat it"
        )
    architecture = state["extra"]["objective"]["vae"]
    vae = CausalVAE(**architecture)
    vae.load_state_dict(tensors)
    return {"architecture": architecture, "vae_fingerprint": vae.fingerprint()}


@dataclass(kw_only=True, slots=True, frozen=True)
class Base:
    """The frozen weights that adapters stand on. name: of their folder, for people."""

    name: str
    weights: dict[str, Tensor]
    adapters: Adapters

    @classmethod
    def read(cls, name: str, lora: dict[str, Any], out: Path) -> Self:
        """From a folder. lora: as a checkpoint says it. out: where the export is to be written.

        Raises:
            UserError: there is no such export, it holds other weights, or `out` would be written over it.
        """
        weights, contract = exports.read_weights(Path(name), "dit")
        if contract.sha256 != lora["sha256"]:
            raise UserError(
                f"init_from: {name} holds other weights than those that the adapters were trained on (SHA-256 "
                f"{contract.sha256[:16]}, not {lora['sha256'][:16]}); give the folder that holds these"
            )
        if out.resolve() in (Path(name).resolve(), exports.read_contract(Path(name), "dit")[0].resolve()):
            raise UserError(f"out: {out} is what the adapters stand on, and would be lost; name another folder")
        return cls(name=name, weights=weights, adapters=Adapters(**lora["adapters"]))

    def merge(self, trained: dict[str, Tensor], out: Path) -> dict[str, Tensor]:
        """Write adapters beside an export, and return the weights of the model with them merged in."""
        exports.begin(out)  # adapters and the merged weights beside them are of one checkpoint
        self.adapters.write(out / exports.ADAPTER, trained, self.name)
        return self.adapters.merge(self.weights, trained)
