"""`sora-lite export`: a run's newest checkpoint as safetensors with a contract, for inference."""

from pathlib import Path
from typing import Any

from sora_lite.config import ExportConfig, Layout
from sora_lite.errors import UserError
from sora_lite.generation import export as exports
from sora_lite.generation.layouts import write_folder
from sora_lite.models.vae import CausalVAE
from sora_lite.training import restore, store


def main(config: ExportConfig) -> None:
    """Export and say where it lies."""
    run, out = Path(config.run), Path(config.out) if config.out else None
    if config.layout is Layout.diffusers:
        ready = (run / "export.json").is_file()  # an import, or another export
        source = run if ready else export(run, None, config.weights)
        out = out or run / "diffusers"
        write_folder(source, out)
    else:
        out = export(run, out, config.weights)
    print(f"exported to {out}")


def export(run: Path, out: Path | None, weights: str) -> Path:
    """Write the export of a run. Returns its folder.

    Raises:
        UserError: there is no checkpoint, it is damaged, or has no such weights.
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
            "text_encoder": objective["text_encoder"],
        }
    exports.write(out, exports.Contract(**contract), tensors)
    return out
