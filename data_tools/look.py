"""Decode a few small frames of each clip: what scores and captions are made of. One decode of a stretch of a source."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple
from fractions import Fraction
from functools import cache

import numpy as np
import pyarrow as pa
from PIL import Image

from data_tools.caption import CaptionItem, caption_clips
from data_tools.compose import parse
from data_tools.config import SCORES, CaptionConfig, ScoreConfig, plain
from data_tools.locations import open_source
from data_tools.pool import Rows, Task, beat
from data_tools.score import Scorer, look_size, looks
from data_tools.split import Clip, picks_of, stretch_task
from data_tools.state import Unit
from sora_lite.data.video import BadVideo, Limits, VideoFacts, read_frames

SCORE_SCHEMA = pa.schema(
    [(name, pa.float64()) for name in SCORES] + [("crop", pa.list_(pa.int32())), ("phash", pa.list_(pa.uint64()))]
)
"""A score that was not measured is null. crop: top, left, height, width of the upright picture."""
CAPTION_SCHEMA = pa.schema([("captions", pa.list_(pa.string()))])


def score_units(stretches: Iterable[list[Clip]], config: ScoreConfig) -> Iterator[Unit]:
    """The work of scoring clips."""
    settings = plain(config)
    for clips in stretches:
        yield Unit(keys=[clip.key for clip in clips], task={**stretch_task(clips), "config": settings})


def score_work(task: Task) -> Rows:
    """Score the clips of a stretch."""
    facts, picks = picks_of(task)
    scorer, rows = _scorer(json.dumps(task["config"])), []
    rate = float(Fraction(task["fps"]))
    chosen = [looks(len(one), rate, task["config"]["fps"]) for one in picks]
    size = look_size((facts.height, facts.width))
    shown = frames_of(task, facts, [one[look] for one, look in zip(picks, chosen, strict=True)], size)
    for clip, look, frames in zip(task["clips"], chosen, shown, strict=True):
        timed = [(float(i / rate), frame) for i, frame in zip(look, frames, strict=True)]
        scores = scorer.score(timed, (facts.height, facts.width))
        values = {name: None if np.isnan(value) else float(f"{value:.5g}") for name, value in scores.values.items()}
        rows.append({"key": clip["key"], **values, "crop": list(astuple(scores.crop)), "phash": scores.phash})
        beat()
    return rows


@cache
def _scorer(settings: str) -> Scorer:
    """One for all tasks of a worker: its models take long to load."""
    return Scorer(parse(ScoreConfig, [], base=json.loads(settings)))


def caption_units(stretches: Iterable[list[Clip]], config: CaptionConfig) -> Iterator[Unit]:
    """The work of captioning: stretches together, so that `concurrency` clips can be asked about at once."""
    group: list[list[Clip]] = []
    for stretch in (*stretches, None):
        if stretch is None or sum(map(len, group)) >= config.concurrency:
            if group:
                task = {"stretches": [stretch_task(clips) for clips in group], "config": plain(config)}
                yield Unit(keys=[clip.key for clips in group for clip in clips], task=task)
            group = []
        if stretch is not None:
            group.append(stretch)


def caption_work(task: Task) -> Rows:
    """Caption clips, several at once."""
    config = parse(CaptionConfig, [], base=task["config"])
    items = (item for stretch in task["stretches"] for item in _items(stretch, config))
    return [asdict(row) for row in caption_clips(items, config)]


def _items(stretch: Task, config: CaptionConfig) -> Iterator[CaptionItem]:
    facts, picks = picks_of(stretch)
    chosen = [one[np.linspace(0, len(one) - 1, min(len(one), config.frames)).round().astype(int)] for one in picks]
    width = float(facts.width * facts.sar)
    scale = min(1.0, config.side / max(facts.height, width))
    size = max(2, round(facts.height * scale)), max(2, round(width * scale))
    shown = frames_of(stretch, facts, chosen, size)

    def pictures() -> list[bytes]:
        if (frames := next(shown, None)) is None:
            raise BadVideo("changed since it was probed: an earlier clip of it could not be decoded")
        return [encode_jpeg(frame) for frame in frames]

    for clip in stretch["clips"]:
        yield CaptionItem(key=clip["key"], name=stretch["name"], location=stretch["location"], frames=pictures)


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) for looking at."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=85)
    return out.getvalue()


def frames_of(
    task: Task, facts: VideoFacts, clips: list[np.ndarray], size: tuple[int, int]
) -> Iterator[list[np.ndarray]]:
    """For each clip the source frames of these numbers (never falling), as uint8 (H, W, 3) of a size."""
    numbers = np.unique(np.concatenate(clips))
    times = {int(facts.pts[number]): int(number) for number in numbers}
    with open_source(task["location"]) as file:
        start, limits = int(facts.pts[numbers[0]]), Limits(**task["limits"])
        reader = read_frames(file, size=size, start=start, only=times, draft=True, limits=limits, beat=beat)
        held: dict[int, np.ndarray] = {}
        for clip in clips:
            held = {number: frame for number, frame in held.items() if number >= clip[0]}
            while clip[-1] not in held:
                time, frame = next(reader, (None, None))
                if time is None or frame is None:
                    raise BadVideo(f"changed since it was probed: frame {clip[-1]} is not there any more")
                held[times[time]] = frame
            missing = [number for number in clip if number not in held]
            if missing:
                raise BadVideo(f"changed since it was probed: frame {missing[0]} is not where it was")
            yield [held[number] for number in clip]
