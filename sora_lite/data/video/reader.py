"""The frames of a file in order of presentation, from any place on, each checked."""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain
from types import TracebackType
from typing import BinaryIO, Self

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from sora_lite.data.video.facts import LIMITS, BadVideo, Limits, no_beat
from sora_lite.data.video.opening import check_pixels, open_stream

BOMB = 1_000_000
"""Pixels for each byte of a file beyond which it is a decompression bomb: blank video gives up to some 100,000."""
BOMB_FROM = 2_000_000_000
"""Pixels that any file may hold: a few seconds of decoding."""
_SEEKABLE = ("mov", "matroska")
"""Containers with an index of exact times."""
_SKIPPABLE = ("mpegts", "mpeg")
"""Containers whose packets carry times, without an index: what is not wanted is read, but not decoded."""
_BACK_OFF = (0, 1, 10, 100)
"""Seconds before the wanted time that a seek aims at, one after the other until it lands early enough."""
_HELD = 64 * 2**20
"""Most bytes of packets that are kept on the way to the last keyframe before a time."""


class Reader:
    """The first video stream of a file object that is known to be `container`, decoded in this thread alone.

    own: the file was written here (`is_own`).
    """

    def __init__(
        self,
        file: BinaryIO,
        container: str,
        limits: Limits = LIMITS,
        beat: Callable[[], None] = no_beat,
        *,
        own: bool = False,
    ) -> None:
        self.file, self.container, self.limits, self.beat, self.own = file, container, limits, beat, own
        self.demuxer, self.stream = open_stream(file, container, limits, own=own)
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
            self.demuxer, self.stream = open_stream(self.file, self.container, self.limits, own=self.own)
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
        read, last, check = 0, None, Check(self.limits, self.time_base, self.demuxer.size)
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


class Check:
    """Looks at each decoded frame of a file, and raises BadVideo at one that may not be used."""

    def __init__(self, limits: Limits, time_base: Fraction, size: int) -> None:
        self.limits, self.longest = limits, int(limits.max_seconds / time_base)
        self.most = max(BOMB_FROM, BOMB * size)
        self.count, self.first, self.shape = 0, 0, (0, 0)

    def __call__(self, frame: VideoFrame, time: int) -> None:
        shape = frame.height, frame.width
        if self.count == 0:
            self.first, self.shape = time, shape
            check_pixels(*shape, self.limits)
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
