"""Video files in which every frame carries its own number, as cells of black and white that survive coding and scaling.

MAKERS makes them, in the containers, codecs and shapes that people have. `read_stamp` reads a number back from a
decoded frame, and STAMPS says which numbers a file must show, in order: so a decoder that skips, repeats or turns
frames is seen.
"""

import io
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial

import av
import numpy as np
from PIL import Image

FRAMES, HEIGHT, WIDTH = 48, 96, 128
CELLS = 4
"""Rows and columns of cells: 8 bits of the number, and the same 8 turned over, which shows that all are read aright."""
CUT = 10
"""Frames that the edit lists here leave out."""


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 (H, W, 3): the stamp of a number up to 255, over a texture that drifts."""
    bits = [number >> i & 1 for i in range(8)]
    cells = np.array([*bits, *(1 - bit for bit in bits)]).reshape(CELLS, CELLS)
    rows, columns = np.arange(height) * CELLS // height, np.arange(width) * CELLS // width
    drift = 14 * np.sin((np.arange(width) + 3 * number) / 5) + 10 * np.sin((np.arange(height)[:, None] - number) / 7)
    tint = np.array([0, 6, -9])
    grey = 50 + 150 * cells[rows][:, columns] + drift
    return (grey[:, :, None] + tint).round().clip(0, 255).astype(np.uint8)


def read_stamp(frame: np.ndarray) -> int:
    """The number in a frame of any size, (H, W, 3); -1 if it holds no whole stamp, or lies on its side."""
    height, width = frame.shape[:2]
    grey = frame.astype(np.float64).mean(axis=2)
    cells = [
        grey[
            (4 * row + 1) * height // 16 : (4 * row + 3) * height // 16,
            (4 * column + 1) * width // 16 : (4 * column + 3) * width // 16,
        ].mean()
        for row in range(CELLS)
        for column in range(CELLS)
    ]
    bits = [int(cell > 125) for cell in cells]
    if any(bits[i] == bits[i + 8] for i in range(8)):
        return -1
    return sum(bit << i for i, bit in enumerate(bits[:8]))


# -------------------------------------------------------------------------------------------------------- muxing


def muxed(
    pictures: Iterable[np.ndarray],
    *,
    container: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    rate: int = 25,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    sar: Fraction | None = None,
    movflags: str = "",
) -> bytes:
    """A file as others may write it. times: of the frames, in ticks of 1 / rate seconds."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options={"movflags": movflags} if movflags else {}) as muxer:
        stream = muxer.add_stream(codec, rate=rate, options=options or {})
        stream.codec_context.time_base = Fraction(1, rate)
        if sar is not None:
            stream.codec_context.sample_aspect_ratio = sar
        if rotation:
            stream.set_display_rotation(rotation)
        for i, rgb in enumerate(pictures):
            if i == 0:
                stream.height, stream.width, stream.pix_fmt = *rgb.shape[:2], pix_fmt
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts, frame.time_base = i if times is None else times[i], Fraction(1, rate)
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    return out.getvalue()


def pictures(count: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, turns: int = 0) -> Iterator[np.ndarray]:
    """Numbers 0 to count - 1. turns: quarter turns counterclockwise by which a player will turn them."""
    return (np.rot90(picture(i, height, width), -turns) for i in range(count))


def h264(options: str = "", **how: object) -> bytes:
    """H.264 with B-frames that are themselves referred to, and a keyframe every 12 frames."""
    how.setdefault("pictures", pictures())
    x264 = f"keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:b-pyramid=normal:threads=1:mbtree=0{options}"
    return muxed(options={"preset": "fast", "crf": "20", "x264-params": x264}, **how)  # type: ignore[arg-type]


def hevc(options: str = "", pix_fmt: str = "yuv420p") -> bytes:
    """HEVC with B-frames and a keyframe every 12 frames."""
    x265 = f"keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:pools=none:frame-threads=1:log-level=none{options}"
    settings = {"preset": "ultrafast", "crf": "20", "x265-params": x265}
    return muxed(pictures(), codec="libx265", options=settings, pix_fmt=pix_fmt)


def uneven(count: int = FRAMES) -> list[int]:
    """Times of a video of variable rate, in ticks."""
    return np.cumsum(np.random.default_rng(0).choice([1, 1, 2, 5], count)).tolist()


# ------------------------------------------------------------------------------------------------------ patching


def boxes(data: bytes, kind: bytes) -> Iterator[int]:
    """Where the content of each mp4 box of a kind begins, after its 8 bytes of size and name."""
    at = data.find(kind)
    while at >= 0:
        yield at + 4
        at = data.find(kind, at + 4)


