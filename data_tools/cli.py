"""`sora-data VERB`: the command line of the offline tools."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.compose import help_text, parse
from data_tools.config import BucketsConfig, DataConfig, IndexConfig
from data_tools.encode import EncodeConfig
from sora_lite.cli import run_verb
from sora_lite.errors import UserError


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
    words: list[str]
    """What stands before the settings."""
    settings: type | None = DataConfig
    """None: further words instead."""
    more: str = "KEY=VALUE"
    """How the help calls what follows."""


STAGES = {
    "probe": "hash and decode every file, and say what is in it",
    "split": "find the shots, and cut them into clips",
    "score": "measure motion, sharpness, bars and the like of every clip",
    "filter": "leave out clips by their scores",
    "dedupe": "leave out copies, exact and near",
    "caption": "get a caption for every clip",
    "pack": "encode the clips into shards",
}
VERBS = {
    "run": Verb(
        line="all stages: a folder or list of videos becomes shards; called again, it goes on where it stopped",
        words=["VIDEOS", "SHARDS"],
    ),
    **{
        stage: Verb(line=line, words=["VIDEOS", "SHARDS"] if stage == "probe" else ["SHARDS"])
        for stage, line in STAGES.items()
    },
    "report": Verb(line="write report.html: histograms, thresholds, frames on both sides of them", words=["SHARDS"]),
    "verify": Verb(
        line="check every checksum, and that every clip decodes to what is promised",
        words=["SHARDS"],
        settings=VerifyConfig,
    ),
    "encode": Verb(
        line="encode clips once with a frozen VAE, or captions with a text encoder, into shards of their own",
        words=["SHARDS", "OUT"],
        settings=EncodeConfig,
    ),
    "index": Verb(
        line="make shards of others trainable, without changing them: an index beside them, or in OUT",
        words=["SHARDS"],
        settings=IndexConfig,
        more="[OUT] KEY=VALUE",
    ),
    "buckets": Verb(
        line="propose a bucket table for training, with what each row gets and what is lost",
        words=["SHARDS"],
        settings=BucketsConfig,
    ),
    "quarantine": Verb(line="list what could not be used, or let it be tried again", words=["list|retry", "SHARDS"]),
    "remove": Verb(
        line="take clips (by key) or sources (16 digits) down: readers leave them out from now on",
        words=["SHARDS"],
        settings=None,
    ),
    "compact": Verb(line="write shards anew without what was taken down", words=["SHARDS"], settings=None),
    "digits": Verb(
        line="render the demo's data set: handwritten digits that move, as labelled mp4 files",
        words=["OUT"],
        settings=DigitsConfig,
    ),
    "work": Verb(line="do one part of a list of work (what a Slurm array task runs)", words=["LIST"], settings=None),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `sora-data`. Returns the exit status: 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    return run_verb(lambda: _call(arguments.verb, arguments.words, arguments.rest))


def _call(verb: str, words: list[str], rest: list[str]) -> None:
    last, out = Path(words[-1]), None
    if verb == "index" and rest and "=" not in rest[0]:
        out, rest = Path(rest[0]), rest[1:]
    settings: Any = parse(schema, rest) if (schema := VERBS[verb].settings) else None
    if verb in STAGES or verb in ("run", "report"):
        _stage(verb, words, last, settings, rest)
        return
    match verb:
        case "verify":
            from data_tools.verify import verify

            verify(last, settings.workers)
        case "encode":
            from data_tools.encode import encode

            for word in words:
                if "://" in word:
                    raise UserError(f"{word}: encode reads and writes local folders; copy it to a disk first")
            encode(Path(words[0]), last, settings)
        case "index":
            from data_tools.index_tars import index

            index(last, out or last, settings)
        case "buckets":
            from data_tools.buckets import propose

            propose(last, settings)
        case "quarantine":
            from data_tools import quarantine
            from data_tools.job import Job

            job = Job.resume(last, rest)
            if words[0] == "list":
                quarantine.show(job)
            else:
                with job.alone():
                    quarantine.retry(job)
        case "remove" | "compact":
            from data_tools import takedown
            from data_tools.job import locked
            from sora_lite.data.manifest import Manifest

            Manifest.load(last)  # before a folder is made for a lock
            with locked(last):
                takedown.remove(last, rest) if verb == "remove" else takedown.compact(last)
        case "digits":
            from data_tools.digits import render

            render(last, settings.clips, settings.seed)
        case "work":
            from data_tools.slurm import work_chunk

            work_chunk(last)


def _stage(verb: str, words: list[str], folder: Path, settings: DataConfig, rest: list[str]) -> None:
    """A stage alone goes on with the settings of the call before; `run` says all of them."""
    from data_tools import report
    from data_tools.job import Job
    from data_tools.sources import find_sources

    begins = verb in ("run", "probe")
    sources = find_sources(words[0]) if begins else []  # before a folder is made for them
    job = Job(folder, settings) if begins else Job.resume(folder, rest)
    with job.alone():
        if begins:
            job.save_sources(sources)
        job.save_settings()
        if verb == "report":
            print(f"{report.write(job, job.run('dedupe', ()))}: open it in a browser")
            return
        plan = job.run("pack") if verb == "run" else job.run(verb, (verb,))
        report.save(job, plan)
        print(report.summary(plan, job.folder))
        if verb in ("run", "pack") and not job.packed_anything():
            raise UserError(f"none of the {len(plan.sources)} sources gives a clip; the reasons stand above.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sora-data", description="From videos to verified training shards.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        settings = f"settings, as KEY=VALUE:\n{help_text(verb.settings)}" if verb.settings else None
        one = verbs.add_parser(
            name,
            help=verb.line,
            description=verb.line,
            epilog=settings,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for word in verb.words:
            one.add_argument("words", action=_Append, choices=word.split("|") if "|" in word else None, metavar=word)
        one.add_argument("rest", nargs="*", default=[], metavar=verb.more if verb.settings else "KEY")
    return parser


class _Append(argparse.Action):
    """Positional words one after the other into one list, each with its own name in the help."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), values])
