"""`sora-lite demo`: the whole way on moving handwritten digits, by the same commands that a user types.

Every stage is skipped where it is done and goes on where it was stopped.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from sora_lite.cli.compose import choices
from sora_lite.config import DemoConfig
from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")


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


def stages(config: DemoConfig) -> list[tuple[str, list[str], Path | None]]:
    """(title, command, file that exists once the stage is done; None for stages that look for themselves)."""
    root, name = Path(config.root), config.experiment
    data = root / "digits"
    run, vae = root / name, root / f"{name}_vae"
    # A run is exported once it is trained, so its export stands for both.
    exported, exported_vae = run / "export/export.json", vae / "export/export.json"
    lite = [sys.executable, "-m", "sora_lite.cli"]
    tools = [sys.executable, "-m", "data_tools"]
    launch = lite
    ranks = min(config.ranks, torch.cuda.device_count() or config.ranks)  # one process per GPU
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launch = [*torchrun, str(ranks), "-m", "sora_lite.cli"]
    shards = f"data.shards={data / 'shards'}"
    threads = f"threads={config.threads or 'null'}"
    prompts = [f"the digit {digit} moves {DIRECTIONS[i % 4]}" for i, digit in enumerate(DIGITS)]
    return [
        (
            "render digits",
            [*tools, "digits", str(data / "videos"), f"clips={config.clips}"],
            data / "videos/metadata.jsonl",
        ),
        (
            "pack shards",
            [
                *tools,
                "run",
                str(data / "videos"),
                str(data / "shards"),
                "validation_fraction=0.22",
                "pack.crf=10",
                # every file is one shot, and scans of one digit are meant to look alike
                "split.detector=none",
                "dedupe.near=false",
            ],
            None,
        ),
        ("train the VAE", [*launch, "train-vae", f"experiment={name}_vae", f"run.root={root}", shards], exported_vae),
        ("export the VAE", [*lite, "export", f"run={vae}"], exported_vae),
        (
            "train the DiT",
            [*launch, "train", f"experiment={name}", f"run.root={root}", f"vae_from={vae}", shards],
            exported,
        ),
        ("export the DiT", [*lite, "export", f"run={run}"], exported),
        (
            "generate clips",
            [
                *lite,
                "generate",
                f"model_from={run}",
                f"run={run}",
                f"shards={data / 'shards'}",
                f"out={run / 'generations'}",
                f"prompts={json.dumps(prompts)}",
                f"labels={json.dumps(list(range(10)))}",
                threads,
            ],
            run / "generations/index.html",
        ),
        (
            "evaluate",
            [
                *lite,
                "evaluate",
                f"model_from={run}",
                f"shards={data / 'shards'}",
                f"out={run / 'evaluation.json'}",
                threads,
            ],
            run / "evaluation.json",
        ),
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
