"""Frames out of video files and into them. PyAV only; nothing here knows about tensors.

Shapes: T frames, H height, W width; frames are uint8 RGB (T, H, W, 3) in [0, 255], upright (rotation applied).
`pts` is a frame's presentation time in ticks of `time_base` seconds. Frames are numbered from 0 in order of
presentation, counting those that can be decoded.

Files may come from anywhere. Their first bytes must name a container of the list below, FFmpeg is told to use the
demuxer of that container and no other, and it cannot open a second file: a playlist in disguise reads nothing. What a
file claims to hold is checked against `Limits` before anything is decoded, and so is what then comes out.
"""

import io
import math
import sys
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import av
import av.subtitles.stream  # PyAV would load it with the first file, for which there may be no memory left
import numpy as np
import xxhash
from av.container import InputContainer
from av.filter import Graph
from av.filter.context import FilterContext
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from sora_lite.errors import UserError

BOMB = 1_000_000
"""Pixels for each byte of a file beyond which it is a decompression bomb: blank video gives up to some 100,000."""
BOMB_FROM = 2_000_000_000
"""Pixels that any file may hold: a few seconds of decoding."""
LONGEST_SIDE = 16384
"""Most pixels of a side that x264 takes."""
GOP = 48
"""Most frames from one keyframe to the next in what is written here; groups are closed."""
STILLS = ("png", "jpeg", "webp")
"""Containers (of `sniff`) that hold a still image."""
_SEEKABLE = ("mov", "matroska")
"""Containers with an index of exact times."""
_SKIPPABLE = ("mpegts", "mpeg")
"""Containers whose packets carry times, without an index: what is not wanted is read, but not decoded."""
_BOX_TYPES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_DRAFT = Interpolation.AREA  # fast bilinear would be 5 times cheaper still, but skips most pixels: fine detail flickers
_X264 = {
    # Two things make x264's bytes vary: the number of threads, and macroblock-tree rate control, whose vector code
    # reads past the end of its rows where a picture is not a multiple of 8 macroblocks wide (seen in x264 165), and
    # rounds as the processor's maker sees fit.
    # psy=0: psychovisual choices spend bits on what pleases people instead of on what is near to the source. Without
    # them x264 codes chroma 2 steps coarser, which the offset takes back: same PSNR and SSIM, 5 % fewer bytes.
    # weightp=1: the full search is for fades, of which a shot has none; without it encoding is 7 % quicker.
    "x264-params": f"keyint={GOP}:open-gop=0:threads=1:mbtree=0:psy=0:chroma-qp-offset=-2:weightp=1"
}
_BT709 = 1  # the code of primaries, transfer and matrix alike (ITU-T H.273)
_HDR_TRANSFERS, _BT2020 = (16, 18), 9  # codes of PQ and HLG, and of the wide primaries (ITU-T H.273)
_BACK_OFF = (0, 1, 10, 100)
"""Seconds before the wanted time that a seek aims at, one after the other until it lands early enough."""
_DECORD_OFF = 4.0
"""Most that a frame of decord may differ from PyAV's, in mean levels of 255: it repeats chroma, PyAV interpolates."""
_LEAP = 32
"""From so many unwanted frames on, it may be quicker to seek than to decode them."""
_BUFFER = 256 * 1024
"""Bytes that FFmpeg reads at a time."""
_HELD = 64 * 2**20
"""Most bytes of packets that are kept on the way to the last keyframe before a time."""

Planes = tuple[np.ndarray, np.ndarray, np.ndarray] | np.ndarray
"""A frame's red, green and blue, each uint8 (H, W); one array of all three where the pixels are packed in memory."""
Source = Path | bytes | BinaryIO
"""A file's path or content, or a binary file that is open for reading and can seek; its place in it does not matter."""


def _no_beat() -> None:
    """For callers that nobody watches."""


class BadVideo(Exception):
    """The bytes are no video or image that can be used whole. The message is the reason, without the file's name."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Limits:
    """The most that a file may hold."""

    max_pixels: int = 64_000_000
    """Pixels of a frame."""
    max_frames: int = 2_000_000
    max_seconds: float = 86_400.0
    max_streams: int = 32
    """Streams of any kind."""
    max_bytes: int = 64 * 2**30


@dataclass(kw_only=True, slots=True, frozen=True)
class Box:
    """A part of the upright picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(kw_only=True, slots=True)
