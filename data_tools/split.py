"""Second stage: where shots begin and end, and which clips are cut from them.

Finding shots decodes every source; what clips that gives is arithmetic, done anew at every call.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.config import DataConfig, Detector, SplitConfig
from data_tools.locations import open_source
from data_tools.pool import Rows, Task, beat
from data_tools.probe import Probed, facts_of
from data_tools.shots import Transition, find_transitions, shots_of
from data_tools.sources import Source
from data_tools.state import Unit
from sora_lite.data.video import STILLS, BadVideo, Limits, VideoFacts, rational, read_frames

SCHEMA = pa.schema(
    [("kinds", pa.list_(pa.string())), ("firsts", pa.list_(pa.int64())), ("lasts", pa.list_(pa.int64()))]
)
"""Transitions: `firsts[i]` is the first frame of one, `lasts[i]` the first after it (equal for a hard cut)."""

MIN_SIDE = 16
"""Smaller pictures hold nothing to learn from, and video codecs do not like them."""
STRETCH = 16
"""Most clips of a source that a worker takes at a time: it decodes them in one go and holds their files in memory."""

Shot = tuple[int, int]
"""First frame, and first frame after it."""


@dataclass(kw_only=True, slots=True)
class Media:
    """A source that was probed, and the clips that its shots give."""

    source: Source
    probed: Probed
    shots: list[Shot]
    fps: Fraction
    """Frames per second of the clips."""
    size: tuple[int, int]
    """Height and width of the upright picture in square pixels."""
    clips: list["Clip"] = field(default_factory=list)
    dropped: int = 0
    """Frames in transitions, and at the ends of shots where they are too few for a clip; at the clips' rate."""

    @property
    def sha256(self) -> str:
        return self.probed.sha256

    @property
    def still(self) -> bool:
        return self.probed.row["container"] in STILLS


@dataclass(kw_only=True, slots=True)
class Clip:
    """A piece of a shot: frames [first, last) of those that the shot has at the clips' rate."""

    key: str
    """Made from content alone: the source's hash and the times of the clip's first and last frame."""
    media: Media
    number: int
    """Place among the clips of the source."""
    shot: int
    first: int
    last: int
    start_pts: int
    end_pts: int

    @property
    def frames(self) -> int:
        return self.last - self.first

    @property
    def seconds(self) -> float:
        return float(self.frames / self.media.fps)


def shots_unit(source: Source, probed: Probed, config: SplitConfig) -> Unit:
    """The work of finding the shots of one source."""
    frames = 1 + sum(probed.row["repeats"])
    task = {
        "key": probed.sha256,
        "location": source.location,
        "limits": probed.limits,
        "frames": frames,
        "still": probed.row["container"] in STILLS,
    }
    return Unit(keys=[probed.sha256], task={**task, "detector": config.detector.name, "weights": config.weights})


def work(task: Task) -> Rows:
    """Find the transitions of one source."""
    found: list[Transition] = []
    if task["detector"] == Detector.luma.name:
        found = find_transitions(_every_frame(task, (36, 64)))
    elif task["detector"] == Detector.transnet.name:
        from data_tools import transnet  # brings torch, which nothing else here needs

        found = transnet.find_transitions(_every_frame(task, (27, 48)), transnet.load(Path(task["weights"])))
    columns = {"kinds": [t.kind for t in found], "firsts": [t.first for t in found], "lasts": [t.last for t in found]}
    return [{"key": task["key"], **columns}]


