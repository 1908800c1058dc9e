"""What a run keeps of its attempts: with what code and versions each ran, and what went wrong on the way."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

EVENTS = "events.jsonl"
"""Updates that were left out and rollbacks, one JSON object per line."""
_PACKAGE = Path(__file__).parents[1]


@functools.cache
def code_version() -> str:
    """Digest of all source files of this package: the same on every rank of a run."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe_attempt(*, step: int, world_size: int) -> dict[str, Any]:
    """What this attempt runs with, as JSON: command, device, Slurm job, code, git state and versions of packages."""
    return {
        "from_step": step,
        "world_size": world_size,
        "command": sys.argv,
        "slurm": {name: value for name, value in os.environ.items() if name.startswith("SLURM_JOB_")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "code": code_version(),
        "git": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain"),
        "packages": dict(sorted(_packages())),
    }


def event_line(event: dict[str, Any]) -> str:
    """A line of RUN/events.jsonl."""
    return json.dumps({"time": time.time(), **event}, allow_nan=False)


def _packages() -> Iterator[tuple[str, str]]:
    """Name and version of every package; what a broken installation has left behind has none."""
    for one in importlib.metadata.distributions():
        if one.metadata["Name"]:
            yield one.name, one.version


def _git(*arguments: str) -> str | None:
    """Output of git in the package's folder; None where it is no checkout, or git is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