class VideoFacts:
    """What decoding a whole file showed. Sizes are those of the upright picture."""

    container: str
    codec: str
    width: int
    height: int
    sar: Fraction
    """Width of a pixel divided by its height."""
    rotation: int
    """Degrees counterclockwise, a multiple of 90, by which stored pictures are turned to be upright."""
    time_base: Fraction
    """Seconds per tick of pts."""
    average_rate: Fraction
    """Frames per second."""
    pts: np.ndarray
    """int64 (T,): time of each decoded frame, strictly increasing."""
    bit_depth: int = 8
    """Bits per colour channel."""
    hdr: bool = False
    """Brightness is coded as PQ or HLG, or colours reach beyond those of ordinary screens (BT.2020)."""
    interlaced: bool = False
    """Some frame is made of two fields, each half a frame apart in time."""
    variable_rate: bool = False
    """Some frame stands more than a quarter of a frame (and more than a tick) off the times of a constant rate."""
    frames_hash: str = ""
    """xxh3 (128 bit, hexadecimal) over size, pixel format and every pixel of all frames, as they are decoded."""

    def __post_init__(self) -> None:
        if self.pts.ndim != 1 or len(self.pts) == 0 or self.pts.dtype != np.int64:
            raise ValueError(f"pts must be a filled int64 (T,), not {self.pts.dtype} {self.pts.shape}")

    @property
    def frames(self) -> int:
        return len(self.pts)

    @property
    def duration_seconds(self) -> float:
        return float((int(self.pts[-1]) - int(self.pts[0])) * self.time_base + 1 / self.average_rate)


def shown_size(facts: VideoFacts) -> tuple[int, int]:
    """Height and width in square pixels at which a video is shown: the width changes where pixels are not square."""
    return facts.height, max(1, round(facts.width * facts.sar))


# ------------------------------------------------------------------------------------------------------- reading


def sniff(head: bytes) -> str:
    """Name the container that a file's first bytes (at least 400, where it has them) show. Raises BadVideo."""
    if not head:
        raise BadVideo("the file is empty")
    if head[4:8] in _BOX_TYPES:
        return "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP"):
        return "avi" if head[8:12] == b"AVI " else "webp"
    if head[:4] == b"\x00\x00\x01\xba":
        return "mpeg"
    if head[:4] == b"GIF8":
        return "gif"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if head[:3] == b"\xff\xd8\xff":
        return "jpeg"
    for size, first in ((188, 0), (192, 4)):  # plain transport stream packets, and Blu-ray's with a time stamp
        if head[first : first + 2 * size + 1 : size] == b"GGG":
            return "mpegts"
    raise BadVideo("not a video container that is read here (mp4, mov, mkv, webm, avi, mpeg, ts, gif, png, jpg, webp)")


def probe(source: Source, limits: Limits = Limits(), beat: Callable[[], None] = _no_beat) -> VideoFacts:
    """Decode all of a file and say what is in it.

    beat: called at every packet and frame.
    Raises BadVideo if any of it is missing or damaged, or beyond the limits.
    """
    with _opened(source, limits) as file:
        container = sniff(_head(file))
        if container in STILLS:
            return _still_facts(_read_still(file, limits), container)
        with _Reader(file, container, limits, beat) as reader:
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


def _video_facts(reader: "_Reader") -> VideoFacts:
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
    turned = _quarter_turns(first) % 2 == 1
    sar = reader.stream.sample_aspect_ratio or Fraction(1)
    return VideoFacts(
        container=reader.container,
        codec=reader.stream.codec_context.name,
        width=first.height if turned else first.width,
        height=first.width if turned else first.height,
        sar=1 / sar if turned else sar,
        rotation=_quarter_turns(first) * 90,
        time_base=reader.time_base,
        average_rate=rate,
        pts=times,
        bit_depth=max(component.bits for component in first.format.components),
        hdr=first.color_trc in _HDR_TRANSFERS or first.color_primaries == _BT2020,
        interlaced=interlaced,
        variable_rate=not _is_steady(times, 1 / (rate * reader.time_base)),
        frames_hash=hashed.hexdigest(),
    )


