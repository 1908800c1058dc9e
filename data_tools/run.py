"""`sora-data run`: all stages, one after the other. Call it again and it goes on where it stopped."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.config import PrepareConfig
from data_tools.pack import Planned, pack, plan_hash
from data_tools.probe import Probed, probe_sources
from data_tools.report import Excluded, Report
from data_tools.sources import Source, find_sources
from data_tools.split import Tiling, Unusable, held_out, tile
from sora_lite.data.shards import MANIFEST, Manifest
from sora_lite.errors import UserError


def run(videos: Path, folder: Path, config: PrepareConfig) -> None:
    """Make shards in `folder` from the files under `videos`.

    Raises UserError if there is nothing to pack, or if `folder` holds shards of other settings or other videos.
    """
    sources = find_sources(videos)
    with _alone_in(folder):
        manifest = _begun(folder, config)
        probed = probe_sources(sources, folder / ".work" / "probe.jsonl", config.workers)
        plan, report = make_plan(sources, probed, config)
        report.save(folder, config)
        report.require_clips(folder)
        _check_plan(manifest, plan_hash(plan), folder)
        if manifest.complete:
            print(f"{folder} is complete: nothing to do")
        else:
            manifest.plan_hash = plan_hash(plan)
            manifest.save(folder)
            pack(plan, folder, manifest, config)
            manifest.complete, manifest.counts = True, report.counts()
            manifest.save(folder)
        print(report.table(folder, manifest))


def make_plan(sources: list[Source], probed: list[Probed], config: PrepareConfig) -> tuple[list[Planned], Report]:
    """Decide what becomes of every source. The plan is in order of the sources' hashes, which shuffles them."""
    report = Report(found=len(sources))
    first: dict[str, str] = {}
    usable: list[tuple[Source, Probed, Tiling]] = []
    for source, found in sorted(zip(sources, probed, strict=True), key=lambda pair: (pair[1].sha256, pair[0].name)):
        if found.facts is None:
            report.excluded.append(Excluded(file=source.name, kind="bad", reason=found.reason))
        elif found.sha256 in first:
            reason = f"has the same bytes as {first[found.sha256]}"
            report.excluded.append(Excluded(file=source.name, kind="duplicate", reason=reason))
        else:
            first[found.sha256] = source.name
            try:
                usable.append((source, found, tile(found.facts, config)))
            except Unusable as reason:
                report.excluded.append(Excluded(file=source.name, kind="unusable", reason=str(reason)))
    groups = [source.row.group or found.sha256 for source, found, _ in usable]
    held = held_out(set(groups), config.validation_fraction)
    plan = [
        Planned(
            source=source,
            probed=found,
            tiling=tiling,
            split="validation" if group in held else "train",
            config=config,
        )
        for (source, found, tiling), group in zip(usable, groups, strict=True)
    ]
    report.excluded.sort(key=lambda item: (item.kind, item.file))
    report.packed = len(plan)
    report.clips = sum(planned.clips for planned in plan)
    report.captioned = sum(planned.clips for planned in plan if planned.source.row.captions)
    report.labelled = sum(planned.clips for planned in plan if planned.source.row.label is not None)
    report.frames = sum(int(planned.tiling.bounds[-1]) for planned in plan)
    report.dropped_frames = sum(planned.tiling.dropped for planned in plan)
    return plan, report


def _begun(folder: Path, config: PrepareConfig) -> Manifest:
    """The manifest that an earlier call left, or a new one."""
    if not (folder / MANIFEST).exists():
        return Manifest(config_hash=config.hash())
    manifest = Manifest.load(folder)
    if manifest.config_hash != config.hash():
        raise UserError(
            f"{folder}: holds shards that were made with other settings (see report.json there); "
            "give the same settings, or name another folder for the shards."
        )
    return manifest


def _check_plan(manifest: Manifest, planned: str, folder: Path) -> None:
    if manifest.plan_hash not in ("", planned):
        raise UserError(
            f"{folder}: was made from other videos or another metadata.jsonl than are there now; "
            "put them back, or name another folder for the shards."
        )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Create the folder and keep a second run out of it; the kernel drops the lock with the process."""
    (folder / ".work").mkdir(parents=True, exist_ok=True)
    with (folder / ".work" / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another sora-data is at work in it; wait for its end or stop it.") from None
        yield
