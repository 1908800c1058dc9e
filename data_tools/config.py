"""Settings of `sora-data run`, and how `key=value` on its command line becomes them."""

import difflib
import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sora_lite.config import field_docs
from sora_lite.data.shards import to_json
from sora_lite.errors import UserError

Settings = TypeVar("Settings")


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """`sora-data run`: what clips are made of the videos."""

    fps: float | None = None
    """Frames per second of the clips; null keeps each video's own average rate."""
    clip_frames: int | None = None
    """Frames of a clip; null derives them from clip_seconds."""
    clip_seconds: float = 4.0
    """Length of a clip where clip_frames is null. A longer video is tiled into clips, without gaps."""
    min_frames: int = 17
    """What is left at the end of a video becomes a shorter clip if it has so many frames, and else is dropped."""
    max_side: int | None = None
    """Longest side in pixels; larger videos are scaled down. null keeps their size."""
    crf: int = 18
    """Quality of the clips as x264 counts it: 0 is nearly lossless, 23 is usual for watching, 51 is worst."""
    preset: str = "medium"
    """x264's speed, ultrafast to veryslow: slower makes smaller files."""
    shard_mb: int = 256
    """Size in MiB at which a shard is closed."""
    validation_fraction: float = 0.05
    """Part of the sources (or of their groups, where metadata.jsonl has a column `group`) that is held out."""
    licence: str | None = None
    """Licence of the videos, to be kept with every clip."""
    workers: int | None = None
    """Processes that decode and encode; 0 works in this one, null takes one per core. The result is the same."""

    def __post_init__(self) -> None:
        def require(holds: bool, key: str, rule: str) -> None:
            if not holds:
                raise UserError(f"{key}={getattr(self, key)}: {rule}.")

        require(self.fps is None or 0 < self.fps <= 1000, "fps", "must lie in (0, 1000]")
        require(self.clip_seconds > 0, "clip_seconds", "must be above 0")
        require(self.min_frames >= 1, "min_frames", "must be at least 1")
        require(
            self.clip_frames is None or self.clip_frames >= self.min_frames,
            "clip_frames",
            f"is below min_frames={self.min_frames}, so that no clip would be long enough; lower min_frames too",
        )
        require(self.max_side is None or self.max_side >= 16, "max_side", "must be at least 16")
        require(0 <= self.crf <= 51, "crf", "must lie in [0, 51]")
        require(self.preset in PRESETS, "preset", f"must be one of {', '.join(PRESETS)}")
        require(self.shard_mb >= 1, "shard_mb", "must be at least 1")
        require(0 <= self.validation_fraction < 1, "validation_fraction", "must lie in [0, 1)")
        require(self.workers is None or self.workers >= 0, "workers", "must be at least 0")

    def content(self) -> dict[str, Any]:
        """The settings that decide what is in the shards."""
        return {name: value for name, value in asdict(self).items() if name != "workers"}

    def hash(self) -> str:
        """SHA-256 of `content`."""
        return hashlib.sha256(to_json(self.content())).hexdigest()


PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


def parse(schema: type[Settings], overrides: list[str]) -> Settings:
    """Turn KEY=VALUE words into a settings object. Raises UserError for an unknown key or a wrong value."""
    names = [field.name for field in fields(schema)]  # type: ignore[arg-type]
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals:
            raise UserError(f"{word}: neither a setting KEY=VALUE nor expected here; see --help.")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
            raise UserError(f"{key}: no such key; " + (f"the nearest is {near[0]}" if near else ", ".join(names)))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(overrides))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'settings'}: {str(error).splitlines()[0]}") from None


def help_text(schema: type) -> str:
    """Every setting of a schema with its default and doc string."""
    docs, lines = field_docs(schema), []
    for field in fields(schema):
        default = "null" if field.default is None else field.default
        lines.append(f"  {field.name}={default}\n      {docs[field.name]}")
    return "\n".join(lines)