def _every_frame(task: Task, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Small pictures of all frames; what probing counted must come."""
    count = 0
    with open_source(task["location"]) as file:
        for _, frame in read_frames(file, size=size, draft=True, limits=Limits(**task["limits"]), beat=beat):
            yield frame
            count += 1
    if count != task["frames"]:
        raise BadVideo(f"changed since it was probed: {count} frames, not {task['frames']}")


def tile(source: Source, probed: Probed, row: dict[str, Any] | None, config: SplitConfig) -> Media:
    """Cut a source into clips, shot by shot and one after the other. row: its transitions; None for one shot."""
    facts = probed.facts
    fps = rational(config.fps) if config.fps else facts.average_rate
    height, width = Fraction(facts.height), facts.width * facts.sar
    transitions = [] if row is None else list(map(Transition, row["kinds"], row["firsts"], row["lasts"]))
    media = Media(
        source=source,
        probed=probed,
        shots=shots_of(transitions, facts.frames),
        fps=fps,
        size=(int(height), max(1, int(width))),  # pixels may be as narrow as their file says
    )
    length = config.clip_frames or max(config.min_frames, round(config.clip_seconds * fps))
    shortest = config.min_frames
    if media.still:
        length = shortest = 1
    keys: set[str] = set()
    kept = 0
    for number, shot in enumerate(media.shots):
        picks = frames_at_rate(facts, fps, shot)
        for first in range(0, len(picks), length):
            last = min(first + length, len(picks))
            if last - first < shortest:
                continue
            start, end = int(facts.pts[picks[first]]), int(facts.pts[picks[last - 1]])
            key = f"{probed.sha256[:16]}_{start}_{end}"
            if key in keys:  # at a rate far above the source's own, the same few frames would come again
                continue
            keys.add(key)
            kept += last - first
            media.clips.append(
                Clip(
                    key=key,
                    media=media,
                    number=len(media.clips),
                    shot=number,
                    first=first,
                    last=last,
                    start_pts=start,
                    end_pts=end,
                )
            )
    media.dropped = max(0, len(frames_at_rate(facts, fps, (0, facts.frames))) - kept)
    return media


def frames_at_rate(facts: VideoFacts, fps: Fraction, shot: Shot) -> np.ndarray:
    """Source frame of every output frame i of a shot: the last whose time is <= the shot's start + i / fps.

    As long as the shot lasts; int64. Times of a source of constant rate are taken as exact, since containers round
    them (to milliseconds, often).
    """
    first, last = shot
    if facts.frames == 1:  # nothing says how long it is shown
        return np.zeros(1, dtype=np.int64)
    if not facts.variable_rate:
        # exact arithmetic: floor(i * rate / fps), for all i below frames * fps / rate
        step = facts.average_rate / fps
        count = -(-(last - first) * step.denominator // step.numerator)
        return first + np.arange(count, dtype=np.int64) * step.numerator // step.denominator
    ticks = 1 / (facts.average_rate * facts.time_base)  # of a frame
    end = int(facts.pts[last]) if last < facts.frames else int(facts.pts[-1]) + ticks
    step = 1 / (fps * facts.time_base)  # ticks of an output frame
    start = int(facts.pts[first])
    count = -(-(end - start) // step)
    times = start + np.arange(int(count), dtype=np.int64) * step.numerator // step.denominator
    return np.searchsorted(facts.pts, times, side="right").astype(np.int64) - 1


def stretches(clips: Iterable[Clip]) -> Iterator[list[Clip]]:
    """Clips in their order, those of one source together in lists of at most STRETCH near each other."""
    group: list[Clip] = []
    for clip in clips:
        if group and (clip.media is not group[0].media or clip.number // STRETCH != group[0].number // STRETCH):
            yield group
            group = []
        group.append(clip)
    if group:
        yield group


def stretch_task(clips: list[Clip]) -> Task:
    """What a worker must know to find the frames of some clips of one source."""
    media = clips[0].media
    return {
        "name": media.source.name,
        "location": media.source.location,
        "limits": media.probed.limits,
        "facts": media.probed.row,
        "fps": str(media.fps),
        "size": media.size,
        "clips": [{"key": c.key, "shot": media.shots[c.shot], "first": c.first, "last": c.last} for c in clips],
    }


def picks_of(task: Task) -> tuple[VideoFacts, list[np.ndarray]]:
    """The other way: the source's facts, and the numbers of the source frames of each clip."""
    facts, fps = facts_of(task["facts"]), Fraction(task["fps"])
    shots = {tuple(clip["shot"]) for clip in task["clips"]}
    at_rate = {shot: frames_at_rate(facts, fps, shot) for shot in shots}
    return facts, [at_rate[tuple(clip["shot"])][clip["first"] : clip["last"]] for clip in task["clips"]]


def held_out(groups: set[str], fraction: float, *, at_least_one: bool = True) -> set[str]:
    """The groups for validation: those whose hash falls below `fraction`.

    at_least_one: if there are two groups or more, both sides get one.
    """
    if fraction == 0:
        return set()
    place = {group: int(hashlib.sha256(f"split:{group}".encode()).hexdigest()[:12], 16) / 16**12 for group in groups}
    chosen = {group for group in groups if place[group] < fraction}
    if at_least_one and len(groups) > 1:
        order = sorted(groups, key=lambda group: (place[group], group))
        chosen = (chosen or {order[0]}) - ({order[-1]} if len(chosen) == len(groups) else set())
    return chosen


def clip_size(media: Media, crop: tuple[int, int] | None, config: DataConfig) -> tuple[int, int] | None:
    """Height and width of the clips of a source, even (but for stills), at most pack.max_side; None if too small.

    crop: height and width of what is left of the upright picture without its bars, in square pixels.
    """
    height, width = crop or media.size
    limit = config.pack.max_side
    scale = min(Fraction(1), Fraction(limit, max(height, width))) if limit else Fraction(1)
    step = 1 if media.still else 2
    size = (int(height * scale) // step * step, int(width * scale) // step * step)
    return None if min(size) < MIN_SIDE else size
