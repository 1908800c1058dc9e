"""First stage: decode all of every source once, hash it, and remember what was found."""

import hashlib
import os
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Self

import numpy as np
import pyarrow as pa

from data_tools.config import ProbeConfig
from data_tools.locations import open_source
from data_tools.pool import Rows, Task, beat
from data_tools.sources import Source
from data_tools.state import Unit
from sora_lite.data.video import BadVideo, Limits, VideoFacts, probe

SCHEMA = pa.schema(
    [
        ("sha256", pa.string()),
        ("container", pa.string()),
        ("codec", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sar", pa.string()),
        ("rotation", pa.int32()),
        ("time_base", pa.string()),
        ("average_rate", pa.string()),
        ("bit_depth", pa.int32()),
        ("hdr", pa.bool_()),
        ("interlaced", pa.bool_()),
        ("variable_rate", pa.bool_()),
        ("frames_hash", pa.string()),
        ("start", pa.int64()),
        ("steps", pa.list_(pa.int64())),
        ("repeats", pa.list_(pa.int64())),
    ]
)
"""Times are kept as their differences in runs: `repeats[i]` frames in a row, each `steps[i]` ticks after the last."""

_PLAIN = ("container", "codec", "width", "height", "rotation", "bit_depth", "hdr", "interlaced", "variable_rate")
_FRACTIONS = ("sar", "time_base", "average_rate")
_BLOCK = 1 << 24


@dataclass(kw_only=True, slots=True)
class Probed:
    """What is known of a good file: its hash, and what decoding it showed (as JSON's types; `facts` unfolds it)."""

    sha256: str
    row: dict[str, Any]
    limits: dict[str, Any] = field(default_factory=lambda: asdict(Limits()))
    """What the file may hold, in later stages too."""

    @property
    def facts(self) -> VideoFacts:
        """Unfolded anew at each use: the times of a long video take megabytes."""
        return facts_of(self.row)

    @classmethod
    def from_facts(cls, sha256: str, facts: VideoFacts) -> Self:
        """From what `sora_lite.data.video.probe` found."""
        steps = np.diff(facts.pts)
        starts = np.flatnonzero(np.diff(steps, prepend=0)) if len(steps) else np.zeros(0, dtype=np.int64)
        row = {name: getattr(facts, name) for name in (*_PLAIN, "frames_hash")}
        row |= {name: str(getattr(facts, name)) for name in _FRACTIONS}
        row["start"] = int(facts.pts[0])
        row["steps"] = steps[starts].tolist()
        row["repeats"] = np.diff(starts, append=len(steps)).tolist()
        return cls(sha256=sha256, row=row)


def facts_of(row: dict[str, Any]) -> VideoFacts:
    """The inverse of `Probed.from_facts`."""
    pts = np.concatenate([[row["start"]], np.repeat(row["steps"], row["repeats"])]).astype(np.int64).cumsum()
    fractions: dict[str, Any] = {name: Fraction(row[name]) for name in _FRACTIONS}
    return VideoFacts(pts=pts, frames_hash=row["frames_hash"], **fractions, **{name: row[name] for name in _PLAIN})


def limits_of(config: ProbeConfig) -> dict[str, Any]:
    """The limits that settings mean, as JSON's types."""
    limits = Limits(
        max_pixels=int(config.max_megapixels * 1e6),
        max_frames=config.max_frames,
        max_seconds=config.max_hours * 3600,
        max_streams=config.max_streams,
        max_bytes=int(config.max_gigabytes * 2**30),
    )
    return asdict(limits)


def probe_unit(source: Source, config: ProbeConfig) -> Unit:
    """The work on one source."""
    key = probe_key(source)
    return Unit(keys=[key], task={"key": key, "location": source.location, "limits": limits_of(config)})


def probe_key(source: Source) -> str:
    """A file that was changed is another one."""
    return hashlib.sha256(os.fsencode(f"{source.location}\n{source.stamp()}")).hexdigest()[:32]


def work(task: Task) -> Rows:
    """Decode and hash one file. A file that cannot be used raises BadVideo or OSError, whose text is the reason."""
    limits = Limits(**task["limits"])
    with open_source(task["location"], limits.max_bytes) as file:
        size = file.seek(0, 2)
        if size > limits.max_bytes:
            raise BadVideo(f"has {size / 2**30:.1f} GiB (probe.max_gigabytes)")
        facts = probe(file, limits, beat)  # first, since most of what is bad shows at once, however large it is
        file.seek(0)
        sha256 = hashlib.sha256()
        while block := file.read(_BLOCK):
            sha256.update(block)
            beat()
        probed = Probed.from_facts(sha256.hexdigest(), facts)
    return [{"key": task["key"], "sha256": probed.sha256, **probed.row}]
