"""What became of every source and every clip: a table for the terminal, report.json, and a page to look at."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

from data_tools.job import Job
from data_tools.plan import KINDS, Fate, Plan, finish
from sora_lite.data.files import replace_file
from sora_lite.data.manifest import MANIFEST, Manifest

REPORT = "report.json"
PAGE = "report.html"
LEFT = "left so far"
"""What is shown in the place of a fate for what the stages so far have left in."""
_NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?"


# --------------------------------------------------------------------------------------------------- what became of all


@dataclass(kw_only=True, slots=True)
class Tally:
    """How much has one fate."""

    sources: int = 0
    clips: int = 0
    frames: int = 0
    """Of the clips, at their own rate."""
    seconds: float = 0.0
    """Of the clips; still images last none."""


def tally(plan: Plan) -> dict[str, Tally]:
    """Fate -> how much has it. "found" comes first and is the sum of the others; LEFT comes last, if anything is."""
    tallies = {kind: Tally() for kind in ("found", *KINDS, LEFT)}
    fates = source_fates(plan)
    for source in plan.sources:
        for kind in ("found", kind_of(fates.get(source.name))):
            tallies[kind].sources += 1
    for clip in plan.clips:
        for kind in ("found", kind_of(plan.clip_fates.get(clip.key))):
            one = tallies[kind]
            one.clips += 1
            one.frames += clip.frames
            one.seconds += 0.0 if clip.media.still else clip.seconds
    left = tallies[LEFT]
    if not left.sources and not left.clips:
        del tallies[LEFT]
    return tallies


def source_fates(plan: Plan) -> dict[str, Fate]:
    """Name of a source -> its fate, also before the end where none of its clips is left."""
    settled = [media for media in plan.media if all(clip.key in plan.clip_fates for clip in media.clips)]
    part = replace(plan, media=settled, source_fates=dict(plan.source_fates))
    finish(part)
    return part.source_fates


def summary(plan: Plan, folder: Path, longest: int = 20) -> str:
    """The table that every verb prints, after any stage. At most `longest` sources, and reasons of clips, are listed.

    folder: of the shards; those that are in its manifest are counted.
    """
    lines = [f"{'':<14}{'sources':>12}{'clips':>12}{'frames':>15}{'h:mm:ss':>12}"]
    for kind, one in tally(plan).items():
        figures = f"{one.sources:>12,}{one.clips:>12,}{one.frames:>15,}{clock(one.seconds):>12}"
        lines.append(f"{kind:<14}{figures}")
    if dropped := sum(media.dropped for media in plan.media):
        lines.append(f"{'in no clip':<14}{'':>24}{dropped:>15,}  in transitions, or too few at the end of a shot")
    lines += [f"{split:<14}{counted(clips, 'clip', 24)} {rest}" for split, clips, rest in splits(folder)]
    sources = [f"  {fate.kind:<13}{name}: {short(fate.reason)}" for name, fate in left_out_sources(plan)]
    clips = [f"  {kind:<13}{counted(count, 'clip')}: {short(reason)}" for kind, reason, count in clip_reasons(plan)]
    for found, what in ((sources, "sources"), (clips, "reasons")):
        lines += found[:longest]
        if len(found) > longest:
            lines.append(f"  and {len(found) - longest:,} more {what}; `sora-data report {folder}` lists all")
    return "\n".join(lines)


def splits(folder: Path) -> Iterator[tuple[str, int, str]]:
    """(split, its clips, what is to be said of them), as the manifest has them."""
    manifest = Manifest.load(folder) if (folder / MANIFEST).exists() else None
    if manifest is None or not manifest.shards:
        return
    for split, samples in manifest.splits.items():
        shards = [entry for entry in manifest.shards if entry.split == split]
        size = sum(entry.bytes for entry in shards) / 2**20
        yield split, samples, f"in {counted(len(shards), 'shard')}, {size:,.1f} MiB"
    if "validation" not in manifest.splits:
        yield "validation", 0, "are held out, so training will show no val_loss"


def left_out_sources(plan: Plan) -> list[tuple[str, Fate]]:
    """(name, fate) of the sources that are not packed: those that could not be used first, each kind by name."""
    fates = source_fates(plan)
    named = [(source.name, fates.get(source.name)) for source in plan.sources]
    found = [(name, fate) for name, fate in named if fate is not None and fate.kind != "packed"]
    return sorted(found, key=lambda pair: _urgency(pair[1].kind))


def clip_reasons(plan: Plan) -> list[tuple[str, str, int]]:
    """(fate, reason without the figures of the single clip, clips): quarantined first, then those of most clips."""
    fates = [fate for fate in plan.clip_fates.values() if fate.kind != "packed"]
    counts = Counter((fate.kind, _in_general(fate.reason)) for fate in fates)
    found = [(kind, reason, count) for (kind, reason), count in counts.items()]
    return sorted(found, key=lambda row: (_urgency(row[0]), -row[2], row[1]))


def kind_of(fate: Fate | None) -> str:
    """In which line of the table something is counted."""
    return LEFT if fate is None else fate.kind


def _urgency(kind: str) -> int:
    return ("quarantined", "filtered", "duplicate", "removed", "packed").index(kind)


def _in_general(reason: str) -> str:
    """motion 0.0123 below 0.02 -> motion below 0.02; looks like KEY -> looks like another clip."""
    if match := re.fullmatch(rf"(\w+) {_NUMBER} (below|above) ({_NUMBER})(.*)", reason):
        score, side, end, origin = match.groups()
        return f"{score} {side} {float(end):.3g}{origin}"
    return re.sub(r"\b[0-9a-f]{16}_-?\d+_-?\d+\b", "another clip", reason)


def short(text: str, most: int = 300) -> str:
    """Reasons quote what stands in damaged files: nothing of it may steer a terminal, or fill it."""
    text = "".join(char if char.isprintable() else "�" for char in text)
    return text if len(text) <= most else f"{text[:most]} …"


def counted(count: int, word: str, width: int = 0) -> str:
    """1 clip, 1,234 clips. width: of the number."""
    return f"{count:>{width},} {word}{'s' * (count != 1)}"


def clock(seconds: float | Fraction, digits: int = 0) -> str:
    """1:02:03; digits: of the part of a second."""
    ticks = round(seconds * 10**digits)
    whole, rest = divmod(ticks, 10**digits)
    text = f"{whole // 3600:,}:{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{text}.{rest:0{digits}}" if digits else text


# ---------------------------------------------------------------------------------------------------------- both files


def save(job: Job, plan: Plan) -> Path:
    """Write report.json into the folder of the shards: settings, counts, and all that is left out, with reasons."""
    content = {"settings": job.config.content(), "counts": _counts(plan), **_left_out(plan)}
    path = job.folder / REPORT
    replace_file(path, json.dumps(content, indent=1).encode() + b"\n")
    return path


def write(job: Job, plan: Plan) -> Path:
    """Write report.json, and report.html beside it; the path of the latter.

    Frames are decoded by workers; those that cannot be are shown with the reason.
    """
    from data_tools.report_page import Page  # brings what no other verb needs

    save(job, plan)
    path = job.folder / PAGE
    replace_file(path, Page(job, plan).render().encode("utf-8", "replace"))
    return path


def _counts(plan: Plan) -> dict[str, int]:
    """As `Plan.count`, and what is left so far."""
    tallies = {kind.removesuffix(" so far"): one for kind, one in tally(plan).items()}
    counts = {f"sources_{kind}": one.sources for kind, one in tallies.items()}
    counts |= {f"clips_{kind}": one.clips for kind, one in tallies.items()}
    dropped = sum(media.dropped for media in plan.media)
    return counts | {"frames_packed": tallies["packed"].frames, "frames_dropped": dropped}


def _left_out(plan: Plan) -> dict[str, list[dict[str, str]]]:
    """Every source and every clip that is not packed; clips in the order of packing."""
    sources = [{"name": name, **asdict(fate)} for name, fate in left_out_sources(plan)]
    clips = [
        {"key": clip.key, "source": clip.media.source.name, **asdict(fate)}
        for clip in plan.clips
        if (fate := plan.clip_fates.get(clip.key)) is not None and fate.kind != "packed"
    ]
    return {"sources": sources, "clips": clips}
