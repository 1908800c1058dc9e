"""Videos of grey frames, whose brightness is their number."""

from functools import partial

import numpy as np
import stamped as stamps

FRAMES, SIDE, STEP = 20, 32, 12


def stamped(frames: int = FRAMES, height: int = SIDE, width: int = SIDE, step: int = STEP) -> np.ndarray:
    """uint8 (frames, height, width, 3). step: levels of grey from one frame to the next."""
    levels = (np.arange(frames) * step % 256).astype(np.uint8)[:, None, None, None]
    return np.ascontiguousarray(np.broadcast_to(levels, (frames, height, width, 3)))


def numbers(clip: np.ndarray, step: int = STEP) -> list[int]:
    """The numbers of a clip's frames."""
    return [round(float(frame.mean()) / step) for frame in clip]


def textured() -> np.ndarray:
    """Frames that do not compress: uint8 (FRAMES, 64, 64, 3)."""
    return np.random.default_rng(0).integers(0, 255, (FRAMES, 64, 64, 3), dtype=np.uint8)


muxed = partial(stamps.muxed, rate=8)
"""A file as others may write it, at 8 frames a second."""
