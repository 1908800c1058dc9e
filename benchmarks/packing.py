"""Clips per CPU second out of a long video: `cut_clips`, which decodes a stretch once, against one ffmpeg per clip.

Both get the same preset and crf, and the scaler's usual bicubic method. CPU time is that of all threads, and of the
processes of ffmpeg. A second table says how much of ours is spent inside FFmpeg's libraries: the rest is Python.
"""

import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
from PIL import Image

from sora_lite.data.video import cut_clips, cutting, encoding, probe, reader

HEIGHT, WIDTH, FPS, FRAMES, GROUP = 720, 1280, 24, 576, 250
CLIP, CRF, ROUNDS = 96, 18, 2
CASES = [((256, 456), "medium"), ((256, 456), "veryfast"), ((480, 852), "medium")]


def footage(frames: int = FRAMES) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3): a camera that pans over a texture of all scales, something that moves before it, and grain."""
    rng = np.random.default_rng(0)
    texture = np.zeros((2 * HEIGHT, 2 * WIDTH, 3), np.float32)
    for octave in range(2, 9):
        waves = rng.normal(size=(2**octave, 2 ** (octave + 1), 3)).astype(np.float32)
        layers = [
            Image.fromarray(waves[:, :, c]).resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC) for c in range(3)
        ]
        texture += np.stack([np.asarray(layer) for layer in layers], axis=2) / 1.6**octave
    texture = (texture - texture.min()) * (255 / np.ptp(texture))
    grain = rng.normal(0, 4.0, (8, HEIGHT, WIDTH, 1)).astype(np.float32)
    for t in range(frames):
        y, x = int(HEIGHT / 2 * (1 + np.sin(t / 97))), int(WIDTH / 2 * (1 + np.sin(t / 131)))
        frame = texture[y : y + HEIGHT, x : x + WIDTH].copy()
        top, left = (
            int((HEIGHT - 200) * (0.5 + 0.5 * np.sin(t / 23))),
            int((WIDTH - 200) * (0.5 + 0.5 * np.cos(t / 31))),
        )
        frame[top : top + 200, left : left + 200] = texture[:200, :200]
        yield (frame + grain[t % 8]).clip(0, 255).astype(np.uint8)


def write_source(path: Path) -> None:
    """An mp4 as found anywhere: 4 Mbit/s, B-frames, x264's default groups of up to 250 frames."""
    with av.open(str(path), "w") as muxer:
        options = {"b": "4000000", "preset": "fast", "x264-params": f"keyint={GROUP}"}
        stream = muxer.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for frame in footage():
            muxer.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        muxer.mux(stream.encode())


def cpu_seconds() -> float:
    """Of this process and of all that it has started and waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def spent(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = cpu_seconds()
    call()
    return cpu_seconds() - start


def cut(path: Path, pts: np.ndarray, size: tuple[int, int], preset: str) -> list[bytes]:
    """Ours: all clips of the source."""
    picks = [np.arange(first, first + CLIP) for first in range(0, len(pts) - CLIP + 1, CLIP)]
    return list(cut_clips(path, pts=pts, clips=picks, size=size, fps=Fraction(FPS), crf=CRF, preset=preset))


def cut_by_ffmpeg(path: Path, pts: np.ndarray, size: tuple[int, int], preset: str) -> None:
    """The plain way: a command per clip."""
    for first in range(0, len(pts) - CLIP + 1, CLIP):
        at, length = first / FPS, CLIP / FPS
        command = ["ffmpeg", "-v", "error", "-y", "-ss", f"{at:.3f}", "-i", str(path), "-t", f"{length:.3f}"]
        command += ["-vf", f"scale={size[1]}:{size[0]}", "-c:v", "libx264", "-preset", preset, "-crf", str(CRF)]
        subprocess.run([*command, str(path.with_name("clip.mp4"))], check=True)


class Clock:
    """CPU seconds inside the calls that it is laid around."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, measured."""

        def measured(*values: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*values, **named)
            finally:
                self.seconds[what] = self.seconds.get(what, 0.0) + time.thread_time() - start

        return measured


