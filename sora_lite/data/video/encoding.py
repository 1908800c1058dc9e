"""Frames into files: H.264 in mp4, and png. The same frames give the same bytes."""

import io
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

from sora_lite.data.video.colours import EXACT
from sora_lite.data.video.facts import GOP, BadVideo, rational

LONGEST_SIDE = 16384
"""Most pixels of a side that x264 takes."""
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


class Mp4:
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
    with Mp4(size, fps, crf, preset) as mp4:
        for rgb in chain([first], pending):
            _check_rgb(rgb, size)
            mp4.add(
                scaler.reformat(
                    VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"),
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=EXACT,
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
