"""`sora-data VERB`: the command line of the offline tools."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.config import PrepareConfig, help_text, parse
from sora_lite.cli import run_verb


@dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """`sora-data verify`."""

    workers: int | None = None
    """Processes; 0 works in this one, null takes one per core."""


@dataclass(kw_only=True, slots=True)
class DigitsConfig:
    """`sora-data digits`."""

    clips: int = 5000
    """Clips to render."""
    seed: int = 0
    """Seed of the choice of scans and directions."""


@dataclass(kw_only=True, slots=True)
class Verb:
    """What the command line says and takes for one verb."""

    line: str
    folders: list[str]
    settings: type


VERBS = {
    "run": Verb(
        line="probe, split and pack a folder of videos into shards; called again, it goes on where it stopped",
        folders=["VIDEOS", "SHARDS"],
        settings=PrepareConfig,
    ),
    "verify": Verb(
        line="check every checksum, and that every clip decodes to what is promised",
        folders=["SHARDS"],
        settings=VerifyConfig,
    ),
    "digits": Verb(
        line="render the demo's data set: handwritten digits that move, as labelled mp4 files",
        folders=["OUT"],
        settings=DigitsConfig,
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `sora-data`. Returns the exit status: 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    return run_verb(lambda: _call(arguments))


def _call(arguments: argparse.Namespace) -> None:
    verb = VERBS[arguments.verb]
    paths = [Path(getattr(arguments, name)) for name in verb.folders]
    settings: Any = parse(verb.settings, arguments.settings)
    match arguments.verb:
        case "run":
            from data_tools.run import run

            run(paths[0], paths[1], settings)
        case "verify":
            from data_tools.verify import verify

            verify(paths[0], settings.workers)
        case "digits":
            from data_tools.digits import render

            render(paths[0], settings.clips, settings.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sora-data", description="From videos to verified training shards.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        one = verbs.add_parser(
            name,
            help=verb.line,
            description=verb.line,
            epilog=f"settings, as KEY=VALUE:\n{help_text(verb.settings)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for folder in verb.folders:
            one.add_argument(folder)
        one.add_argument("settings", nargs="*", default=[], metavar="KEY=VALUE")
    return parser
