"""First stage: hash and decode every source once, and remember what was found."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from data_tools.pool import ordered_map
from data_tools.sources import Source
from sora_lite.data.shards import to_json
from sora_lite.data.video import BadVideo, VideoFacts, probe


@dataclass(kw_only=True, slots=True)
class Probed:
    """What is known of a file: its hash, and either what decoding it showed or why that failed."""

    sha256: str
    facts: VideoFacts | None = None
    reason: str = ""

    def to_row(self) -> dict[str, Any]:
        """As JSON. Times are stored as their differences in runs, [difference, how often], which is short."""
        row: dict[str, Any] = {"sha256": self.sha256, "reason": self.reason}
        if (facts := self.facts) is not None:
            steps = np.diff(facts.pts)
            starts = np.flatnonzero(np.diff(steps, prepend=0)) if len(steps) else np.zeros(0, dtype=np.int64)
            lengths = np.diff(starts, append=len(steps))
            row["facts"] = {
                **{name: getattr(facts, name) for name in ("container", "codec", "width", "height", "rotation")},
                **{name: str(getattr(facts, name)) for name in ("sar", "time_base", "average_rate")},
                "start": int(facts.pts[0]),
                "runs": [[int(steps[i]), int(n)] for i, n in zip(starts, lengths, strict=True)],
            }
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """The inverse of `to_row`."""
        if "facts" not in row:
            return cls(sha256=row["sha256"], reason=row["reason"])
        fields = dict(row["facts"])
        runs = np.array(fields.pop("runs"), dtype=np.int64).reshape(-1, 2)
        pts = np.concatenate([[fields.pop("start")], np.repeat(runs[:, 0], runs[:, 1])]).cumsum()
        for name in ("sar", "time_base", "average_rate"):
            fields[name] = Fraction(fields[name])
        return cls(sha256=row["sha256"], facts=VideoFacts(pts=pts.astype(np.int64), **fields))


def probe_sources(sources: list[Source], memory: Path, workers: int | None) -> list[Probed]:
    """Probe all sources, in their order. `memory` is a JSONL file of earlier finds, by name, size and time."""
    known = _remembered(memory)
    stamps = [[source.name, *_stamp(source.path)] for source in sources]
    missing = [source for source, stamp in zip(sources, stamps, strict=True) if json.dumps(stamp) not in known]
    fresh: Iterator[Probed] = ordered_map(examine, (source.path for source in missing), workers if missing else 0)
    results = []
    with memory.open("ab") as file, tqdm(total=len(missing), desc="probe", unit="file", mininterval=0.5) as bar:
        for stamp in stamps:
            probed = known.get(json.dumps(stamp))
            if probed is None:
                probed = next(fresh)
                file.write(to_json({"stamp": stamp, **probed.to_row()}) + b"\n")
                bar.update()
            results.append(probed)
    return results


def examine(path: Path) -> Probed:
    """Hash and decode one file."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return Probed(sha256="", reason=f"cannot be read: {error.strerror}")
    try:
        return Probed(sha256=sha256, facts=probe(path))
    except BadVideo as reason:
        return Probed(sha256=sha256, reason=str(reason))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _remembered(memory: Path) -> dict[str, Probed]:
    """By JSON of (name, size, time). A last line without an end was being written when the run was killed."""
    if not memory.exists():
        return {}
    content = memory.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        memory.write_bytes(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    return {json.dumps(row["stamp"]): Probed.from_row(row) for row in rows}
