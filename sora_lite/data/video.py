"""Frames out of video files and into them. PyAV only; nothing here knows about tensors.

Shapes: T frames, H height, W width; frames are uint8 RGB (T, H, W, 3) in [0, 255], upright (rotation applied).
`pts` is a frame's presentation time in ticks of `time_base` seconds.

Files may come from anywhere. Their first bytes must name a container of the list below, FFmpeg is told to use the
demuxer of that container and no other, and it cannot open a second file: a playlist in disguise reads nothing.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

GOP = 48
"""Most frames from one keyframe to the next in what is written here; groups are closed."""
STILLS = ("png", "jpeg", "webp")
"""Containers (of `sniff`) that hold a still image."""
_SEEKABLE = ("mov", "matroska")
"""Containers with an index of exact times."""
_BOX_TYPES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_X264 = {
    # Two things make x264's bytes vary: the number of threads, and macroblock-tree rate control, whose vector code
    # reads past the end of its rows where a picture is not a multiple of 8 macroblocks wide (seen in x264 165).
    "x264-params": f"keyint={GOP}:open-gop=0:threads=1:mbtree=0"
}
_BT709 = 1  # the code of primaries, transfer and matrix alike (ITU-T H.273)


class BadVideo(Exception):
    """The bytes are no video or image that can be used whole. The message is the reason, without the file's name."""


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

    def __post_init__(self) -> None:
        if self.pts.ndim != 1 or len(self.pts) == 0 or self.pts.dtype != np.int64:
            raise ValueError(f"pts must be a filled int64 (T,), not {self.pts.dtype} {self.pts.shape}")

    @property
    def frames(self) -> int:
        return len(self.pts)

    @property
    def duration_seconds(self) -> float:
        return float((int(self.pts[-1]) - int(self.pts[0])) * self.time_base + 1 / self.average_rate)


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


def probe(source: Path | bytes) -> VideoFacts:
    """Decode all of a file and say what is in it. Raises BadVideo if any of it is missing or damaged."""
    with _opened(source) as file:
        container = sniff(_head(file))
        if container in STILLS:
            height, width, _ = _read_still(file).shape
            return VideoFacts(
                container=container,
                codec=container,
                width=width,
                height=height,
                sar=Fraction(1),
                rotation=0,
                time_base=Fraction(1),
                average_rate=Fraction(1),
                pts=np.zeros(1, dtype=np.int64),
            )
        with _demuxed(file, container) as (demuxer, stream):
            pts, first = [], None
            for time, frame in _decode(demuxer, stream):
                first = first or frame
                pts.append(time)
            if first is None:
                raise BadVideo("no frame of it can be decoded")
            turned = _quarter_turns(first) % 2 == 1
            sar = stream.sample_aspect_ratio or Fraction(1)
            assert stream.time_base is not None
            return VideoFacts(
                container=container,
                codec=stream.codec_context.name,
                width=first.height if turned else first.width,
                height=first.width if turned else first.height,
                sar=1 / sar if turned else sar,
                rotation=_quarter_turns(first) * 90,
                time_base=stream.time_base,
                average_rate=_rate(pts, stream.time_base, stream.average_rate),
                pts=np.array(pts, dtype=np.int64),
            )