def read_frames(
    source: Source,
    *,
    size: tuple[int, int] | None = None,
    start: int | None = None,
    only: Container[int] | None = None,
    draft: bool = False,
    limits: Limits = Limits(),
    beat: Callable[[], None] = _no_beat,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (pts, uint8 (H, W, 3)) for every frame of a file, upright, scaled to `size` (height, width) if given.

    start: pts of the first frame that is wanted; where the container allows it, what comes before is skipped quickly.
    only: pts of the frames that are wanted; None for all.
    draft: average areas with quick arithmetic, for looking at; otherwise bicubic with exact rounding, for keeping.
    beat: called at every packet and frame, those that are skipped included.
    Raises BadVideo as soon as something is missing, damaged or beyond the limits.
    """
    with _opened(source, limits) as file:
        container = sniff(_head(file))
        if container in STILLS:
            image = Image.fromarray(_read_still(file, limits))
            yield 0, np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC) if size else image)
            return
        to_rgb = _RGB(size, draft=draft)
        with _Reader(file, container, limits, beat) as reader:
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
        yield _planes_of(_read_still(io.BytesIO(data), Limits()))
        return
    own = container == "mov" and _is_own(data)
    if decoder == "decord" and own and _decord_agrees(data):
        yield from map(_planes_of, _decode_by_decord(data, frames, fps, start_frame_offset))
        return
    with _Reader(io.BytesIO(data), container, own=own) as reader:
        ticks = None if fps is None else 1 / (rational(fps) * reader.time_base)
        found, convert = 0, _RGB()
        for frame in _picked(reader, frames, ticks, start_frame_offset, own_fps):
            yield convert.planes(frame)
            found += 1
    if found < frames:
        raise _too_short(found, frames, start_frame_offset, fps)


def _planes_of(picture: np.ndarray) -> Planes:
    """Of uint8 (H, W, 3)."""
    return picture.transpose(2, 0, 1)


def _picked(
    reader: "_Reader", count: int, ticks: Fraction | None, start: int, own_fps: float | None
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


def _is_own(data: bytes) -> bool:
    """Whether an mp4 was written here, so that its rate is constant and its groups are closed: x264 notes its settings
    in front of the first frame."""
    head = data[: 64 * 1024]
    return all(setting in head for setting in (b"x264 - core", f" keyint={GOP} ".encode(), b" open_gop=0 "))


def _from_number(
    reader: "_Reader", number: int, rate: tuple[int, Fraction] | None = None
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


def _first_time(reader: "_Reader") -> int:
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
    with _Reader(io.BytesIO(data), "mov") as reader:
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


def rational(fps: float | Fraction) -> Fraction:
    """The exact rate that a rounded one stands for: 29.97002997 is 30000/1001."""
    return Fraction(fps).limit_denominator(1001) or Fraction(fps)


class _RGB:
    """Turns decoded frames into upright pictures; FFmpeg's scalers serve a whole clip."""

    def __init__(self, size: tuple[int, int] | None = None, *, draft: bool = False) -> None:
        self.size, self.draft = size, draft
        self.scaler, self.packer = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """uint8 (H, W, 3)."""
        rgb = self.packer.reformat(self._converted(frame), format="rgb24", threads=1).to_ndarray()
        turns = _quarter_turns(frame)
        return np.rot90(rgb, turns) if turns else rgb

    def planes(self, frame: VideoFrame) -> Planes:
        """Views of FFmpeg's own memory: its packing into (H, W, 3) costs a third of the conversion."""
        turns = _quarter_turns(frame)
        green, blue, red = (
            np.rot90(np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width], turns)  # type: ignore[call-overload]
            for plane in self._converted(frame).planes
        )
        return red, green, blue

    def _converted(self, frame: VideoFrame) -> VideoFrame:
        """rgb24 of a draft, planes otherwise: exact rounding into packed pixels has no vector code."""
        colours = _Colours.of(frame)
        height, width = self.size or (None, None)
        if _quarter_turns(frame) % 2 == 1:
            height, width = width, height
        try:
            return self.scaler.reformat(
                frame,
                width,
                height,
                "rgb24" if self.draft else "gbrp",
                src_colorspace=_MATRICES[colours.matrix].scaler,
                src_color_range=ColorRange.JPEG if colours.full else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=_DRAFT if self.draft else _EXACT,
                threads=1,
            )
        except av.FFmpegError as error:
            raise BadVideo(f"pictures of format {frame.format.name} cannot be converted: {error.strerror}") from error


def _quarter_turns(frame: VideoFrame) -> int:
    """Quarter turns counterclockwise that make the frame upright: 0 to 3."""
    return round(frame.rotation / 90) % 4


class _Matrix(NamedTuple):
    """A way to code RGB as luma and chroma, as FFmpeg's parts name it."""

    scaler: Colorspace
    scale: str
    colorspace: str


_MATRICES = {  # by their codes in ITU-T H.273
    1: _Matrix(Colorspace.ITU709, "bt709", "bt709"),
    4: _Matrix(Colorspace.FCC, "fcc", "fcc"),
    5: _Matrix(Colorspace.ITU601, "bt601", "bt470bg"),
    6: _Matrix(Colorspace.ITU601, "bt601", "smpte170m"),
    7: _Matrix(Colorspace.SMPTE240M, "smpte240m", "smpte240m"),
    9: _Matrix(Colorspace.BT2020, "bt2020", "bt2020ncl"),
    10: _Matrix(Colorspace.BT2020, "bt2020", "bt2020ncl"),
}


