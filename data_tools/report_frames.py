"""Frames for the page of `sora-data report`, decoded by workers that may die, as the sources may be anything."""

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_tools.config import DataConfig
from data_tools.locations import open_source
from data_tools.look import encode_jpeg
from data_tools.pool import Rows, Task, beat
from data_tools.split import Media
from data_tools.state import Unit, outcomes
from sora_lite.data.video import BadVideo, read_frames

BOX = (144, 192)
"""Most height and width in pixels of a picture on the page."""
SEEKABLE = ("mov", "matroska")
"""Containers in which going to a time costs less than decoding up to it."""
FAR_SECONDS = 10.0
"""Time between two wanted frames from which on it pays to seek."""


class Look(NamedTuple):
    """A frame that the page shows: the first of a source at or after a time."""

    sha256: str
    pts: int


@dataclass(kw_only=True, slots=True)
class Picture:
    """A decoded frame as a data: URL, or the reason why there is none."""

    url: str = ""
    reason: str = ""


def pictures(wanted: dict[Look, Media], config: DataConfig) -> dict[Look, Picture]:
    """Decode frames, one task for each source."""
    times: dict[str, list[int]] = {}
    media_of = {look.sha256: media for look, media in wanted.items()}
    for look in sorted(wanted):
        times.setdefault(look.sha256, []).append(look.pts)
    units = [Unit(keys=[sha256], task=_task(media_of[sha256], pts)) for sha256, pts in times.items()]
    found: dict[Look, Picture] = {}
    with tqdm(total=len(wanted), desc="report", unit="picture", mininterval=0.5) as bar:
        for unit, outcome in outcomes(work, units, config):
            (sha256,) = unit.keys
            for row in outcome.rows:
                found[Look(sha256, row["pts"])] = Picture(url=_data_url(row["jpeg"]))
            if outcome.reason:
                found |= {Look(sha256, pts): Picture(reason=outcome.reason) for pts in unit.task["pts"]}
            bar.update(len(unit.task["pts"]))
    return found


def _task(media: Media, pts: list[int]) -> Task:
    height, width = media.size
    scale = min(Fraction(BOX[0], height), Fraction(BOX[1], width))
    row = media.probed.row
    return {
        "location": media.source.location,
        "pts": pts,
        "size": [max(1, round(height * scale)), max(1, round(width * scale))],
        "far": int(FAR_SECONDS / Fraction(row["time_base"])) if row["container"] in SEEKABLE else None,
    }


def work(task: Task) -> Rows:
    """The frames of a source that are first at or after some times (ascending), as small JPEG files."""
    rows = []
    with open_source(task["location"]) as file:

        def begin(pts: int) -> Iterator[tuple[int, np.ndarray]]:
            return read_frames(file, start=pts, size=tuple(task["size"]), draft=True, beat=beat)

        for pts, frame in _frames_at(begin, task["pts"], task["far"]):
            rows.append({"pts": pts, "jpeg": encode_jpeg(frame)})
    return rows


def _frames_at(
    begin: Callable[[int], Iterator[tuple[int, np.ndarray]]], times: list[int], far: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """(wanted time, frame). begin: decodes from a time on; it is called anew to leap over more than `far` ticks."""
    frames = begin(times[0])
    now = frame = None
    for wanted in times:
        if far is not None and now is not None and wanted - now > far:
            frames, now = begin(wanted), None
        while now is None or frame is None or now < wanted:
            now, frame = next(frames, (None, None))
            if now is None:
                raise BadVideo("changed since it was probed: it ends before this frame")
        yield wanted, frame


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
