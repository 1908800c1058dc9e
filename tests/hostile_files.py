"""Files that mean harm, made by hand: bombs, disguises, and real files that are damaged in every way."""

import io
import struct
from collections.abc import Callable
from functools import cache

import numpy as np
import stamped
from PIL import Image

FRAMES, HEIGHT, WIDTH = 20, 48, 64


def _pictures() -> list[np.ndarray]:
    return list(stamped.pictures(FRAMES, HEIGHT, WIDTH))


def _still(kind: str, count: int = 1) -> bytes:
    first, *others = [Image.fromarray(one) for one in _pictures()[:count]]
    out = io.BytesIO()
    animated = {"save_all": True, "append_images": others, "duration": 80} if others else {}
    first.save(out, kind, **animated)
    return out.getvalue()


def _mpeg2(container: str) -> bytes:
    return stamped.muxed(_pictures(), container=container, codec="mpeg2video", options={"g": "8", "bf": "2"})


GOOD: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: stamped.h264(":open-gop=0", pictures=_pictures()),
    "mov": lambda: stamped.muxed(_pictures(), container="mov", codec="mpeg4", options={"g": "8", "bf": "2", "b": "1M"}),
    "mkv": lambda: stamped.h264(":open-gop=1", pictures=_pictures(), container="matroska"),
    "webm": lambda: stamped.muxed(
        _pictures(),
        container="webm",
        codec="libvpx-vp9",
        options={"g": "8", "cpu-used": "8", "deadline": "realtime", "b": "400k"},
    ),
    "avi": lambda: stamped.muxed(_pictures(), container="avi", codec="mpeg4", options={"g": "8", "b": "1M"}),
    "ts": lambda: stamped.h264(":open-gop=1", pictures=_pictures(), container="mpegts"),
    "mpg": lambda: _mpeg2("vob"),
    "gif": lambda: _still("gif", FRAMES),
    "png": lambda: _still("png"),
    "jpg": lambda: _still("jpeg"),
    "webp": lambda: _still("webp"),
}
"""Extension: what makes a small good file of that container."""


@cache
def good(kind: str) -> bytes:
    """One of GOOD, made once."""
    return GOOD[kind]()


# ------------------------------------------------------------------------------------------------------ mutations

_WORDS = [struct.pack(order + "I", value) for order in "<>" for value in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)]


def mutated(kind: str, seed: int) -> bytes:
    """A good file with damage that follows from the seed alone; half of it where headers are."""
    rng = np.random.default_rng([seed, *kind.encode()])
    data = bytearray(good(kind))
    size = len(data)

    def place() -> int:
        edge = int(rng.integers(0, min(size, 1500)))
        return int(rng.choice([edge, size - 1 - edge, *rng.integers(0, size, 2)]))

    match seed % 8:
        case 0:
            del data[max(1, place()) :]
        case 1:
            data[place()] ^= 1 << int(rng.integers(0, 8))
        case 2:
            for _ in range(int(rng.integers(2, 40))):
                data[place()] ^= 1 << int(rng.integers(0, 8))
        case 3:
            at, length = place(), int(rng.integers(1, 300))
            data[at : at + length] = rng.bytes(len(data[at : at + length]))
        case 4:
            at = place()
            del data[at : at + int(rng.integers(1, 300))]
        case 5:
            at, begin = place(), place()
            data[at:at] = data[begin : begin + int(rng.integers(1, 2000))]
        case 6:
            for _ in range(int(rng.integers(1, 5))):
                at = place() // 4 * 4
                data[at : at + 4] = _WORDS[int(rng.integers(0, len(_WORDS)))]
        case 7:
            other = good(str(rng.choice(sorted(GOOD))))
            data[place() :] = other[int(rng.integers(0, len(other))) :]
    return bytes(data)


# --------------------------------------------------------------------------------------------- mp4 made by hand


def box(kind: bytes, *content: bytes) -> bytes:
    """An mp4 box."""
    inside = b"".join(content)
    return struct.pack(">I", 8 + len(inside)) + kind + inside


def numbers(*values: int, form: str = "I") -> bytes:
    """Big-endian numbers, 32 bits each unless told otherwise."""
    return struct.pack(f">{len(values)}{form}", *values)


def movie(
    *,
    samples: int = FRAMES,
    sample_bytes: int | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    seconds: int = 2,
    steps: list[tuple[int, int]] | None = None,
    edits: int = 0,
    tracks: int = 1,
    reference: bytes = b"",
    extra: bytes = b"",
) -> bytes:
    """A Motion JPEG movie with the sample tables that one asks for, and a single picture of data.

    samples: how many it claims, each of sample_bytes (None: of the real picture's). steps: (count, ticks) of its table
    of times. edits: entries of its edit list, each of which shows all of it. reference: data reference in the place of
    "in this file". extra: boxes at the end of the header.
    """
    picture, height, width = good("jpg"), *size
    ticks = seconds * 1000
    steps = steps or [(samples, max(1, ticks // samples))]
    identity = numbers(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    entry = box(b"jpeg", bytes(6), numbers(1, form="H"), bytes(16), numbers(height, width, form="H"),
                numbers(0x480000, 0x480000, 0), numbers(1, form="H"), bytes(32), numbers(24, 0xFFFF, form="H"))  # fmt: skip
    ftyp = box(b"ftyp", b"qt  ", bytes(4), b"qt  ")
    mdat = box(b"mdat", picture)
    table = box(
        b"stbl",
        box(b"stsd", numbers(0, 1), entry),
        box(b"stts", numbers(0, len(steps)), *(numbers(*step) for step in steps)),
        box(b"stsc", numbers(0, 1, 1, samples, 1)),
        box(b"stsz", numbers(0, len(picture) if sample_bytes is None else sample_bytes, samples)),
        box(b"stco", numbers(0, 1, len(ftyp) + 8)),
    )
    track = box(
        b"trak",
        box(b"tkhd", numbers(7, 0, 0, 1, 0, ticks), bytes(16), identity, numbers(width << 16, height << 16)),
        box(b"edts", box(b"elst", numbers(0, edits), numbers(ticks, 0, 0x10000) * edits)) if edits else b"",
        box(
            b"mdia",
            box(b"mdhd", numbers(0, 0, 0, 1000, ticks, 0)),
            box(b"hdlr", numbers(0), b"mhlrvide", bytes(13)),
            box(
                b"minf",
                box(b"vmhd", numbers(1), bytes(8)),
                box(b"dinf", box(b"dref", numbers(0, 1), reference or box(b"url ", numbers(1)))),
                table,
            ),
        ),
    )
    header = box(b"mvhd", numbers(0, 0, 0, 1000, ticks, 0x10000), bytes(12), identity, bytes(24), numbers(tracks + 1))
    return ftyp + mdat + box(b"moov", header, track * tracks, extra)