def read_frames(
    source: Path | bytes, *, size: tuple[int, int] | None = None, start: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (pts, uint8 (H, W, 3)) for every frame of a file, upright, scaled to `size` (height, width) if given.

    start: pts of the first frame that is wanted; where the container allows it, what comes before is skipped quickly.
    Raises BadVideo as soon as something is missing or damaged.
    """
    with _opened(source) as file:
        container = sniff(_head(file))
        if container in STILLS:
            image = Image.fromarray(_read_still(file))
            yield 0, np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC) if size else image)
            return
        seeks = start is not None and container in _SEEKABLE and _lands_before(file, container, start)
        with _demuxed(file, container) as (demuxer, stream):
            if seeks and start is not None:
                demuxer.seek(start, stream=stream)
            to_rgb = _RGB(size)
            for time, frame in _decode(demuxer, stream, whole=not seeks):
                if start is None or time >= start:
                    yield time, to_rgb(frame)


def decode_clip(data: bytes, *, frames: int, fps: float | None = None, start_frame_offset: int = 0) -> np.ndarray:
    """Decode some frames of a clip -> uint8 (frames, H, W, 3).

    Output frame i is the last frame with pts <= start + i / fps, where start is the pts of the clip's frame number
    `start_frame_offset`. fps None takes every frame. A still image is a clip of one frame.
    Raises BadVideo if the clip is damaged, or if it ends (with its last frame's duration) before the last of these
    times.
    """
    file = io.BytesIO(data)
    container = sniff(data[:400])
    if container in STILLS:
        if frames != 1 or start_frame_offset != 0:
            raise BadVideo(f"a still image has no frames {start_frame_offset} to {start_frame_offset + frames - 1}")
        return _read_still(file)[None]
    with _demuxed(file, container) as (demuxer, stream):
        decoded = _decode(demuxer, stream)
        if fps is None:
            picked = _every(decoded, start_frame_offset, frames)
        else:
            assert stream.time_base is not None
            picked = _at_rate(decoded, start_frame_offset, frames, 1 / (rational(fps) * stream.time_base))
        to_rgb = _RGB()
        clip = [to_rgb(frame) for frame in picked]
    if len(clip) < frames:
        raise BadVideo(f"it ends after {len(clip)} of {frames} frames from number {start_frame_offset} at fps {fps}")
    return np.stack(clip)


def rational(fps: float | Fraction) -> Fraction:
    """The exact rate that a rounded one stands for: 29.97002997 is 30000/1001."""
    return Fraction(fps).limit_denominator(1001)


def _every(decoded: Iterator[tuple[int, VideoFrame]], start: int, count: int) -> Iterator[VideoFrame]:
    for i, (_, frame) in enumerate(decoded):
        if i >= start:
            yield frame
        if i + 1 == start + count:  # before the decoder is asked for one more
            return


def _at_rate(
    decoded: Iterator[tuple[int, VideoFrame]], start: int, count: int, ticks: Fraction
) -> Iterator[VideoFrame]:
    """The last frame at or before each of `count` times, `ticks` of the time base apart."""
    done, origin, held = 0, 0, None
    for i, (time, frame) in enumerate(decoded):
        if i < start:
            continue
        if held is None:
            origin = time
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


class _RGB:
    """Turns decoded frames into upright RGB arrays; one FFmpeg scaler serves a whole clip."""

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self.size, self.scaler = size, VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        turns = _quarter_turns(frame)
        height, width = self.size or (None, None)
        if turns % 2 == 1:
            height, width = width, height
        rgb = self.scaler.reformat(
            frame, width, height, "rgb24", interpolation=_EXACT, dst_color_range=ColorRange.JPEG, threads=1
        ).to_ndarray()
        return np.rot90(rgb, turns) if turns else rgb


def _quarter_turns(frame: VideoFrame) -> int:
    """Quarter turns counterclockwise that make the frame upright: 0 to 3."""
    return round(frame.rotation / 90) % 4


def _lands_before(file: BinaryIO, container: str, start: int) -> bool:
    """Whether seeking to `start` finds a frame at or before it. Some files seek beyond, by their headers' fault."""
    with _demuxed(file, container) as (demuxer, stream):
        demuxer.seek(start, stream=stream)
        first = next(_decode(demuxer, stream, whole=False), None)
    file.seek(0)
    return first is not None and first[0] <= start


def _decode(demuxer: InputContainer, stream: VideoStream, *, whole: bool = True) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (pts, frame) in order of presentation; pts strictly increase. Raises BadVideo at the first fault.

    whole: the file is read from its beginning, so at its end everything that the header names must have come.
    """
    exact = whole and "mp4" in demuxer.format.name  # of the headers only mp4's counts can be relied on
    promised = len(stream.index_entries) if exact else 0
    packets, last, shape = 0, None, None
    try:
        for packet in demuxer.demux(stream):
            packets += packet.size > 0
            if packet.is_corrupt:
                raise BadVideo(f"cut off or damaged at packet {packets}")
            for frame in packet.decode():
                # AVI and raw streams may name no times: count on from the last
                time = next((t for t in (frame.pts, frame.dts) if t is not None), 0 if last is None else last + 1)
                last = time if last is None else max(time, last + 1)
                shape = shape or (frame.height, frame.width)
                if shape != (frame.height, frame.width):
                    raise BadVideo(f"its size changes from {shape} to {(frame.height, frame.width)} on the way")
                yield last, frame
    except (av.FFmpegError, OSError) as error:
        raise BadVideo(f"cannot be decoded after packet {packets}: {error.strerror}") from error
    if packets < promised:
        raise BadVideo(f"cut off: {packets} of the {promised} frames that its header names are there")


def _rate(pts: list[int], time_base: Fraction, named: Fraction | None) -> Fraction:
    """Frames per second: the header's figure where the decoded times agree with it, else theirs."""
    if len(pts) == 1:
        return named or Fraction(1)
    measured = (len(pts) - 1) / ((pts[-1] - pts[0]) * time_base)
    drift = abs(named / measured - 1) * (len(pts) - 1) if named else 1  # in frames, at the end of the file
    return named if named and drift < Fraction(1, 2) else rational(measured)


def _opened(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _head(file: BinaryIO) -> bytes:
    head = file.read(400)
    file.seek(0)
    return head


def _read_still(file: BinaryIO) -> np.ndarray:
    try:
        with Image.open(file, formats=STILLS) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadVideo(f"an image that cannot be decoded: {error}") from error


@contextmanager
def _demuxed(file: BinaryIO, container: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file object that is known to be `container`; its first video stream decodes in this thread alone."""
    try:
        demuxer = av.open(file, "r", format=container, io_open=_refuse)
    except (av.FFmpegError, OSError) as error:
        raise BadVideo(f"its {container} header cannot be read: {error.strerror}") from error
    with demuxer:
        if not demuxer.streams.video:
            other = ", ".join(sorted({stream.type for stream in demuxer.streams}))
            raise BadVideo(
                f"no video stream in it, only {other}" if other else "its header is missing or damaged: no stream found"
            )
        stream = demuxer.streams.video[0]
        stream.thread_type = "NONE"
        yield demuxer, stream


def _refuse(url: str, flags: int, options: dict[str, str]) -> None:
    raise PermissionError(f"a video file asks for another file: {url}")


# ------------------------------------------------------------------------------------------------------- writing


def encode_mp4(
    frames: np.ndarray | Iterable[np.ndarray], fps: Fraction | float, crf: int, preset: str = "medium"
) -> bytes:
    """Encode uint8 (T, H, W, 3), or T frames (H, W, 3) one by one, as an mp4. The same frames give the same bytes.

    H.264, yuv420p in BT.709, constant rate, closed groups of at most GOP frames, header in front (streamable).
    H and W must be even. crf: x264's quality factor, 0 (lossless in yuv) to 51. preset: x264's speed.
    """
    out, scaler, stream = io.BytesIO(), VideoReformatter(), None
    # to move the header in front, the muxer reads back what it has written
    with av.open(
        out, "w", format="mp4", options={"movflags": "faststart"}, io_open=lambda *_: io.BytesIO(out.getvalue())
    ) as muxer:
        for rgb in frames:
            if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or rgb.shape[0] % 2 or rgb.shape[1] % 2:
                raise ValueError(f"a frame must be uint8 (H, W, 3) with even H and W, not {rgb.dtype} {rgb.shape}")
            if stream is None:
                stream = _h264_stream(muxer, rgb.shape, fps, {"crf": str(crf), "preset": preset})
            elif rgb.shape[:2] != (stream.height, stream.width):
                raise ValueError(f"frames differ in size: {rgb.shape[:2]} after {(stream.height, stream.width)}")
            frame = scaler.reformat(
                VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT,
                threads=1,
            )
            muxer.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("there are no frames to encode")
        muxer.mux(stream.encode())
    return out.getvalue()


def _h264_stream(
    muxer: OutputContainer, shape: tuple[int, ...], fps: Fraction | float, options: dict[str, str]
) -> VideoStream:
    stream = muxer.add_stream("libx264", rate=rational(fps), options={**options, **_X264})
    stream.height, stream.width, stream.pix_fmt = *shape[:2], "yuv420p"
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = ColorRange.MPEG
    return stream


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) without loss; the same image gives the same bytes."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def write_mp4(path: Path, frames: np.ndarray, fps: Fraction | float, crf: int = 18) -> None:
    """`encode_mp4` into a file."""
    path.write_bytes(encode_mp4(frames, fps, crf))
