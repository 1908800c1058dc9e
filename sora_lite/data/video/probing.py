"""What is in a file, found by decoding all of it."""

from array import array
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import xxhash
from av.video.frame import VideoFrame

from sora_lite.data.video.colours import quarter_turns
from sora_lite.data.video.facts import LIMITS, STILLS, BadVideo, Limits, Source, VideoFacts, no_beat, rational
from sora_lite.data.video.opening import head_of, opened, read_still, sniff
from sora_lite.data.video.reader import Reader

_HDR_TRANSFERS, _BT2020 = (16, 18), 9  # codes of PQ and HLG, and of the wide primaries (ITU-T H.273)


def probe(source: Source, limits: Limits = LIMITS, beat: Callable[[], None] = no_beat) -> VideoFacts:
    """Decode all of a file and say what is in it.

    beat: called at every packet and frame.
    Raises BadVideo if any of it is missing or damaged, or beyond the limits.
    """
    with opened(source, limits) as file:
        container = sniff(head_of(file))
        if container in STILLS:
            return _still_facts(read_still(file, limits), container)
        with Reader(file, container, limits, beat) as reader:
            return _video_facts(reader)


def _still_facts(image: np.ndarray, container: str) -> VideoFacts:
    digest = xxhash.xxh3_128(f"rgb24 {image.shape[1]}x{image.shape[0]}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return VideoFacts(
        container=container,
        codec=container,
        width=image.shape[1],
        height=image.shape[0],
        sar=Fraction(1),
        rotation=0,
        time_base=Fraction(1),
        average_rate=Fraction(1),
        pts=np.zeros(1, dtype=np.int64),
        frames_hash=digest.hexdigest(),
    )


def _video_facts(reader: Reader) -> VideoFacts:
    pts, first, interlaced, hashed = array("q"), None, False, _FramesHash()
    for time, frame in reader.frames():
        first = first or frame
        pts.append(time)
        interlaced = interlaced or frame.interlaced_frame
        hashed.add(frame)
    if first is None:
        raise BadVideo("no frame of it can be decoded")
    times = np.array(pts, dtype=np.int64)
    rate = _rate(times, reader.time_base, reader.stream.average_rate)
    turned = quarter_turns(first) % 2 == 1
    sar = reader.stream.sample_aspect_ratio or Fraction(1)
    return VideoFacts(
        container=reader.container,
        codec=reader.stream.codec_context.name,
        width=first.height if turned else first.width,
        height=first.width if turned else first.height,
        sar=1 / sar if turned else sar,
        rotation=quarter_turns(first) * 90,
        time_base=reader.time_base,
        average_rate=rate,
        pts=times,
        bit_depth=max(component.bits for component in first.format.components),
        hdr=first.color_trc in _HDR_TRANSFERS or first.color_primaries == _BT2020,
        interlaced=interlaced,
        variable_rate=not _is_steady(times, 1 / (rate * reader.time_base)),
        frames_hash=hashed.hexdigest(),
    )


class _FramesHash:
    """A hash of all pixels of a video, whatever the padding of their rows in memory."""

    def __init__(self) -> None:
        self.digest, self.layout, self.row_bytes = xxhash.xxh3_128(), "", [0]

    def add(self, frame: VideoFrame) -> None:
        layout = f"{frame.format.name} {frame.width}x{frame.height}"
        planes = frame.planes
        if layout != self.layout:
            self.digest.update(layout.encode())
            self.layout, self.row_bytes = layout, [_row_bytes(frame, i) for i in range(len(planes))]
        for plane, size in zip(planes, self.row_bytes, strict=True):
            rows = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)  # type: ignore[call-overload]
            if size > 0:  # not a palette
                rows = rows[:: 1 if plane.line_size > 0 else -1, :size]
            self.digest.update(np.ascontiguousarray(rows).data)

    def hexdigest(self) -> str:
        return self.digest.hexdigest()


def _row_bytes(frame: VideoFrame, plane: int) -> int:
    """Bytes of a row of a plane that hold pixels."""
    width, kind = frame.planes[plane].width, frame.format
    bits = [component.bits for component in kind.components if component.plane == plane]
    if kind.is_planar:
        return width * sum(-(-one // 8) for one in bits)
    return -(-width * kind.padded_bits_per_pixel // 8) if bits else 0


def _rate(pts: np.ndarray, time_base: Fraction, named: Fraction | None) -> Fraction:
    """Frames per second: the header's figure where the decoded times agree with it, else theirs."""
    if len(pts) == 1:
        return named or Fraction(1)
    measured = (len(pts) - 1) / (int(pts[-1] - pts[0]) * time_base)
    drift = abs(named / measured - 1) * (len(pts) - 1) if named else 1  # in frames, at the end of the file
    return named if named and drift < Fraction(1, 2) else rational(measured) or measured


def _is_steady(pts: np.ndarray, ticks: Fraction) -> bool:
    """Whether frames are `ticks` of the time base apart, but for what containers round."""
    off = np.abs((pts - pts[0]) - np.arange(len(pts)) * float(ticks))
    return bool(off.max() <= max(1.0, 0.25 * float(ticks)))
