"""What all modules of this package speak of: videos, what they may hold, and what is wrong with them."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np

GOP = 48
"""Most frames from one keyframe to the next in what is written here; groups are closed."""
STILLS = ("png", "jpeg", "webp")
"""Containers (of `sniff`) that hold a still image."""
Planes = tuple[np.ndarray, np.ndarray, np.ndarray] | np.ndarray
"""A frame's red, green and blue, each uint8 (H, W); one array of all three where the pixels are packed in memory."""
Source = Path | bytes | BinaryIO
"""A file's path or content, or a binary file that is open for reading and can seek; its place in it does not matter."""


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


LIMITS = Limits()
"""Of what has no settings of its own."""


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


def shown_size(facts: VideoFacts) -> tuple[int, int]:
    """Height and width in square pixels at which a video is shown: the width changes where pixels are not square."""
    return facts.height, max(1, round(facts.width * facts.sar))


def rational(fps: float | Fraction) -> Fraction:
    """The exact rate that a rounded one stands for: 29.97002997 is 30000/1001."""
    return Fraction(fps).limit_denominator(1001) or Fraction(fps)


def no_beat() -> None:
    """For callers that nobody watches."""