def cut_by_edit_list(data: bytes) -> bytes:
    """The mp4 with its first CUT frames left out by its edit list, as a lossless cutter leaves it, amid a group."""
    (edit,), (movie,), (media,) = (list(boxes(data, kind)) for kind in (b"elst", b"mvhd", b"mdhd"))
    movie_scale, media_scale = (struct.unpack_from(">I", data, at + 12)[0] for at in (movie, media))
    count, length, begin = struct.unpack_from(">Iii", data, edit + 4)
    if count != 1:
        raise ValueError(f"{count} edits, not one")
    changed = bytearray(data)
    first, last = CUT * media_scale // 25, CUT * movie_scale // 25
    struct.pack_into(">ii", changed, edit + 8, length - last, begin + first)
    return bytes(changed)


# -------------------------------------------------------------------------------------------------------- stills


def still(kind: str, count: int = 1) -> bytes:
    """A still image, or an animation of several, as Pillow writes them."""
    first, *others = [Image.fromarray(one) for one in pictures(count)]
    out = io.BytesIO()
    animated = {"save_all": True, "append_images": others, "duration": 80} if others else {}
    first.save(out, kind, **animated)
    return out.getvalue()


def upside_down() -> bytes:
    """A jpeg that says in its EXIF data that it lies on its head."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3
    Image.fromarray(np.rot90(picture(0), 2)).save(out, "jpeg", exif=exif)
    return out.getvalue()


MAKERS: dict[str, Callable[[], bytes]] = {
    "h264_closed": partial(h264, ":open-gop=0"),
    "h264_open": partial(h264, ":open-gop=1"),
    "h264_open_mkv": partial(h264, ":open-gop=1", container="matroska"),
    "h264_ts": partial(h264, ":open-gop=1", container="mpegts"),
    "h264_intra_refresh": partial(h264, ":intra-refresh=1", container="matroska"),
    "hevc_closed": partial(hevc, ":open-gop=0"),
    "hevc_open": partial(hevc, ":open-gop=1"),
    "vp9": lambda: muxed(
        pictures(),
        container="webm",
        codec="libvpx-vp9",
        options={"g": "12", "lag-in-frames": "8", "auto-alt-ref": "1", "cpu-used": "5", "deadline": "good"},
    ),
    "av1": lambda: muxed(pictures(), codec="libsvtav1", options={"g": "12", "preset": "8", "svtav1-params": "lp=1"}),
    "mpeg2_ps": lambda: muxed(pictures(), container="vob", codec="mpeg2video", options={"g": "12", "bf": "2"}),
    "mpeg2_ts": lambda: muxed(pictures(), container="mpegts", codec="mpeg2video", options={"g": "12", "bf": "2"}),
    "interlaced": lambda: muxed(
        pictures(), container="vob", codec="mpeg2video", options={"g": "12", "bf": "2", "flags": "+ildct+ilme"}
    ),
    "mpeg4_avi": lambda: muxed(pictures(), container="avi", codec="mpeg4", options={"g": "12", "bf": "2", "b": "2M"}),
    "vfr_mp4": partial(h264, times=uneven()),
    "vfr_mkv": partial(h264, times=uneven(), container="matroska"),
    "edit_list": lambda: cut_by_edit_list(h264(":open-gop=0")),
    "edit_list_open": lambda: cut_by_edit_list(h264(":open-gop=1")),
    "fragmented": partial(h264, movflags="frag_keyframe+empty_moov+default_base_moof"),
    **{
        f"rotated_{90 * turns}": lambda turns=turns: h264(pictures=pictures(turns=turns), rotation=90 * turns)  # type: ignore[misc]
        for turns in (1, 2, 3)
    },
    "odd_size": lambda: muxed(
        pictures(height=97, width=131), container="webm", codec="libvpx-vp9", options={"g": "12"}
    ),
    "odd_444": lambda: h264(pictures=pictures(height=97, width=131), pix_fmt="yuv444p"),
    "ten_bit": partial(hevc, pix_fmt="yuv420p10le"),
    "wide_pixels": lambda: h264(pictures=pictures(), sar=Fraction(4, 3)),
    "full_range": lambda: muxed(
        pictures(), container="avi", codec="mjpeg", pix_fmt="yuvj420p", options={"qmin": "2", "qmax": "4"}
    ),
    "one_frame": lambda: h264(pictures=pictures(1)),
    "png": partial(still, "png"),
    "jpeg": partial(still, "jpeg"),
    "jpeg_upside_down": upside_down,
    "webp": partial(still, "webp"),
    "gif": partial(still, "gif"),
    "animated_gif": partial(still, "gif", 12),
}
"""name: what makes the file's bytes. A name's first part is its codec or what is special about it."""

ONE = ("one_frame", "png", "jpeg", "jpeg_upside_down", "webp", "gif")
STAMPS: dict[str, list[int]] = {
    **{name: list(range(FRAMES)) for name in MAKERS},
    **{name: [0] for name in ONE},
    **{name: list(range(CUT, FRAMES)) for name in ("edit_list", "edit_list_open")},
    "animated_gif": list(range(12)),
}
"""name: numbers that the file's frames show, in order."""