class Part:
    """Stands for an object of PyAV whose named methods are measured; all else is the object's own."""

    def __init__(self, inner: Any, clock: Clock, **what: str) -> None:
        vars(self).update(inner=inner, **{name: clock.timed(kind, getattr(inner, name)) for name, kind in what.items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)


class Packets(Part):
    """A demuxer whose packets are measured too."""

    def demux(self, stream: Any) -> Iterator[Part]:
        packets = self.inner.demux(stream.inner)
        following = self.clock.timed("read", lambda: next(packets, None))
        while (packet := following()) is not None:
            yield Part(packet, self.clock, decode="decode")


def inside_ffmpeg(path: Path, pts: np.ndarray, size: tuple[int, int], preset: str) -> tuple[dict[str, float], float]:
    """CPU seconds by kind of call into FFmpeg, and in all, for the same clips as `cut`."""
    clock, opened, built, started = Clock(), reader.open_stream, cutting._ToClip._build, encoding.Mp4.__init__

    def open_(*values: Any, **named: Any) -> tuple[Packets, Part]:
        demuxer, stream = clock.timed("read", opened)(*values, **named)
        packets = Packets(demuxer, clock, seek="read")
        vars(packets)["clock"] = clock
        return packets, Part(stream, clock)

    def build(to_clip: Any, *values: Any) -> None:
        clock.timed("scale", built)(to_clip, *values)
        to_clip.entry, to_clip.exit = Part(to_clip.entry, clock, push="scale"), Part(to_clip.exit, clock, pull="scale")

    def start(mp4: Any, *values: Any) -> None:
        clock.timed("encode", started)(mp4, *values)
        mp4.stream = Part(mp4.stream, clock, encode="encode")
        mp4.muxer = Part(mp4.muxer, clock, mux="encode", close="encode")

    with (
        patch.object(reader, "open_stream", open_),
        patch.object(cutting._ToClip, "_build", build),
        patch.object(encoding.Mp4, "__init__", start),
    ):
        seconds = spent(lambda: cut(path, pts, size, preset))
    return clock.seconds, seconds


def compare(path: Path, pts: np.ndarray, size: tuple[int, int], preset: str, clips: int) -> str:
    """The row of one size and preset; the two take turns, so that a busy machine slows both alike."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(spent(lambda: cut(path, pts, size, preset)))
        if shutil.which("ffmpeg"):
            theirs.append(spent(lambda: cut_by_ffmpeg(path, pts, size, preset)))
    row = f"  {f'{size[1]} x {size[0]}, {preset}':<24}sora_lite {clips / statistics.median(ours):5.2f} clips/s"
    if not theirs:
        return row
    plain = statistics.median(theirs)
    return f"{row}   ffmpeg {clips / plain:5.2f} clips/s{plain / statistics.median(ours):8.2f}x"


def share(path: Path, pts: np.ndarray, size: tuple[int, int], preset: str) -> str:
    """The row of the second table for one size and preset."""
    parts, whole = inside_ffmpeg(path, pts, size, preset)
    shown = "".join(f"   {what} {seconds / whole:5.1%}" for what, seconds in parts.items())
    return f"  {f'{size[1]} x {size[0]}, {preset}':<24}together {sum(parts.values()) / whole:5.1%}:{shown}"


def main() -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "source.mp4"
        write_source(path)
        pts = probe(path).pts
        clips = len(pts) // CLIP
        print(f"packing {clips} clips of {CLIP} frames out of an mp4 of {WIDTH} x {HEIGHT}, crf {CRF}")
        for size, preset in CASES:
            print(compare(path, pts, size, preset, clips))
        if not shutil.which("ffmpeg"):
            print("  no ffmpeg to compare with: install it (Debian, Ubuntu: apt-get install ffmpeg)")
        print("share of sora_lite's CPU time that is spent in FFmpeg's libraries")
        for size, preset in CASES:
            print(share(path, pts, size, preset))
