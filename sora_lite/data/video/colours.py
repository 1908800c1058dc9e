"""From the pictures that FFmpeg decodes to upright RGB, whatever way their colours are coded."""

from typing import NamedTuple, Self

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from sora_lite.data.video.facts import BadVideo, Planes

EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_DRAFT = Interpolation.AREA  # fast bilinear would be 5 times cheaper still, but skips most pixels: fine detail flickers


class ToRGB:
    """Turns decoded frames into upright pictures; FFmpeg's scalers serve a whole clip."""

    def __init__(self, size: tuple[int, int] | None = None, *, draft: bool = False) -> None:
        self.size, self.draft = size, draft
        self.scaler, self.packer = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """uint8 (H, W, 3)."""
        rgb = self.packer.reformat(self._converted(frame), format="rgb24", threads=1).to_ndarray()
        turns = quarter_turns(frame)
        return np.rot90(rgb, turns) if turns else rgb

    def planes(self, frame: VideoFrame) -> Planes:
        """Views of FFmpeg's own memory: its packing into (H, W, 3) costs a third of the conversion."""
        turns = quarter_turns(frame)
        green, blue, red = (
            np.rot90(np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width], turns)  # type: ignore[call-overload]
            for plane in self._converted(frame).planes
        )
        return red, green, blue

    def _converted(self, frame: VideoFrame) -> VideoFrame:
        """rgb24 of a draft, planes otherwise: exact rounding into packed pixels has no vector code."""
        colours = Colours.of(frame)
        height, width = self.size or (None, None)
        if quarter_turns(frame) % 2 == 1:
            height, width = width, height
        try:
            return self.scaler.reformat(
                frame,
                width,
                height,
                "rgb24" if self.draft else "gbrp",
                src_colorspace=MATRICES[colours.matrix].scaler,
                src_color_range=ColorRange.JPEG if colours.full else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation=_DRAFT if self.draft else EXACT,
                threads=1,
            )
        except av.FFmpegError as error:
            raise BadVideo(f"pictures of format {frame.format.name} cannot be converted: {error.strerror}") from error


def quarter_turns(frame: VideoFrame) -> int:
    """Quarter turns counterclockwise that make the frame upright: 0 to 3."""
    return round(frame.rotation / 90) % 4


class Matrix(NamedTuple):
    """A way to code RGB as luma and chroma, as FFmpeg's parts name it."""

    scaler: Colorspace
    scale: str
    colorspace: str


MATRICES = {  # by their codes in ITU-T H.273
    1: Matrix(Colorspace.ITU709, "bt709", "bt709"),
    4: Matrix(Colorspace.FCC, "fcc", "fcc"),
    5: Matrix(Colorspace.ITU601, "bt601", "bt470bg"),
    6: Matrix(Colorspace.ITU601, "bt601", "smpte170m"),
    7: Matrix(Colorspace.SMPTE240M, "smpte240m", "smpte240m"),
    9: Matrix(Colorspace.BT2020, "bt2020", "bt2020ncl"),
    10: Matrix(Colorspace.BT2020, "bt2020", "bt2020ncl"),
}


class Colours(NamedTuple):
    """How a frame's numbers stand for colours."""

    matrix: int
    """Key of MATRICES; of no meaning for RGB."""
    full: bool
    """Numbers use the full range, not that of broadcasting (16 to 235)."""

    @classmethod
    def of(cls, frame: VideoFrame) -> Self:
        """Untagged frames are read as players do: large ones are BT.709, small ones BT.601."""
        guess = 1 if frame.width >= 1280 or frame.height > 576 else 6
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        return cls(frame.colorspace if frame.colorspace in MATRICES else guess, full)
