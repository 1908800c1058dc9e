"""What became of every source and every clip: the table that is printed, and report.json."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_tools.config import PrepareConfig
from sora_lite.data.shards import Manifest, replace_file
from sora_lite.errors import UserError

REPORT = "report.json"


@dataclass(kw_only=True, slots=True)
class Excluded:
    """A source that gives no clip."""

    file: str
    kind: str
    """bad, unusable or duplicate."""
    reason: str


@dataclass(kw_only=True, slots=True)
class Report:
    """Sums to: sources found = packed + those excluded."""

    found: int
    packed: int = 0
    clips: int = 0
    captioned: int = 0
    """Clips with a caption."""
    labelled: int = 0
    """Clips with a label."""
    frames: int = 0
    dropped_frames: int = 0
    """Frames at the ends of sources, too few for a clip."""
    excluded: list[Excluded] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Flat figures, as the manifest keeps them."""
        kinds = Counter(item.kind for item in self.excluded)
        counts = {
            "sources_found": self.found,
            "sources_packed": self.packed,
            **{f"sources_{kind}": kinds[kind] for kind in ("bad", "unusable", "duplicate")},
            "clips": self.clips,
            "clips_captioned": self.captioned,
            "clips_labelled": self.labelled,
            "frames": self.frames,
            "frames_dropped": self.dropped_frames,
        }
        if self.found != self.packed + len(self.excluded):
            raise RuntimeError(f"sources got lost: {counts}")
        return counts

    def save(self, folder: Path, config: PrepareConfig) -> None:
        """Write FOLDER/report.json."""
        content = {
            "settings": config.content(),
            "counts": self.counts(),
            "excluded": [asdict(e) for e in self.excluded],
        }
        replace_file(folder / REPORT, json.dumps(content, indent=1).encode() + b"\n")

    def table(self, folder: Path, manifest: Manifest | None, longest: int = 20) -> str:
        """The summary for people; at most `longest` excluded files are listed."""
        lines = [f"{name.replace('_', ' '):<20}{count:>10,}" for name, count in self.counts().items()]
        for split, samples in (manifest.splits if manifest else {}).items():
            shards = [entry for entry in manifest.shards if entry.split == split] if manifest else []
            size = sum(entry.bytes for entry in shards) / 2**20
            lines.append(f"{split:<20}{samples:>10,} clips in {len(shards)} shards, {size:,.1f} MiB")
        if manifest and "validation" not in manifest.splits:
            lines.append(f"{'validation':<20}{0:>10,} clips: nothing is held out, so training will show no val_loss")
        lines += [f"  {item.kind:<10} {item.file}: {item.reason}" for item in self.excluded[:longest]]
        if len(self.excluded) > longest:
            lines.append(f"  and {len(self.excluded) - longest} more, all in {folder / REPORT}")
        return "\n".join(lines)

    def require_clips(self, folder: Path) -> None:
        """Raise UserError if nothing is left."""
        if self.clips == 0:
            first = self.excluded[0]
            raise UserError(
                f"none of the {self.found} sources gives a clip (first: {first.file}: {first.reason}); "
                f"all reasons are in {folder / REPORT}"
            )
