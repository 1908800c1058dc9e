"""`sora-lite checkpoint list|verify RUN`: the checkpoints of a run, and whether they are as they were written."""

import json
from dataclasses import asdict
from pathlib import Path

from sora_lite.cli.compose import configure
from sora_lite.config import CheckpointConfig, Format
from sora_lite.errors import UserError
from sora_lite.training.store import Entry, inventory

USAGE = "use `sora-lite checkpoint list RUN`, or `verify RUN`, which reads every file; format=json prints for machines"


def main(verb: str, argv: list[str]) -> None:
    """Run `sora-lite checkpoint`.

    Raises:
        UserError: the words are wrong, the folder is none of a run, or a checkpoint is damaged.
    """
    words = [word for word in argv if "=" not in word and not word.startswith("-")]
    rest = [word for word in argv if word not in words]
    named = [f"run={word}" for word in words[1:]]
    config: CheckpointConfig = configure(verb, [*named, *rest])
    if words[:1] not in (["list"], ["verify"]) or len(words) > 2:
        raise UserError(f"sora-lite checkpoint: {' '.join(words) or 'what shall it do'}: {USAGE}")
    folder = Path(config.run) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{config.run}: holds no checkpoints; train it first, or check the path")
    entries = inventory(folder, hashes=words[0] == "verify")
    print(
        json.dumps([asdict(entry) for entry in entries], indent=1) if config.format is Format.json else table(entries)
    )
    if damaged := [entry for entry in entries if entry.state == "damaged"]:
        raise UserError(
            f"{folder}: {len(damaged)} of {len(entries)} checkpoints are damaged, the first {damaged[0].name}"
        )


def table(entries: list[Entry]) -> str:
    """A line for each checkpoint; the arrow shows the one that the pointer names."""
    return "\n".join(
        f"{'->' if one.latest else '  '} {one.name:<32}{one.bytes / 2**20:>12,.1f} MiB  {one.state}"
        f"{': ' if one.note else ''}{one.note}"
        for one in entries
    )