class _Colours(NamedTuple):
    """How a frame's numbers stand for colours."""

    matrix: int
    """Key of _MATRICES; of no meaning for RGB."""
    full: bool
    """Numbers use the full range, not that of broadcasting (16 to 235)."""

    @classmethod
    def of(cls, frame: VideoFrame) -> Self:
        """Untagged frames are read as players do: large ones are BT.709, small ones BT.601."""
        guess = 1 if frame.width >= 1280 or frame.height > 576 else 6
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        return cls(frame.colorspace if frame.colorspace in _MATRICES else guess, full)


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


class _Reader:
    """The first video stream of a file object that is known to be `container`, decoded in this thread alone.

    own: the file was written here (`_is_own`).
    """

    def __init__(
        self,
        file: BinaryIO,
        container: str,
        limits: Limits = Limits(),
        beat: Callable[[], None] = _no_beat,
        *,
        own: bool = False,
    ) -> None:
        self.file, self.container, self.limits, self.beat, self.own = file, container, limits, beat, own
        self.demuxer, self.stream = _open(file, container, limits, own=own)
        self.fresh = True  # nothing is read yet
        self.passes_over: Callable[[int], bool] | None = None
        """Whether nobody wants the frame of a pts: it is not decoded then, unless others build on it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.demuxer.close()

    @property
    def time_base(self) -> Fraction:
        if not self.stream.time_base:
            raise BadVideo("its header names no unit of time")
        return self.stream.time_base

    def frames(self) -> Iterator[tuple[int, VideoFrame]]:
        """Yield (pts, frame) for every frame, from the beginning."""
        return self._decode(self._packets(), whole=True)

    def frames_from(self, start: int) -> Iterator[tuple[int, VideoFrame]]:
        """Yield (pts, frame) for every frame with pts >= start. As few as possible of those before are decoded."""
        decoded = self._sought(start) or self._skipped_to(start)
        if decoded is not None:
            try:
                for time, frame in decoded:
                    if time >= start:
                        yield time, frame
                        start = time + 1
                return
            except BadVideo:
                pass  # it may miss something that was skipped; whether the file is at fault shows when it is read whole
        for time, frame in self.frames():
            if time >= start:
                yield time, frame

    def frames_numbered(self, first: int, pts: np.ndarray) -> Iterator[tuple[int, VideoFrame]]:
        """Yield (number, frame) from number `first` on. Raises BadVideo where their times are not those of `pts`."""
        number = first
        if first > 0:
            for time, frame in self.frames_from(int(pts[first])):
                if number == len(pts) or time != pts[number]:
                    break  # it may be the seek's fault, so look again without one
                yield number, frame
                number += 1
        if number == len(pts):
            return
        for i, (time, frame) in enumerate(self.frames()):
            if i == len(pts) or time != pts[i]:
                raise BadVideo(f"frame {i} is not where it was")
            if i >= number:
                yield i, frame

    def leaps(self, now: int, then: int) -> bool:
        """Whether there is a keyframe between two times, so that seeking saves decoding."""
        entries = self.stream.index_entries
        if self.container not in _SEEKABLE or len(entries) == 0:
            return False
        nearest = entries.search_timestamp(then)
        return nearest >= 0 and entries[nearest].timestamp > now

    def _packets(self) -> "Iterator[Packet[VideoStream]]":
        """All packets, from the beginning. Some files cannot be wound back exactly, so a used one is opened anew."""
        if not self.fresh:
            self.demuxer.close()
            self.file.seek(0)
            self.demuxer, self.stream = _open(self.file, self.container, self.limits, own=self.own)
        self.fresh = False
        return self._demux()

    def _demux(self) -> "Iterator[Packet[VideoStream]]":
        """The packets from here on.

        PyAV's own generator frees its memory at its end or when it is closed, but not when it is dropped, as this one
        is: 200 bytes a clip, and the holes that these keep open in the heap made workers grow.
        """
        yield from self.demuxer.demux(self.stream)

    def _sought(self, start: int) -> Iterator[tuple[int, VideoFrame]] | None:
        """Frames after a seek whose first is at or before `start`, which a seek to that time alone may miss: a header
        lists times of decoding, and frames that are shown before the keyframe they follow need the one before."""
        if self.container not in _SEEKABLE:
            return None
        for seconds in _BACK_OFF:
            target = start - int(seconds / self.time_base)
            if seconds and target < (self.stream.start_time or 0):
                return None
            self.fresh = False
            try:
                self.demuxer.seek(target, stream=self.stream)
            except av.FFmpegError:  # no such place in its index
                return None
            decoded = _if_early(self._decode(self._demux(), whole=False), start)
            if decoded is not None:
                return decoded
        return None

    def _skipped_to(self, start: int) -> Iterator[tuple[int, VideoFrame]] | None:
        """Frames from the last keyframe at or before `start`. All packets are read, so that those without a time get
        the same as in a reading of the whole file, but none before that keyframe is decoded."""
        if self.container not in _SKIPPABLE:
            return None
        packets = self._packets()
        held: list[Packet[VideoStream]] = []
        size = 0
        try:
            for packet in packets:
                self.beat()
                if packet.is_keyframe and packet.pts is not None and packet.pts <= start:
                    held, size = [], 0
                held.append(packet)
                size += packet.size
                if size > _HELD:
                    return None
                if packet.dts is not None and packet.dts > start:  # later ones are shown later
                    break
        except (av.FFmpegError, OSError) as error:
            raise BadVideo(f"cannot be read: {error.strerror}") from error
        return _if_early(self._decode(chain(held, packets), whole=False), start)

    def _decode(self, packets: "Iterable[Packet[VideoStream]]", *, whole: bool) -> Iterator[tuple[int, VideoFrame]]:
        """Yield (pts, frame) in order of presentation; pts strictly increase. Raises BadVideo at the first fault.

        whole: the packets are all of the file, so at its end everything that the header names must have come.
        """
        exact = whole and self.container == "mov"  # of the headers only mp4's counts can be relied on
        promised = len(self.stream.index_entries) if exact else 0
        read, last, check = 0, None, _Check(self.limits, self.time_base, self.demuxer.size)
        try:
            for packet in packets:
                self.beat()
                read += packet.size > 0
                if packet.is_corrupt:
                    raise BadVideo(f"cut off or damaged at packet {read}")
                if self.passes_over is not None:
                    unwanted = packet.pts is not None and self.passes_over(packet.pts)
                    self.stream.codec_context.skip_frame = "NONREF" if unwanted else "DEFAULT"
                for frame in packet.decode():
                    self.beat()
                    # AVI and raw streams may name no times: count on from the last
                    time = next((t for t in (frame.pts, frame.dts) if t is not None), 0 if last is None else last + 1)
                    last = time if last is None else max(time, last + 1)
                    check(frame, last)
                    yield last, frame
        except (av.FFmpegError, OSError) as error:
            if self.stream.codec_context.width == 0:  # as FFmpeg leaves it after refusing a size
                raise BadVideo(f"its pictures have no size, or more than {self.limits.max_pixels} pixels") from error
            raise BadVideo(f"cannot be decoded after packet {read}: {error.strerror}") from error
        if read < promised:
            raise BadVideo(f"cut off: {read} of the {promised} frames that its header names are there")


def _if_early(decoded: Iterator[tuple[int, VideoFrame]], start: int) -> Iterator[tuple[int, VideoFrame]] | None:
    """The same frames, if the first of them is good and not after `start`."""
    try:
        first = next(decoded, None)
    except BadVideo:
        return None
    return chain([first], decoded) if first is not None and first[0] <= start else None


class _Check:
    """Looks at each decoded frame of a file, and raises BadVideo at one that may not be used."""

    def __init__(self, limits: Limits, time_base: Fraction, size: int) -> None:
        self.limits, self.longest = limits, int(limits.max_seconds / time_base)
        self.most = max(BOMB_FROM, BOMB * size)
        self.count, self.first, self.shape = 0, 0, (0, 0)

    def __call__(self, frame: VideoFrame, time: int) -> None:
        shape = frame.height, frame.width
        if self.count == 0:
            self.first, self.shape = time, shape
            _check_pixels(*shape, self.limits)
            if abs(time) > 2**62:
                raise BadVideo(f"its times begin at {time}")
        if shape != self.shape:
            raise BadVideo(f"its size changes from {self.shape} to {shape} on the way")
        if frame.is_corrupt:
            raise BadVideo(f"frame {self.count} is damaged")
        self.count += 1
        if self.count > self.limits.max_frames:
            raise BadVideo(f"more than {self.limits.max_frames} frames")
        if self.count * shape[0] * shape[1] > self.most:
            raise BadVideo(f"a decompression bomb: more than {self.most:.1g} pixels from so few bytes")
        if time - self.first > self.longest:
            raise BadVideo(f"longer than {self.limits.max_seconds:g} seconds")


def _check_pixels(height: int, width: int, limits: Limits) -> None:
    if height * width > limits.max_pixels:
        raise BadVideo(f"pictures of {height} x {width} pixels, more than {limits.max_pixels}")


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


@contextmanager
def _opened(source: Source, limits: Limits) -> Iterator[BinaryIO]:
    """The source as a file at its beginning. A file that the caller opened stays open."""
    if isinstance(source, Path):
        with source.open("rb") as opened, _opened(opened, limits) as checked:
            yield checked
        return
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    size = file.seek(0, io.SEEK_END)
    if size > limits.max_bytes:
        raise BadVideo(f"{size} bytes, more than {limits.max_bytes}")
    file.seek(0)
    yield file


def _head(file: BinaryIO) -> bytes:
    head = file.read(400)
    file.seek(0)
    return head


def _read_still(file: BinaryIO, limits: Limits) -> np.ndarray:
    try:
        with Image.open(file, formats=STILLS) as image:
            _check_pixels(image.height, image.width, limits)  # the header's; nothing is decoded yet
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:  # whose message names an object of this process
        raise BadVideo("an image that cannot be decoded: its header is damaged") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadVideo(f"an image that cannot be decoded: {error}") from error


def _open(file: BinaryIO, container: str, limits: Limits, *, own: bool) -> tuple[InputContainer, VideoStream]:
    """Open a file object that is known to be `container`, and its first video stream that is no cover picture."""
    # FFmpeg decodes a little to learn the streams' formats, so the limit has to hold there already. In files written
    # here the header says it all.
    codec_options = {"max_pixels": str(limits.max_pixels)}
    looks = {**codec_options, "skip_frame": "all"} if own else codec_options
    try:
        demuxer = av.open(
            file,
            "r",
            format=container,
            options=looks,
            metadata_errors="replace",
            buffer_size=_BUFFER,
            io_open=_refuse,
        )
    except (av.FFmpegError, OSError) as error:
        raise BadVideo(f"its {container} header cannot be read: {error.strerror}") from error
    try:
        stream = _video_stream(demuxer)
        _check_header(demuxer, stream, limits)
    except BaseException:
        demuxer.close()
        raise
    stream.codec_context.options = codec_options
    stream.thread_type = "NONE"
    return demuxer, stream


def _video_stream(demuxer: InputContainer) -> VideoStream:
    videos = demuxer.streams.video
    if not videos:
        other = ", ".join(sorted({stream.type for stream in demuxer.streams}))
        raise BadVideo(
            f"no video stream in it, only {other}" if other else "its header is missing or damaged: no stream found"
        )
    stream = next((one for one in videos if not one.disposition & Disposition.attached_pic), videos[0])
    if stream.codec_context is None:
        raise BadVideo("its codec is not known here")
    return stream


def _check_header(demuxer: InputContainer, stream: VideoStream, limits: Limits) -> None:
    """Raise BadVideo if the file claims more than the limits allow."""
    if len(demuxer.streams) > limits.max_streams:
        raise BadVideo(f"{len(demuxer.streams)} streams, more than {limits.max_streams}")
    _check_pixels(stream.codec_context.height, stream.codec_context.width, limits)
    frames = max(stream.frames, len(stream.index_entries))
    if frames > limits.max_frames:
        raise BadVideo(f"its header names {frames} frames, more than {limits.max_frames}")
    seconds = (demuxer.duration or 0) / 1_000_000
    if seconds > limits.max_seconds:
        raise BadVideo(f"its header names {seconds:.0f} seconds, more than {limits.max_seconds:g}")


def _refuse(url: str, flags: int, options: dict[str, str]) -> None:
    raise PermissionError(f"a video file asks for another file: {url}")


# ------------------------------------------------------------------------------------------------------- writing


def cut_clips(
    source: Source,
    *,
    pts: np.ndarray,
    clips: Sequence[np.ndarray],
    size: tuple[int, int],
    fps: Fraction,
    crf: int,
    crop: Box | None = None,
    preset: str = "medium",
    limits: Limits = Limits(),
    beat: Callable[[], None] = _no_beat,
) -> Iterator[bytes]:
    """Decode a stretch of a source once and yield one file per clip, an mp4 as of `encode_mp4` (of a still, a png).

    pts: int64, times of all frames of the source, as `probe` found them; every frame that is read must stand there.
    clips: int64 numbers of the source's frames that each clip shows, never falling, also not from clip to clip.
    size: height and width of the clips, even (of a still, any). A picture (or crop) that is larger by less than two
    pixels loses its last row or column; any other is scaled.
    crop: the part of the upright picture that is shown. fps, crf, preset: as for `encode_mp4`.
    beat: called at every packet and frame.
    The same source gives the same bytes, whatever was decoded before, and wherever the stretch begins.
    Raises BadVideo if the source is damaged, beyond the limits, or not what it was.
    """
    with _opened(source, limits) as file:
        container = sniff(_head(file))
        if container in STILLS:
            picture = _cut_still(_read_still(file, limits), size, crop)
            yield from (picture for _ in clips)
            return
        with _Reader(file, container, limits, beat) as reader:
            to_clip, shown = _ToClip(size, crop), _Shown(reader, pts)
            for picks in clips:
                with _Mp4(size, fps, crf, preset) as mp4:
                    for number in picks.tolist():
                        mp4.add(shown(number, to_clip))
                    yield mp4.finish()


def _cut_still(picture: np.ndarray, size: tuple[int, int], crop: Box | None) -> bytes:
    box = _shown_box(picture.shape[:2], size, crop)
    image = Image.fromarray(picture[box.top : box.top + box.height, box.left : box.left + box.width])
    if size != (box.height, box.width):
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return encode_png(np.asarray(image))


def _shown_box(upright: tuple[int, ...], size: tuple[int, int], crop: Box | None) -> Box:
    """The part of an upright picture that becomes a clip of a size: `crop`, trimmed where that saves a scaling."""
    box = crop or Box(top=0, left=0, height=upright[0], width=upright[1])
    if box.top < 0 or box.left < 0 or box.top + box.height > upright[0] or box.left + box.width > upright[1]:
        raise BadVideo(f"the crop {box} lies outside of its pictures of {upright[0]} x {upright[1]} pixels")
    if 0 <= box.height - size[0] < 2 and 0 <= box.width - size[1] < 2:
        return Box(top=box.top, left=box.left, height=size[0], width=size[1])
    return box


class _Shown:
    """Frames of a source by number, in rising order; each is converted once, however often it is shown."""

    def __init__(self, reader: _Reader, pts: np.ndarray) -> None:
        self.reader, self.pts = reader, pts
        self.frames: Iterator[tuple[int, VideoFrame]] = iter(())
        self.number = -1
        self.made: VideoFrame | None = None

    def __call__(self, number: int, convert: "_ToClip") -> VideoFrame:
        if self.made is not None and number == self.number:
            return self.made
        if number < self.number or number >= len(self.pts):
            raise ValueError(f"frame {number} asked for after {self.number}, of {len(self.pts)}")
        if self.number < 0 or (
            number - self.number > _LEAP and self.reader.leaps(int(self.pts[self.number]), int(self.pts[number]))
        ):
            self.frames = self.reader.frames_numbered(number, self.pts)
        for i, frame in self.frames:
            if i == number:
                self.number, self.made = number, (made := convert(frame))
                return made
        raise BadVideo(f"frame {number} is not there any more")


class _ToClip:
    """Turns decoded frames into upright ones of one size in yuv420p, BT.709, limited range, by one FFmpeg graph."""

    def __init__(self, size: tuple[int, int], crop: Box | None) -> None:
        self.size, self.crop = size, crop
        self.kind: tuple[object, ...] = ()
        self.graph: Graph  # must outlive its two ends
        self.entry: FilterContext
        self.exit: FilterContext

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        colours = _Colours.of(frame)
        kind = frame.format.name, colours, _quarter_turns(frame), frame.height, frame.width
        try:
            if kind != self.kind:
                self._build(frame, colours)
                self.kind = kind
            frame.colorspace, frame.color_range = colours.matrix, ColorRange.JPEG if colours.full else ColorRange.MPEG
            self.entry.push(frame)
            made = self.exit.pull()
        except (av.FFmpegError, ValueError) as error:
            raise BadVideo(f"pictures of format {frame.format.name} cannot be converted: {error}") from error
        assert isinstance(made, VideoFrame)
        return made

    def _build(self, frame: VideoFrame, colours: _Colours) -> None:
        self.graph = Graph()
        self.graph.threads = 1
        self.entry = self.graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base="1/1",
            pixel_aspect="1/1",
            colorspace=str(colours.matrix),
            range=str(int(ColorRange.JPEG if colours.full else ColorRange.MPEG)),
        )
        steps = [self.graph.add(name, options) for name, options in self._steps(frame, colours)]
        self.exit = self.graph.add("buffersink")
        self.graph.link_nodes(self.entry, *steps, self.exit)
        self.graph.configure()

    def _steps(self, frame: VideoFrame, colours: _Colours) -> list[tuple[str, str]]:
        """Names and options of filters: crop, scale, colours, turn (last, where pictures are small)."""
        turns = _quarter_turns(frame)
        upright = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        box = _turned_box(_shown_box(upright, self.size, self.crop), (frame.height, frame.width), turns)
        height, width = self.size[::-1] if turns % 2 else self.size
        crop = f"{box.width}:{box.height}:{box.left}:{box.top}:exact=1"
        scale = f"{width}:{height}:flags=bicubic+accurate_rnd+full_chroma_int"
        turn = {
            0: [],
            1: [("transpose", "cclock")],
            2: [("hflip", ""), ("vflip", "")],
            3: [("transpose", "clock")],
        }[turns]
        return [("crop", crop), *_coloured(frame, colours, scale), *turn, ("sidedata", "mode=delete")]


def _coloured(frame: VideoFrame, colours: _Colours, scale: str) -> list[tuple[str, str]]:
    """Filters that scale, and change pixel format and colours to those of clips."""
    kind, matrix = frame.format, _MATRICES[colours.matrix]
    if kind.is_rgb or kind.has_palette:
        return [("scale", f"{scale}:out_color_matrix=bt709:out_range=limited"), ("format", "yuv420p")]
    extent = "full" if colours.full else "limited"
    same = f"in_color_matrix={matrix.scale}:out_color_matrix={matrix.scale}:in_range={extent}:out_range={extent}"
    if matrix.scale == "bt709" and not colours.full:
        return [("scale", f"{scale}:{same}"), ("format", "yuv420p")]
    # The scaler could do this too, but goes through RGB in 8 bits, slowly, or with a bias in full-range chroma.
    change = f"iall=bt709:ispace={matrix.colorspace}:irange={'pc' if colours.full else 'tv'}:all=bt709:range=tv"
    depth = max(component.bits for component in kind.components)
    deep = "yuv420p" if depth <= 8 else "yuv420p10" if depth <= 10 else "yuv420p12"
    return [("scale", f"{scale}:{same}"), ("format", deep), ("colorspace", f"{change}:format=yuv420p")]


def _turned_box(box: Box, stored: tuple[int, int], turns: int) -> Box:
    """A box of the upright picture as it lies in the stored one, which is turned `turns` times counterclockwise."""
    top, left = box.top, box.left
    below, beside = stored[turns % 2] - top - box.height, stored[1 - turns % 2] - left - box.width
    if turns == 0:
        return box
    if turns == 2:
        return Box(top=below, left=beside, height=box.height, width=box.width)
    top, left = (left, below) if turns == 1 else (beside, top)
    return Box(top=top, left=left, height=box.width, width=box.height)


class _Mp4:
    """An mp4 in memory that grows frame by frame: H.264, yuv420p in BT.709, closed groups, header in front."""

    def __init__(self, size: tuple[int, int], fps: Fraction | float, crf: int, preset: str) -> None:
        if max(size) > LONGEST_SIDE:
            raise BadVideo(f"clips of {size[0]} x {size[1]} pixels, H.264 ends at {LONGEST_SIDE} (pack.max_side)")
        self.size, self.step, self.count, out = size, 1 / rational(fps), 0, io.BytesIO()
        self.out = out
        self.muxer = av.open(
            out,
            "w",
            format="mp4",
            options={"movflags": "faststart"},
            # to move the header in front, the muxer reads back what it has written
            io_open=lambda *_: io.BytesIO(out.getvalue()),
        )
        options = {"crf": str(crf), "preset": preset, **_X264}
        self.stream = self.muxer.add_stream("libx264", rate=rational(fps), options=options)
        self.stream.height, self.stream.width, self.stream.pix_fmt = *size, "yuv420p"
        context = self.stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG

    def add(self, frame: VideoFrame) -> None:
        """Encode a frame in yuv420p, BT.709, limited range; what else it carries from its source is dropped."""
        frame.pts, frame.time_base, frame.duration, frame.pict_type = self.count, self.step, 1, PictureType.NONE
        self.count += 1
        self.muxer.mux(self.stream.encode(frame))

    def finish(self) -> bytes:
        """The whole file."""
        self.muxer.mux(self.stream.encode())
        self.muxer.close()
        return self.out.getvalue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.muxer.close()


def encode_mp4(
    frames: np.ndarray | Iterable[np.ndarray], fps: Fraction | float, crf: int, preset: str = "medium"
) -> bytes:
    """Encode uint8 (T, H, W, 3), or T frames (H, W, 3) one by one, as an mp4. The same frames give the same bytes.

    H.264, yuv420p in BT.709, constant rate, closed groups of at most GOP frames, header in front (streamable).
    H and W must be even. crf: x264's quality factor, 0 (lossless in yuv) to 51. preset: x264's speed.
    """
    pending = iter(frames)
    first = next(pending, None)
    if first is None:
        raise ValueError("there are no frames to encode")
    scaler, size = VideoReformatter(), first.shape[:2]
    _check_rgb(first, size)
    with _Mp4(size, fps, crf, preset) as mp4:
        for rgb in chain([first], pending):
            _check_rgb(rgb, size)
            mp4.add(
                scaler.reformat(
                    VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"),
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=_EXACT,
                    threads=1,
                )
            )
        return mp4.finish()


def _check_rgb(rgb: np.ndarray, size: tuple[int, ...]) -> None:
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or rgb.shape[0] % 2 or rgb.shape[1] % 2:
        raise ValueError(f"a frame must be uint8 (H, W, 3) with even H and W, not {rgb.dtype} {rgb.shape}")
    if rgb.shape[:2] != size:
        raise ValueError(f"frames differ in size: {rgb.shape[:2]} after {size}")


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) without loss; the same image gives the same bytes."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def write_mp4(path: Path, frames: np.ndarray, fps: Fraction | float, crf: int = 18) -> None:
    """`encode_mp4` into a file."""
    path.write_bytes(encode_mp4(frames, fps, crf))
