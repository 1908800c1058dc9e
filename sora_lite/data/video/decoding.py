"""Frames out of files: all of them, those from a time on, or those of a clip at a rate."""

import io
import math
import sys
from collections.abc import Callable, Container, Iterator
from fractions import Fraction
from itertools import chain, islice
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from sora_lite.data.video.colours import ToRGB
from sora_lite.data.video.facts import LIMITS, STILLS, BadVideo, Limits, Planes, Source, no_beat, rational
from sora_lite.data.video.opening import head_of, is_own, opened, read_still, sniff
from sora_lite.data.video.reader import Reader
from sora_lite.errors import UserError

_DECORD_OFF = 4.0
"""Most that a frame of decord may differ from PyAV's, in mean levels of 255: it repeats chroma, PyAV interpolates."""


def read_frames(
    source: Source,
    *,
    size: tuple[int, int] | None = None,
    start: int | None = None,
    only: Container[int] | None = None,
    draft: bool = False,
    limits: Limits = LIMITS,
    beat: Callable[[], None] = no_beat,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (pts, uint8 (H, W, 3)) for every frame of a file, upright, scaled to `size` (height, width) if given.

    start: pts of the first frame that is wanted; where the container allows it, what comes before is skipped quickly.
    only: pts of the frames that are wanted; None for all.
    draft: average areas with quick arithmetic, for looking at; otherwise bicubic with exact rounding, for keeping.
    beat: called at every packet and frame, those that are skipped included.
    Raises BadVideo as soon as something is missing, damaged or beyond the limits.
    """
    with opened(source, limits) as file:
        container = sniff(head_of(file))
        if container in STILLS:
            image = Image.fromarray(read_still(file, limits))
            yield 0, np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC) if size else image)
            return
        to_rgb = ToRGB(size, draft=draft)
        with Reader(file, container, limits, beat) as reader:
            for time, frame in reader.frames() if start is None else reader.frames_from(start):
                if only is None or time in only:
                    yield time, to_rgb(frame)


def decode_clip(data: bytes, *, frames: int, **wanted: Any) -> np.ndarray:
    """All that `decode_planes` yields, as one array -> uint8 (frames, H, W, 3)."""
    found = list(decode_planes(data, frames=frames, **wanted))
    clip = np.empty((frames, 3, *found[0][0].shape), np.uint8)
    for picture, planes in zip(clip, found, strict=True):
        for place, plane in zip(picture, planes, strict=True):
            place[:] = plane
    return clip.transpose(0, 2, 3, 1)


def decode_planes(
    data: bytes,
    *,
    frames: int,
    fps: float | None = None,
    start_frame_offset: int = 0,
    own_fps: float | None = None,
    decoder: str = "pyav",
) -> Iterator[Planes]:
    """Decode some frames of a clip, and yield each as its red, green and blue.

    Output frame i is the last frame with pts <= start + i / fps, where start is the pts of the clip's frame number
    `start_frame_offset`. fps None takes every frame. A still image is a clip of one frame.
    own_fps: frames of the clip divided by its seconds. Where it is given, along with fps, start is so many frames of
    this rate after the first pts: the same in a clip of constant rate, and in any other the end comes when it should.
    decoder: "pyav" or "decord". The latter is asked for clips that `encode_mp4` or `cut_clips` made, and no others.
    Raises BadVideo if the clip is damaged, or if it ends (with its last frame's duration) before the last of these
    times.
    """
    container = sniff(data[:400])
    if container in STILLS:
        if frames != 1 or start_frame_offset != 0:
            raise BadVideo(f"a still image has no frames {start_frame_offset} to {start_frame_offset + frames - 1}")
        yield _planes_of(read_still(io.BytesIO(data), LIMITS))
        return
    own = container == "mov" and is_own(data)
    if decoder == "decord" and own and _decord_agrees(data):
        yield from map(_planes_of, _decode_by_decord(data, frames, fps, start_frame_offset))
        return
    with Reader(io.BytesIO(data), container, own=own) as reader:
        ticks = None if fps is None else 1 / (rational(fps) * reader.time_base)
        found, convert = 0, ToRGB()
        for frame in _picked(reader, frames, ticks, start_frame_offset, own_fps):
            yield convert.planes(frame)
            found += 1
    if found < frames:
        raise _too_short(found, frames, start_frame_offset, fps)


def _planes_of(picture: np.ndarray) -> Planes:
    """Of uint8 (H, W, 3)."""
    return picture.transpose(2, 0, 1)


def _picked(
    reader: Reader, count: int, ticks: Fraction | None, start: int, own_fps: float | None
) -> Iterator[VideoFrame]:
    """The frames of `decode_planes`, whose `fps` is one frame in so many `ticks` of the time base."""
    if ticks is None:
        return (frame for _, frame in islice(_from_number(reader, start), count))
    if reader.own:
        return _at_rate(_from_number(reader, start, (count, ticks)), count, ticks)
    if own_fps is None or start == 0:
        return _at_rate(_from_number(reader, start), count, ticks)
    first = _first_time(reader) + start / (rational(own_fps) * reader.time_base)
    return _at_rate(reader.frames_from(math.floor(first)), count, ticks, first)


def _too_short(found: int, frames: int, start: int, fps: float | None) -> BadVideo:
    return BadVideo(f"it ends after {found} of {frames} frames from number {start} at fps {fps}")


def _from_number(
    reader: Reader, number: int, rate: tuple[int, Fraction] | None = None
) -> Iterator[tuple[int, VideoFrame]]:
    """(pts, frame) of frame `number` and those after it; in files of our own those before it are skipped quickly.

    rate: (count, ticks) if only what `_at_rate` picks is wanted. Others may be missing.
    """
    entries = reader.stream.index_entries
    if reader.own and len(entries) > 1 and number < len(entries):
        tick = entries[1].timestamp - entries[0].timestamp
        start = (reader.stream.start_time or 0) + number * tick
        reader.passes_over = _unwanted(start, tick, *(rate or (len(entries), Fraction(tick))))
        decoded = reader.frames_from(start)
        first = next(decoded, None)
        if first is not None and first[0] == start:
            return chain([first], decoded)
        reader.passes_over = None
    return islice(reader.frames(), number, None)


def _unwanted(start: int, tick: int, count: int, ticks: Fraction) -> Callable[[int], bool]:
    """Which pts `_at_rate` passes over in a file of constant rate: none of `count` times, each `ticks` after the other
    from `start` on, lies in the `tick` that the frame is shown (or on its end, since times may be rounded)."""
    length, unit = ticks.as_integer_ratio()

    def unwanted(pts: int) -> bool:
        after = (pts - start) * unit
        following = max(0, -(-after // length))  # number of the first time that is not before pts
        return following >= count or following * length > after + tick * unit

    return unwanted


def _first_time(reader: Reader) -> int:
    """pts of a clip's first frame."""
    first = next(reader.frames(), None)
    if first is None:
        raise BadVideo("no frame of it can be decoded")
    return first[0]


def _at_rate(
    decoded: Iterator[tuple[int, VideoFrame]], count: int, ticks: Fraction, start: Fraction | None = None
) -> Iterator[VideoFrame]:
    """The last frame at or before each of `count` times, `ticks` of the time base apart, from `start` on.

    start: by default the first frame's time. Where it lies before that, the first frame stands for what is missing.
    """
    done, origin, last, held = 0, start or Fraction(0), 0, None
    for time, frame in decoded:
        if held is None and start is None:
            origin = Fraction(time)
        while held is not None and done < count and time - origin > done * ticks:
            yield held
            done += 1
        if done == count:
            return
        held, last = frame, time
    if held is None:
        return
    end = last - origin + (held.duration or 1)  # the last frame is shown for its duration and no longer
    while done < count and done * ticks < end:
        yield held
        done += 1


_agreed: list[bool] = []
"""Whether decord is used in this process: empty until it is first asked for."""


def _decord_agrees(data: bytes) -> bool:
    """Whether decord decodes as PyAV does, found on the first clip of a process. Raises UserError if it is missing."""
    if not _agreed:
        reason = _differs(data)
        _agreed.append(not reason)
        if reason:
            print(f"warning: data.decoder=decord {reason}; PyAV decodes instead", file=sys.stderr)
    return _agreed[0]


def _differs(data: bytes) -> str:
    """How decord's frames of a clip differ from PyAV's; empty if they do so by no more than their ways of rounding."""
    with Reader(io.BytesIO(data), "mov") as reader:
        count = sum(1 for _ in reader.frames())
    wanted = decode_clip(data, frames=count)
    try:
        found = _decode_by_decord(data, count, None, 0)
    except ImportError:
        raise UserError(
            "data.decoder=decord: decord is not installed; run `pip install decord`, or set data.decoder=pyav."
        ) from None
    except BadVideo as error:
        return f"does not decode what PyAV does ({error})"
    off = np.abs(found.astype(np.int16) - wanted).mean(axis=(1, 2, 3)).max()
    return f"differs by {off:.1f} levels from what PyAV decodes" if off > _DECORD_OFF else ""


def _decode_by_decord(data: bytes, frames: int, fps: float | None, start: int) -> np.ndarray:
    """`decode_clip` of a clip that was written here, whose frames are evenly spaced."""
    import decord

    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        step = rational(reader.get_avg_fps()) / rational(fps) if fps else Fraction(1)
        numbers = [start + int(i * step) for i in range(frames)]
        found = sum(number < len(reader) for number in numbers)
        if found < frames:
            raise _too_short(found, frames, start, fps)
        return reader.get_batch(numbers).asnumpy()
    except decord.DECORDError as error:
        raise BadVideo(f"cannot be decoded: {str(error).splitlines()[0]}") from error
