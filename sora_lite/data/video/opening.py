"""Opening files that may come from anywhere.

Their first bytes must name a container of the list below, FFmpeg is told to use the demuxer of that container and no
other, and it cannot open a second file: a playlist in disguise reads nothing. What a file claims to hold is checked
against `Limits` before anything is decoded.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
import av.subtitles.stream  # PyAV would load it with the first file, for which there may be no memory left
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from sora_lite.data.video.facts import GOP, STILLS, BadVideo, Limits, Source

_BOX_TYPES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_BUFFER = 256 * 1024
"""Bytes that FFmpeg reads at a time."""


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


def is_own(data: bytes) -> bool:
    """Whether an mp4 was written here, so that its rate is constant and its groups are closed: x264 notes its settings
    in front of the first frame."""
    head = data[: 64 * 1024]
    return all(setting in head for setting in (b"x264 - core", f" keyint={GOP} ".encode(), b" open_gop=0 "))


@contextmanager
def opened(source: Source, limits: Limits) -> Iterator[BinaryIO]:
    """The source as a file at its beginning. A file that the caller opened stays open."""
    if isinstance(source, Path):
        with source.open("rb") as plain, opened(plain, limits) as checked:
            yield checked
        return
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    size = file.seek(0, io.SEEK_END)
    if size > limits.max_bytes:
        raise BadVideo(f"{size} bytes, more than {limits.max_bytes}")
    file.seek(0)
    yield file


def head_of(file: BinaryIO) -> bytes:
    """What `sniff` needs of a file; its place goes back to the beginning."""
    head = file.read(400)
    file.seek(0)
    return head


def read_still(file: BinaryIO, limits: Limits) -> np.ndarray:
    """A picture, upright -> uint8 (H, W, 3). Raises BadVideo if it is damaged or beyond the limits."""
    try:
        with Image.open(file, formats=STILLS) as image:
            check_pixels(image.height, image.width, limits)  # the header's; nothing is decoded yet
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:  # whose message names an object of this process
        raise BadVideo("an image that cannot be decoded: its header is damaged") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadVideo(f"an image that cannot be decoded: {error}") from error


def open_stream(file: BinaryIO, container: str, limits: Limits, *, own: bool) -> tuple[InputContainer, VideoStream]:
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
    check_pixels(stream.codec_context.height, stream.codec_context.width, limits)
    frames = max(stream.frames, len(stream.index_entries))
    if frames > limits.max_frames:
        raise BadVideo(f"its header names {frames} frames, more than {limits.max_frames}")
    seconds = (demuxer.duration or 0) / 1_000_000
    if seconds > limits.max_seconds:
        raise BadVideo(f"its header names {seconds:.0f} seconds, more than {limits.max_seconds:g}")


def check_pixels(height: int, width: int, limits: Limits) -> None:
    """Raise BadVideo for pictures that are too large."""
    if height * width > limits.max_pixels:
        raise BadVideo(f"pictures of {height} x {width} pixels, more than {limits.max_pixels}")


def _refuse(url: str, flags: int, options: dict[str, str]) -> None:
    raise PermissionError(f"a video file asks for another file: {url}")
