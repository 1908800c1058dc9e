"""Settings of `sora-data`."""

import hashlib
import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from sora_lite.config import Format, QueueConfig
from sora_lite.data.manifest import to_json
from sora_lite.errors import UserError

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


class Detector(Enum):
    """How shot boundaries are found."""

    luma = "luma"
    transnet = "transnet"
    none = "none"


class Flag(Enum):
    """What probing says of a video that may spoil it for training."""

    hdr = "hdr"
    interlaced = "interlaced"
    variable_rate = "variable_rate"


class Score(Enum):
    """What is measured of a clip; `data_tools/score.py` says how."""

    motion = "motion"
    static_ratio = "static_ratio"
    sharpness = "sharpness"
    brightness = "brightness"
    contrast = "contrast"
    dark_ratio = "dark_ratio"
    bright_ratio = "bright_ratio"
    letterbox = "letterbox"
    text_ratio = "text_ratio"
    aesthetic = "aesthetic"


SCORES = tuple(score.value for score in Score)


class CaptionSource(Enum):
    """Where captions come from."""

    metadata = "metadata"
    sidecar = "sidecar"
    command = "command"
    http = "http"


class Executor(Enum):
    """Who does the work of a stage."""

    local = "local"
    slurm = "slurm"


@dataclass(kw_only=True, slots=True)
class ProbeConfig:
    """What a file may claim and hold; beyond it, it is quarantined before anything is decoded."""

    max_megapixels: float = 64.0
    """Largest picture, in millions of pixels (8K video has 33)."""
    max_frames: int = 2_000_000
    """Most frames of a file."""
    max_hours: float = 24.0
    """Longest file."""
    max_streams: int = 32
    """Most streams (video, audio, subtitles) of a file."""
    max_gigabytes: float = 64.0
    """Largest file."""


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """Shots, and the clips that are cut from each of them."""

    detector: Detector = Detector.luma
    """luma: cuts, fades and most dissolves, from small pictures. transnet: a network finds more dissolves, at a tenth
    of the speed. none: every file is one shot."""
    weights: str | None = None
    """File with TransNetV2's weights, for split.detector=transnet."""
    fps: float | None = None
    """Frames per second of the clips; null keeps each video's own average rate."""
    clip_frames: int | None = None
    """Frames of a clip; null derives them from split.clip_seconds."""
    clip_seconds: float = 4.0
    """Length of a clip where split.clip_frames is null. A longer shot is tiled into clips, without gaps."""
    min_frames: int = 17
    """What is left at the end of a shot becomes a shorter clip if it has so many frames, and else is dropped."""


@dataclass(kw_only=True, slots=True)
class ScoreConfig:
    """What is measured of each clip."""

    fps: float = 2.0
    """Frames looked at per second of a clip; at least 3 of each."""
    text: bool = False
    """Whether to measure how much of the picture is text (slow; needs the extra `text`)."""
    aesthetic: str | None = None
    """Folder with a CLIP model and an aesthetic head (head.safetensors); null leaves this score out."""


@dataclass(kw_only=True, slots=True)
class FilterRule:
    """One condition on a score. What is measured outside of it is left out."""

    score: Score
    """Name of the score."""
    min: float | None = None
    """Least value that is kept."""
    max: float | None = None
    """Largest value that is kept."""
    min_percentile: float | None = None
    """As min, but as a percentile (0 to 100) over all clips."""
    max_percentile: float | None = None
    """As max, but as a percentile (0 to 100) over all clips."""


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which clips are left out for what they are."""

    rules: list[FilterRule] = field(default_factory=list)
    """Rows such as {score: motion, min: 0.02}; `sora-data report` shows what each would leave out."""
    keep_flagged: list[Flag] = field(default_factory=lambda: [Flag.variable_rate])
    """Flags of videos that are kept all the same: hdr, interlaced, variable_rate."""


@dataclass(kw_only=True, slots=True)
class DedupeConfig:
    """What counts as the same clip twice. Exact copies are always left out."""

    near: bool = True
    """Whether to look for near duplicates by perceptual hash."""
    distance: int = 6
    """Most bits of 64 in which the hashes of two alike pictures differ."""
    overlap: float = 0.5
    """Part of the seconds of the shorter clip that must be alike."""


@dataclass(kw_only=True, slots=True)
class CaptionConfig:
    """Where the clips' captions come from."""

    source: CaptionSource = CaptionSource.metadata
    """metadata: columns caption and captions. sidecar: a .txt or .json beside each video. command, http: ask."""
    command: list[str] = field(default_factory=list)
    """For command: a program with its arguments. A folder of pictures of the clip is added to them; every line that
    it prints is a caption."""
    url: str = "http://localhost:8000/v1/chat/completions"
    """For http: an endpoint that speaks OpenAI's chat completions with pictures."""
    model: str = ""
    """For http: name of the model to ask for."""
    prompt: str = "Describe this video in one or two sentences. These are frames of it, in order."
    """For http: what is asked with the pictures."""
    key_env: str = ""
    """For http: environment variable that holds the key, such as OPENAI_API_KEY. It is never stored or shown."""
    count: int = 1
    """For http: captions per clip."""
    frames: int = 8
    """For command, http: pictures per clip, evenly over its length."""
    side: int = 512
    """For command, http: longest side of these pictures in pixels."""
    concurrency: int = 8
    """For command, http: clips asked about at once."""
    retries: int = 5
    """For http: further attempts after an answer that asks for patience, or none."""
    timeout_seconds: float = 120.0
    """For command, http: longest wait for one answer."""


