"""`sora-lite scaling`: the power law of a sweep's validation loss in the FLOPs of training, and what it predicts."""

import json
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from sora_lite.config import ScalingConfig
from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.evaluation.scaling import Curve, Fit, Scaling, analyse, frontier, plot

CONFIG = "config.yaml"
ALIKE = (
    "data.shards", "data.sets", "data.buckets", "data.fps", "diffusion", "frames", "run.validation_samples", "vae_from",
    "text_from", "pooled_from",
)  # fmt: skip
"""Settings without which the losses of two runs do not compare."""


@dataclass(kw_only=True, slots=True, frozen=True)
class SweepRun:
    """A run of the sweep: its validation losses and its resolved configuration."""

    curve: Curve
    config: dict[str, Any]


def main(config: ScalingConfig) -> None:
    """Read the runs, fit, write scaling.json and scaling.png, and print the table."""
    runs = [read_run(folder) for folder in find(config.runs)]
    check_alike(runs)
    scaling = analyse([run.curve for run in runs])
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    plot(scaling, out / "scaling.png")
    (out / "scaling.json").write_text(json.dumps(to_json(scaling), indent=2) + "\n")
    print("\n".join(table(scaling)))
    print(f"written to {out / 'scaling.png'} and {out / 'scaling.json'}")


def find(pattern: str) -> list[Path]:
    """Run folders that match a pattern. Raises UserError where there is none."""
    matches = [Path(path) for path in sorted(glob(pattern))]
    folders = [path for path in matches if (path / RECORD).is_file() and (path / CONFIG).is_file()]
    if not folders:
        raise UserError(f"runs: no run folder with {RECORD} and {CONFIG} matches {pattern!r}; train the sweep first")
    return folders


def read_run(folder: Path) -> SweepRun:
    """The validation losses of a run that was trained to its end.

    Raises:
        UserError: it has none, or none at its last step.
    """
    tree = OmegaConf.load(folder / CONFIG)
    record = read_record(folder / RECORD)
    lines = [line for line in record if line.get("val_loss") is not None and "flops" in line]
    steps = int(OmegaConf.select(tree, "run.steps"))
    if not lines or lines[-1]["step"] < steps:
        reached = lines[-1]["step"] if lines else "no step"
        raise UserError(
            f"{folder}: has a validation loss at {reached}, not at its end, step {steps}; let it finish, with "
            "run.validate_every above 0 and held-out samples, or leave it out of runs="
        )
    curve = Curve(
        name=folder.name,
        flops=np.array([line["flops"] for line in lines]),
        losses=np.array([line["val_loss"] for line in lines]),
    )
    if not all((np.isfinite(numbers) & (numbers > 0)).all() for numbers in (curve.flops, curve.losses)):
        raise UserError(f"{folder}: has a validation loss or FLOPs that have no logarithm; leave it out of runs=")
    values = OmegaConf.to_container(tree)
    assert isinstance(values, dict)
    return SweepRun(curve=curve, config={str(key): value for key, value in values.items()})


def check_alike(runs: list[SweepRun]) -> None:
    """Raise UserError for runs whose losses do not compare, since data, VAE or diffusion differ."""
    first = OmegaConf.create(runs[0].config)
    for run in runs[1:]:
        for key in ALIKE:
            ours, theirs = OmegaConf.select(OmegaConf.create(run.config), key), OmegaConf.select(first, key)
            if ours != theirs:
                raise UserError(
                    f"runs: {run.curve.name} has {key}={ours}, {runs[0].curve.name} has {theirs}, so their losses do "
                    "not compare; name runs of one sweep"
                )


def to_json(scaling: Scaling) -> dict[str, Any]:
    """Everything, for machines. Errors are relative: predicted / measured - 1."""
    flops, losses = frontier(scaling.curves)
    on_frontier = set(zip(flops.tolist(), losses.tolist(), strict=True))
    return {
        "runs": [
            {
                "name": curve.name,
                "flops": int(curve.flops[-1]),
                "val_loss": float(curve.losses[-1]),
                "fitted": float(scaling.every.law(curve.flops[-1])),
                "on_frontier": (curve.flops[-1], curve.losses[-1]) in on_frontier,
            }
            for curve in scaling.curves
        ],
        "law": _law(scaling.every),
        "law_without_irreducible_loss": _law(scaling.straight),
        "law_without_largest": _law(scaling.without_largest),
        "held_out": {
            "name": scaling.curves[-1].name,
            "predicted": scaling.held_out,
            "measured": float(scaling.curves[-1].losses[-1]),
            "error": scaling.held_out_error,
        },
        "next": {"flops": scaling.next_flops, "predicted": scaling.next_loss},
    }


def _law(fit: Fit) -> dict[str, float]:
    law = fit.law
    return {
        "scale": law.scale * law.unit**law.exponent,
        "exponent": law.exponent,
        "exponent_standard_error": fit.exponent_error,
        "irreducible_loss": law.floor,
        "left_out_error": fit.left_out,
    }


def table(scaling: Scaling) -> list[str]:
    """The same for people."""
    values = to_json(scaling)
    lines = [f"{'run':<24}{'FLOPs':>12}{'val_loss':>10}{'fitted':>10}  on the frontier"]
    lines += [
        f"{run['name']:<24}{run['flops']:>12.3e}{run['val_loss']:>10.4f}{run['fitted']:>10.4f}  "
        f"{'yes' if run['on_frontier'] else 'no'}"
        for run in values["runs"]
    ]
    for title, key in (
        ("all runs", "law"),
        ("all runs, no irreducible loss", "law_without_irreducible_loss"),
        (f"without {values['held_out']['name']}", "law_without_largest"),
    ):
        law = values[key]
        lines.append(
            f"{title}: loss = {law['irreducible_loss']:.4f} + {law['scale']:.4g} FLOPs^{-law['exponent']:.4f} "
            f"(exponent ± {law['exponent_standard_error']:.4f}; a run left out is predicted to "
            f"{law['left_out_error']:.2%}, root mean square)"
        )
    held, following = values["held_out"], values["next"]
    lines += [
        f"{held['name']}: {held['predicted']:.4f} predicted from the others, {held['measured']:.4f} measured, "
        f"error {held['error']:+.2%}",
        f"next size, {following['flops']:.3e} FLOPs: {following['predicted']:.4f} predicted",
    ]
    return lines
