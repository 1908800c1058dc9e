"""Clips per CPU second out of the bytes of one clip as `sora-data` writes it: ours, decord and plain PyAV.

Ours and decord can start at the keyframe before the wanted frames; the plain way decodes all that comes before.
"""

import io
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice

import av
import numpy as np
from PIL import Image

from benchmarks.measure import table, take_turns
from benchmarks.packing import FPS, footage
from sora_lite.data.video import decode_clip, encode_mp4

FRAMES, SIZE = 96, (256, 456)
WANTED = {
    "all its frames": {"frames": FRAMES},
    "17 at 8 frames a second": {"frames": 17, "fps": 8.0},
    "17 from number 70 on": {"frames": 17, "start_frame_offset": 70},
}


def plain(data: bytes, frames: int, fps: float = FPS, start_frame_offset: int = 0) -> np.ndarray:
    """As PyAV's own examples do it."""
    numbers = {start_frame_offset + int(i * FPS / fps) for i in range(frames)}
    with av.open(io.BytesIO(data)) as file:
        decoded = islice(enumerate(file.decode(video=0)), max(numbers) + 1)
        return np.stack([frame.to_ndarray(format="rgb24") for i, frame in decoded if i in numbers])


def main() -> None:
    """Print the tables."""
    small = (Image.fromarray(frame).resize(SIZE[::-1], Image.Resampling.BICUBIC) for frame in footage(FRAMES))
    data = encode_mp4([np.asarray(frame) for frame in small], FPS, 18)
    for what, wanted in WANTED.items():
        candidates: dict[str, Callable[[], object]] = {
            "plain PyAV": lambda wanted=wanted: plain(data, **wanted),  # type: ignore[misc]
            "sora_lite, decoder=pyav": lambda wanted=wanted: decode_clip(data, **wanted),  # type: ignore[misc]
        }
        if find_spec("decord"):
            candidates["sora_lite, decoder=decord"] = lambda wanted=wanted: decode_clip(  # type: ignore[misc]
                data, decoder="decord", **wanted
            )
        title = f"decoding a clip of {FRAMES} x {SIZE[0]} x {SIZE[1]}: {what}"
        print(table(title, "clips", take_turns(candidates, rounds=5), 1))
    if not find_spec("decord"):
        print("decord is not installed: pip install decord (Linux on x86-64)")