@dataclass(kw_only=True, slots=True)
class PackConfig:
    """How clips are encoded and put into shards."""

    max_side: int | None = None
    """Longest side in pixels; larger videos are scaled down. null keeps their size."""
    crop: bool = True
    """Whether black bars are cut off."""
    crf: int = 18
    """Quality of the clips as x264 counts it: 0 is nearly lossless, 23 is usual for watching, 51 is worst."""
    preset: str = "medium"
    """x264's speed, ultrafast to veryslow: slower makes smaller files."""
    shard_mb: int = 256
    """Size in MiB at which a shard is closed."""


@dataclass(kw_only=True, slots=True)
class ArrayConfig(QueueConfig):
    """How a stage is handed to Slurm, for executor=slurm."""

    tasks: int = 8
    """Tasks of the job array; each takes its part of the list of work."""
    cpus_per_task: int = 4
    """Cores, and decoding processes, of a task."""
    gpus_per_task: int = 0
    """GPUs of a task, for `sora-data encode`."""


@dataclass(kw_only=True, slots=True)
class PoolConfig:
    """Worker processes of this machine, and what each may take."""

    workers: int | None = None
    """Processes; null takes one per core, 0 works in this one (where a file that crashes a decoder ends all)."""
    stall_seconds: float = 60.0
    """A worker that shows no progress for so long is killed; a second time, what it was at is left out."""
    memory_mb: int = 4096
    """Memory in MiB that a worker may take beyond what it starts with."""

    def check_pool(self) -> None:
        """Raise UserError for a value that cannot be."""
        rules: list[tuple[bool, str, str]] = [
            (self.workers is None or self.workers >= 0, "workers", "must be at least 0"),
            (self.stall_seconds > 0, "stall_seconds", "must be above 0"),
            (self.memory_mb >= 64, "memory_mb", "must be at least 64"),
        ]
        refuse(self, rules)


@dataclass(kw_only=True, slots=True)
class WorkConfig(PoolConfig):
    """Who does the work: workers here, or a job array."""

    executor: Executor = Executor.local
    """local: processes of this machine. slurm: job arrays."""
    slurm: ArrayConfig = field(default_factory=ArrayConfig)

    @property
    def costly_units(self) -> bool:
        """Whether a unit takes so long that each is written down at once."""
        return False

    def check_work(self) -> None:
        """Raise UserError for a value that cannot be."""
        self.check_pool()
        rules: list[tuple[bool, str, str]] = [
            (self.slurm.tasks >= 1, "slurm.tasks", "must be at least 1"),
            (self.slurm.cpus_per_task >= 1, "slurm.cpus_per_task", "must be at least 1"),
            (self.slurm.gpus_per_task >= 0, "slurm.gpus_per_task", "must be at least 0"),
        ]
        refuse(self, rules)


