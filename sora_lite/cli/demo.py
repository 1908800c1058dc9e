"""`sora-lite demo`: the whole way on moving handwritten digits, by the same commands that a user types.

Every stage is skipped where it is done and goes on where it was stopped.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from sora_lite.cli.compose import choices
from sora_lite.config import DemoConfig
from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD

LITE = [sys.executable, "-m", "sora_lite.cli"]
TOOLS = [sys.executable, "-m", "data_tools"]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")


class Stage(NamedTuple):
    """A command of the way."""

    title: str
    command: list[str]
    done: Path | None
    """File that exists once the stage is done; None for a stage that looks for itself."""


def main(config: DemoConfig) -> None:
    """Run all stages, then say where everything lies."""
    known = [name for name in choices("experiment") if f"{name}_vae" in choices("experiment")]
    if config.experiment not in known:
        raise UserError(f"experiment: {config.experiment!r} has no VAE beside it; there are {', '.join(known)}")
    start = time.monotonic()
    for title, command, done in stages(config):
        if done is not None and done.exists():
            print(f"-- {title}: done before ({done})", flush=True)
            continue
        print(f"-- {title}\n   {' '.join(command[1:])}", flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            raise UserError(f"{title}: stopped with status {status}, see above; the same command goes on from here")
    show(config, time.monotonic() - start)


def stages(config: DemoConfig) -> list[Stage]:
    """All stages, in the order in which each finds what it needs."""
    root, name = Path(config.root), config.experiment
    data, run, vae = root / "digits", root / name, root / f"{name}_vae"
    train = [*launcher(config.ranks), "train"]
    train_vae = [*launcher(config.ranks), "train-vae"]
    given = [f"run.root={root}", f"data.shards={data / 'shards'}"]
    # A run is exported once it is trained, so its export stands for both.
    exported, exported_vae = run / "export/export.json", vae / "export/export.json"
    return [
        *data_stages(data, config.clips),
        Stage("train the VAE", [*train_vae, f"experiment={name}_vae", *given], exported_vae),
        Stage("export the VAE", [*LITE, "export", f"run={vae}"], exported_vae),
        Stage("train the DiT", [*train, f"experiment={name}", f"vae_from={vae}", *given], exported),
        Stage("export the DiT", [*LITE, "export", f"run={run}"], exported),
        *clip_stages(run, data / "shards", config.threads),
    ]


def launcher(ranks: int) -> list[str]:
    """How `sora-lite` is called on several ranks; with GPUs on no more than there are."""
    ranks = min(ranks, torch.cuda.device_count() or ranks)
    if ranks == 1:
        return LITE
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*torchrun, str(ranks), "-m", "sora_lite.cli"]


def data_stages(data: Path, clips: int) -> list[Stage]:
    """Videos of digits, and shards of them."""
    videos = data / "videos"
    settings = [
        *("validation_fraction=0.22", "pack.crf=10"),
        # every file is one shot, and scans of one digit are meant to look alike
        *("split.detector=none", "dedupe.near=false"),
    ]
    return [
        Stage("render digits", [*TOOLS, "digits", str(videos), f"clips={clips}"], videos / "metadata.jsonl"),
        Stage("pack shards", [*TOOLS, "run", str(videos), str(data / "shards"), *settings], None),
    ]


def clip_stages(run: Path, shards: Path, threads: int | None) -> list[Stage]:
    """Clips from the trained model, and how good they are."""
    given = [f"model_from={run}", f"shards={shards}", f"threads={threads or 'null'}"]
    prompts = [f"the digit {digit} moves {DIRECTIONS[i % 4]}" for i, digit in enumerate(DIGITS)]
    asked = [f"prompts={json.dumps(prompts)}", f"labels={json.dumps(list(range(10)))}"]
    clips, figures = run / "generations", run / "evaluation.json"
    return [
        Stage(
            "generate clips", [*LITE, "generate", *given, f"run={run}", f"out={clips}", *asked], clips / "index.html"
        ),
        Stage("evaluate", [*LITE, "evaluate", *given, f"out={figures}"], figures),
    ]


def show(config: DemoConfig, seconds: float) -> None:
    """Where everything lies, and the figures."""
    run = Path(config.root) / config.experiment
    figures = json.loads((run / "evaluation.json").read_text())
    print(f"\nDone in {seconds / 60:.1f} minutes.\n")
    for title, path in (
        ("clips, beside real ones", run / "generations/index.html"),
        ("contact sheet", run / "generations/contact_sheet.png"),
        ("figures", run / "evaluation.json"),
        ("record of training", run / RECORD),
        ("exported model", run / "export"),
        ("VAE", Path(config.root) / f"{config.experiment}_vae"),
        ("shards", Path(config.root) / "digits/shards"),
    ):
        print(f"  {title:<26}{path}")
    print(
        f"\n  the requested digit is recognised in {figures['digit_accuracy']:.1%} of {figures['generations']} "
        f"generations, the direction in {figures['direction_accuracy']:.1%}; VAE {figures['vae_psnr_db']:.1f} dB"
    )
