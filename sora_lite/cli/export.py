"""`sora-lite export`: a run's newest checkpoint as safetensors with a contract, for inference."""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from sora_lite.config import ExportConfig, Layout
from sora_lite.errors import UserError
from sora_lite.generation import export as exports
from sora_lite.generation.layouts import write_folder
from sora_lite.models.lora import Adapters
from sora_lite.models.vae import CausalVAE
from sora_lite.training import restore, store


def main(config: ExportConfig) -> None:
    """Export and say where it lies."""
    run, out = Path(config.run), Path(config.out) if config.out else None
    if config.layout is Layout.diffusers:
        ready = (run / "export.json").is_file()  # an import, or another export
        if ready and (config.weights != "ema" or config.init_from is not None):
            raise UserError(f"weights, init_from: {run} is an export, whose weights are as they are; leave them out")
        out = out or run / "diffusers"
        if ready:
            write_folder(run, out)
        else:  # an export on the way, which leaves the one that the run may have as it is
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as between:
                write_folder(export(run, Path(between), config.weights, config.init_from), out)
    else:
        out = export(run, out, config.weights, config.init_from)
    print(f"exported to {out}")


def export(run: Path, out: Path | None, weights: str, init_from: str | None = None) -> Path:
    """Write the export of a run. Returns its folder. init_from: of a run with adapters, where their base lies now.

    Raises:
        UserError: there is no checkpoint, it is damaged, or has no such weights; or the base of adapters is missing.
    """
    path = store.latest(run / "checkpoints")
    if path is None:
        raise UserError(f"{run}: holds no checkpoint yet; train it first, or check the path")
    tensors, state = restore.read_full(path, weights)
    extra: dict[str, Any] = state["extra"]
    kind, objective = extra["facts"]["kind"], extra["objective"]
    out = out or run / "export"
    contract: dict[str, Any] = {
        "kind": kind,
        "run": run.name,
        "step": state["step"],
        "weights": weights,
        "clip": extra["clip"],
        "fps": extra["fps"],
    }
    if kind == "vae":
        if not extra["finished"]:
            steps = extra["facts"]["config"]["run"]["steps"]
            raise UserError(
                f"{run}: is at step {state['step']} of {steps}, and the statistics of its latents are "
                "measured at the end; let `sora-lite train-vae` finish, or lower run.steps and repeat it"
            )
        vae = CausalVAE(**objective["vae"])
        vae.load_state_dict(tensors)
        contract |= {"architecture": objective["vae"], "vae_fingerprint": vae.fingerprint()}
    else:
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
        if objective["lora"] is None and init_from is not None:
            raise UserError(f"init_from: {run} trained no adapters, so it needs no other weights; leave it out")
        if objective["lora"] is not None:
            contract["base"] = objective["lora"]["sha256"]
            tensors = merge(out / exports.ADAPTER, objective["lora"], tensors, init_from)
    exports.write(out, exports.Contract(**contract), tensors)
    return out


def merge(folder: Path, lora: dict[str, Any], trained: dict[str, Tensor], init_from: str | None) -> dict[str, Tensor]:
    """Write adapters into a folder, and return the weights of the model with them merged in."""
    base = init_from or lora["init_from"]
    adapters = Adapters(**lora["adapters"])
    frozen, contract = exports.read_weights(Path(base), "dit")
    if exports.read_contract(Path(base), "dit")[0].resolve() == folder.parent.resolve():
        raise UserError(f"out: {folder.parent} is what the adapters stand on, and would be lost; name another folder")
    if contract.sha256 != lora["sha256"]:
        raise UserError(
            f"init_from: {base} holds other weights than those that the adapters were trained on (SHA-256 "
            f"{contract.sha256[:16]}, not {lora['sha256'][:16]}); give the folder that holds these"
        )
    exports.begin(folder.parent)  # adapters and the merged weights beside them are of one checkpoint
    adapters.write(folder, trained, base)
    return adapters.merge(frozen, trained)