@dataclass(kw_only=True, slots=True)
class DataConfig(WorkConfig):
    """`sora-data`: from videos to shards."""

    work: str | None = None
    """Folder of what the stages found; null is .work in the folder of shards. Another folder of shards that is made
    of the same videos may share it."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    dedupe: DedupeConfig = field(default_factory=DedupeConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    validation_fraction: float = 0.05
    """Part of the sources (or of their groups, where the list has a column `group`) that is held out."""
    licence: str | None = None
    """Licence of the videos, to be kept with every clip."""

    def __post_init__(self) -> None:
        self.check_work()
        split, pack = self.split, self.pack
        rules: list[tuple[bool, str, str]] = [
            (self.probe.max_megapixels > 0, "probe.max_megapixels", "must be above 0"),
            (self.probe.max_frames >= 1, "probe.max_frames", "must be at least 1"),
            (split.fps is None or 0 < split.fps <= 1000, "split.fps", "must lie in (0, 1000]"),
            (0 < split.clip_seconds < math.inf, "split.clip_seconds", "must be above 0, and a number"),
            (split.min_frames >= 1, "split.min_frames", "must be at least 1"),
            (
                split.clip_frames is None or split.clip_frames >= split.min_frames,
                "split.clip_frames",
                f"is below split.min_frames={split.min_frames}, so that no clip would be long enough; lower that too",
            ),
            (
                split.detector != Detector.transnet or split.weights is not None,
                "split.weights",
                "split.detector=transnet needs the file of its weights",
            ),
            (0 < self.score.fps <= 1000, "score.fps", "must lie in (0, 1000]"),
            (0 <= self.dedupe.distance <= 16, "dedupe.distance", "must lie in [0, 16]"),
            (0 < self.dedupe.overlap <= 1, "dedupe.overlap", "must lie in (0, 1]"),
            (
                self.caption.source != CaptionSource.command or len(self.caption.command) > 0,
                "caption.command",
                "caption.source=command needs a program, such as [python, caption.py]",
            ),
            (
                self.caption.source != CaptionSource.http or self.caption.model != "",
                "caption.model",
                "caption.source=http needs the name of a model",
            ),
            (self.caption.count >= 1, "caption.count", "must be at least 1"),
            (self.caption.frames >= 1, "caption.frames", "must be at least 1"),
            (self.caption.side >= 16, "caption.side", "must be at least 16"),
            (0 < self.caption.timeout_seconds < math.inf, "caption.timeout_seconds", "must be above 0, and a number"),
            (self.caption.concurrency >= 1, "caption.concurrency", "must be at least 1"),
            (pack.max_side is None or pack.max_side >= 16, "pack.max_side", "must be at least 16"),
            (0 <= pack.crf <= 51, "pack.crf", "must lie in [0, 51]"),
            (pack.preset in PRESETS, "pack.preset", f"must be one of {', '.join(PRESETS)}"),
            (pack.shard_mb >= 1, "pack.shard_mb", "must be at least 1"),
            (0 <= self.validation_fraction < 1, "validation_fraction", "must lie in [0, 1)"),
        ]
        refuse(self, rules)
        for i, row in enumerate(self.filter.rules):
            limits = (row.min, row.max, row.min_percentile, row.max_percentile)
            if all(limit is None for limit in limits):
                raise UserError(f"filter.rules[{i}]: needs one of min, max, min_percentile, max_percentile.")
            if any(limit is not None and not 0 <= limit <= 100 for limit in limits[2:]):
                raise UserError(f"filter.rules[{i}]: percentiles lie in [0, 100].")

    def content(self) -> dict[str, Any]:
        """The settings that decide what is in the shards, as JSON's types."""
        how = ("work", "executor", "workers", "stall_seconds", "memory_mb", "slurm")
        return {name: value for name, value in plain(self).items() if name not in how}

    def hash(self) -> str:
        """SHA-256 of `content`."""
        return digest(self.content())


@dataclass(kw_only=True, slots=True)
class IndexConfig(PoolConfig):
    """`sora-data index`."""

    validation_fraction: float = 0.05
    """Part of the sources that is held out, by a hash of their names."""
    source_field: str = "url"
    """Field of KEY.json that names what a sample was cut from: those of one source stay on one side of the split. A
    sample that has no such field is a source of its own."""

    def __post_init__(self) -> None:
        self.check_pool()
        refuse(self, [(0 <= self.validation_fraction < 1, "validation_fraction", "must lie in [0, 1)")])


@dataclass(kw_only=True, slots=True)
class BucketsConfig:
    """`sora-data buckets`."""

    fps: float | None = None
    """Frames per second of all rows; null takes a usual rate that nine tenths of the clips have at least."""
    sides: list[int] = field(default_factory=list)
    """Sides of squares of the rows' areas, in pixels; empty takes the largest that enlarges a tenth of the samples."""
    frames: list[int] = field(default_factory=list)
    """Lengths of the rows; empty takes those that the samples have."""
    lengths: int = 2
    """Where frames is empty: most different lengths."""
    longest: int = 129
    """Where frames is empty: most frames."""
    ratios: int = 5
    """Most aspect ratios."""
    crop: float = 0.03
    """Part of the area that may be cut off on average; more ratios are taken until it is."""
    multiple: int = 16
    """Heights and widths are multiples of it."""
    format: Format = Format.table
    """`table` (and a picture in the folder of shards), or `json`."""

    def __post_init__(self) -> None:
        least_one = ("lengths", "longest", "ratios", "multiple")
        refuse(self, [(getattr(self, key) >= 1, key, "must be at least 1") for key in least_one])
        refuse(self, [(self.fps is None or self.fps > 0, "fps", "must be above 0")])
        if any(one < 1 for one in [*self.sides, *self.frames]):
            raise UserError("sides, frames: must be at least 1.")


def refuse(settings: Any, rules: list[tuple[bool, str, str]]) -> None:
    """Raise UserError for the first of (holds, key, rule) that does not hold."""
    for holds, key, rule in rules:
        if not holds:
            value = settings
            for name in key.split("."):
                value = getattr(value, name)
            raise UserError(f"{key}={value}: {rule}.")


def plain(settings: Any) -> dict[str, Any]:
    """Settings as JSON's types: names of enum members for the members."""

    def simple(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {name: simple(inner) for name, inner in value.items()}
        return [simple(inner) for inner in value] if isinstance(value, list) else value

    return simple(asdict(settings))


def digest(content: Any) -> str:
    """SHA-256 of something made of JSON's types."""
    return hashlib.sha256(to_json({"": content})).hexdigest()
