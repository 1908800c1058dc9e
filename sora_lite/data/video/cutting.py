"""Clips out of a source: each frame is decoded, cropped, scaled and encoded once."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange
from PIL import Image

from sora_lite.data.video.colours import MATRICES, Colours, quarter_turns
from sora_lite.data.video.encoding import Mp4, encode_png
from sora_lite.data.video.facts import LIMITS, STILLS, BadVideo, Box, Limits, Source, no_beat
from sora_lite.data.video.opening import head_of, opened, read_still, sniff
from sora_lite.data.video.reader import Reader

_LEAP = 32
"""From so many unwanted frames on, it may be quicker to seek than to decode them."""


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
    limits: Limits = LIMITS,
    beat: Callable[[], None] = no_beat,
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
    with opened(source, limits) as file:
        container = sniff(head_of(file))
        if container in STILLS:
            picture = _cut_still(read_still(file, limits), size, crop)
            yield from (picture for _ in clips)
            return
        with Reader(file, container, limits, beat) as reader:
            to_clip, shown = _ToClip(size, crop), _Shown(reader, pts)
            for picks in clips:
                with Mp4(size, fps, crf, preset) as mp4:
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

    def __init__(self, reader: Reader, pts: np.ndarray) -> None:
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
        colours = Colours.of(frame)
        kind = frame.format.name, colours, quarter_turns(frame), frame.height, frame.width
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

    def _build(self, frame: VideoFrame, colours: Colours) -> None:
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

    def _steps(self, frame: VideoFrame, colours: Colours) -> list[tuple[str, str]]:
        """Names and options of filters: crop, scale, colours, turn (last, where pictures are small)."""
        turns = quarter_turns(frame)
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


def _coloured(frame: VideoFrame, colours: Colours, scale: str) -> list[tuple[str, str]]:
    """Filters that scale, and change pixel format and colours to those of clips."""
    kind, matrix = frame.format, MATRICES[colours.matrix]
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
