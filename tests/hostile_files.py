"""Files that mean harm, made by hand: bombs, disguises, and real files that are damaged in every way."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

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


# ------------------------------------------------------------------------------------------- containers by hand


def box(kind: bytes, *content: bytes) -> bytes:
    """An mp4 box."""
    inside = b"".join(content)
    return struct.pack(">I", 8 + len(inside)) + kind + inside


def nested(kind: bytes, depth: int) -> bytes:
    """Boxes of a kind inside each other."""
    return b"".join(struct.pack(">I", 8 * left) + kind for left in range(depth, 0, -1))


def numbers(*values: int, form: str = "I") -> bytes:
    """Big-endian numbers, 32 bits each unless told otherwise."""
    return struct.pack(f">{len(values)}{form}", *values)


def movie(
    *,
    samples: int = 1,
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
    of times. edits: entries of its edit list, each of which shows all of it. reference: where its data lie, in the
    place of "in this file". extra: boxes at the end of the header.
    """
    picture, height, width = good("jpg"), *size
    ticks = seconds * 1000
    steps = steps or [(samples, max(1, ticks // samples))]
    identity = numbers(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    shape = bytes(16) + numbers(width, height, form="H") + numbers(0x480000, 0x480000, 0) + numbers(1, form="H")
    entry = box(b"jpeg", bytes(6), numbers(1, form="H"), shape, bytes(32), numbers(24, 0xFFFF, form="H"))
    ftyp = box(b"ftyp", b"qt  ", bytes(4), b"qt  ")
    table = box(
        b"stbl",
        box(b"stsd", numbers(0, 1), entry),
        box(b"stts", numbers(0, len(steps)), *(numbers(*step) for step in steps)),
        box(b"stsc", numbers(0, 1, 1, samples, 1)),
        box(b"stsz", numbers(0, len(picture) if sample_bytes is None else sample_bytes, samples)),
        box(b"stco", numbers(0, 1, len(ftyp) + 8)),
    )
    place = box(b"dinf", box(b"dref", numbers(0, 1), reference or box(b"url ", numbers(1))))
    track = box(
        b"trak",
        box(b"tkhd", numbers(7, 0, 0, 1, 0, ticks), bytes(16), identity, numbers(width << 16, height << 16)),
        box(b"edts", box(b"elst", numbers(0, edits), numbers(ticks, 0, 0x10000) * edits)) if edits else b"",
        box(
            b"mdia",
            box(b"mdhd", numbers(0, 0, 0, 1000, ticks, 0)),
            box(b"hdlr", numbers(0), b"mhlrvide", bytes(13)),
            box(b"minf", box(b"vmhd", numbers(1), bytes(8)), place, table),
        ),
    )
    header = box(b"mvhd", numbers(0, 0, 0, 1000, ticks, 0x10000), bytes(12), identity, bytes(24), numbers(tracks + 1))
    return ftyp + box(b"mdat", picture) + box(b"moov", header, track * tracks, extra)


def alias(path: Path) -> bytes:
    """A data reference of QuickTime to another file."""
    name = str(path).encode()
    volume = bytes([1]) + b"/".ljust(27, b"\0")
    short = bytes([len(path.name)]) + path.name.encode().ljust(63, b"\0")
    record = bytes(10) + volume + bytes(12) + short + bytes(16) + numbers(1, 1, form="H") + bytes(16)
    records = numbers(2, len(name), form="H") + name.ljust(len(name) + len(name) % 2, b"\0") + b"\xff\xff\0\0"
    return box(b"alis", numbers(0), record, records)


def ebml(identity: str, *content: bytes | int) -> bytes:
    """An element of Matroska: its number in hexadecimal digits, and what it holds."""
    inside = b"".join(one if isinstance(one, bytes) else struct.pack(">Q", one) for one in content)
    return bytes.fromhex(identity) + struct.pack(">Q", len(inside) | 1 << 56) + inside


def matroska(
    number: int,
    *,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    shown: tuple[int, int] | None = None,
    scale: int = 1_000_000,
    times: Sequence[int] = (0, 40, 80),
    tracks: int = 1,
    extra: bytes = b"",
) -> bytes:
    """A Motion JPEG file whose frames all show one stamp.

    size: that the header claims; shown: at which it wants to be shown. scale: nanoseconds of a tick. times: of the
    frames, in ticks. extra: elements after the header.
    """
    picture = io.BytesIO()
    Image.fromarray(stamped.picture(number, HEIGHT, WIDTH)).save(picture, "jpeg")
    height, width = size
    shape = ebml("b0", width) + ebml("ba", height)
    if shown is not None:
        shape += ebml("54b0", shown[1]) + ebml("54ba", shown[0])
    head = ebml("1a45dfa3", ebml("4282", b"matroska"), ebml("4287", 4), ebml("4285", 2))
    each = [
        ebml("ae", ebml("d7", i + 1), ebml("73c5", i + 1), ebml("83", 1), ebml("86", b"V_MJPEG"), ebml("e0", shape))
        for i in range(tracks)
    ]
    clusters = [ebml("1f43b675", ebml("e7", time), ebml("a3", b"\x81\0\0\x80" + picture.getvalue())) for time in times]
    info = ebml("1549a966", ebml("2ad7b1", scale), ebml("4d80", b"x"), ebml("5741", b"x"))
    return head + ebml("18538067", info, ebml("1654ae6b", *each), extra, *clusters)


# ---------------------------------------------------------------------------------------------------------- bombs


def patched(kind: str, mark: bytes, skip: int, form: str, *values: int) -> bytes:
    """A good file with numbers written over what stands `skip` bytes after every mark."""
    data, at = bytearray(good(kind)), -1
    while (at := data.find(mark, at + 1)) >= 0:
        struct.pack_into(form, data, at + skip, *values)
    if bytes(data) == good(kind):
        raise ValueError(f"no {mark!r} in {kind}")
    return bytes(data)


def vast_vp9() -> bytes:
    """A webm whose keyframes claim 32,768 x 32,768 pixels, 4 bits off the bytes."""
    data, mark, at = bytearray(good("webm")), b"\x49\x83\x42", -1
    while (at := data.find(mark, at + 1)) >= 0:
        bits = int.from_bytes(data[at + 3 : at + 8], "big")
        data[at + 3 : at + 8] = (bits & ~(0xFFFFFFFF << 4) | 0x7FFF7FFF << 4).to_bytes(5, "big")
    return bytes(data)


def vast_mpeg2() -> bytes:
    """An MPEG-2 program stream that claims 16,383 x 16,383 pixels, the most that it can."""
    data, at = bytearray(good("mpg")), -1
    while (at := data.find(b"\0\0\1\xb3", at + 1)) >= 0:
        data[at + 4 : at + 7] = b"\xff\xff\xff"
    at = -1
    while (at := data.find(b"\0\0\1\xb5", at + 1)) >= 0:
        if data[at + 4] >> 4 == 1:
            data[at + 5], data[at + 6] = data[at + 5] | 1, data[at + 6] | 0xE0
    return bytes(data)


def png(height: int, width: int, pixels: bytes, text: bytes = b"") -> bytes:
    """A png. pixels: compressed. text: a compressed note."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return numbers(len(content)) + kind + content + numbers(zlib.crc32(kind + content))

    head = chunk(b"IHDR", numbers(width, height) + bytes([8, 2, 0, 0, 0]))
    note = chunk(b"zTXt", b"note\0\0" + text) if text else b""
    return b"\x89PNG\r\n\x1a\n" + head + note + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zeros(megabytes: int) -> bytes:
    """So many MiB of zeros, compressed by a factor of a thousand."""
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(megabytes)), packer.flush()])


def vast_webp() -> bytes:
    """A webp whose canvas claims 32,768 x 32,768 pixels."""
    canvas = b"VP8X" + struct.pack("<II", 10, 0) + (32767).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", 4 + len(canvas) + len(good("webp")) - 12) + b"WEBP" + canvas + good("webp")[12:]


def slow_jpeg(side: int, scans: int) -> bytes:
    """A black progressive jpeg whose last scan comes again and again: some bytes each, and a pass over all of it."""
    out = io.BytesIO()
    Image.new("L", (side, side)).save(out, "jpeg", progressive=True)
    data = out.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    # counts
    "frames 1e8.mp4": (lambda: movie(samples=10**8, sample_bytes=1), r"header names 100000000 frames"),
    "frames 2e31.mp4": (lambda: movie(samples=2**31 - 1, sample_bytes=1), r"frames"),
    "frames in times.mp4": (lambda: movie(steps=[(2**32 - 1, 1)] * 20000), r"frames"),
    "frames 1e8.avi": (lambda: patched("avi", b"strh", 40, "<I", 10**8), r"header names 100000000 frames"),
    "seconds.mp4": (lambda: movie(seconds=4_000_000), r"header names 4000000 seconds"),
    "edits.mp4": (lambda: movie(edits=10**5), r""),
    "tracks.mp4": (lambda: movie(tracks=900), r"900 streams"),
    "tracks.mkv": (lambda: matroska(20, tracks=500), r"500 streams"),
    "tables.mp4": (lambda: movie(tracks=300, samples=10**6, sample_bytes=1), r"."),  # 7 GB of indexes
    "steps.mp4": (lambda: movie(steps=[(1, 1)] * 200_000), r""),
    # depth
    "deep.mp4": (lambda: movie()[:20] + nested(b"moov", 20_000), r"header"),
    "deep tracks.mp4": (lambda: movie(extra=nested(b"trak", 20_000)), r""),
    "deep notes.mp4": (lambda: movie(extra=nested(b"udta", 20_000)), r""),
    "deep tags.mkv": (lambda: matroska(21, extra=ebml("1254c367", ebml("7373", bytes.fromhex("67c8") * 20_000))), r""),
    # sizes
    "vast.mp4": (lambda: movie(size=(32768, 32768)), r""),  # the picture in it is small
    "vast.mkv": (lambda: matroska(22, size=(32768, 32768)), r""),
    "vast.webm": (vast_vp9, r"no size, or more than 64000000 pixels"),
    "vast.mpg": (vast_mpeg2, r"16383 x 16383 pixels"),
    "vast.avi": (lambda: patched("avi", b"strf", 12, "<II", 32768, 32768), r""),
    "vast.gif": (lambda: patched("gif", b"GIF89a", 6, "<HH", 32768, 32768), r"more than 64000000 pixels"),
    "vast.png": (lambda: png(32768, 32768, zeros(1)), r"1073741824 pixels"),
    "vast.jpg": (lambda: patched("jpg", b"\xff\xc0", 5, ">HH", 32768, 32768), r"1073741824 pixels"),
    "vast.webp": (vast_webp, r"1073741824 pixels"),
    "large.png": (lambda: png(7900, 7900, zeros(190)), r"memory|stall_seconds"),  # within the limits, 187 MB of black
    "note.png": (lambda: png(8, 8, zeros(1), text=zeros(500)), r"too large"),
    "wide.mkv": (lambda: matroska(23, shown=(1, 2**31 - 1)), r"pixels"),
    "wider than H.264.mkv": (lambda: matroska(24, shown=(48, 20_000)), r"pixels"),
    "narrow.mkv": (lambda: matroska(25, shown=(2**31 - 1, 1)), r""),
    "tall.gif": (lambda: patched("gif", b"GIF89a", 8, "<H", 17000), r"pixels"),
    # times
    "slow.jpg": (lambda: slow_jpeg(4000, 8000), r"no progress for .* \(stall_seconds\)"),
    "fast.mkv": (lambda: matroska(26, scale=1, times=(0, 1, 2)), r""),  # a thousand million frames a second
    "a day.mkv": (lambda: matroska(27, times=(0, 1, 86_399_000)), r""),
    "two days.mkv": (lambda: matroska(28, times=(0, 2 * 86_400_000)), r"86400 seconds"),
    "end of time.mkv": (lambda: matroska(29, times=(2**63 - 9, 2**63 - 1)), r""),
    "before time.mkv": (lambda: matroska(30, times=(2**64 - 9, 2**64 - 1)), r""),
    "no time.mkv": (lambda: matroska(31, scale=2**63), r"header"),
}
"""Name: what makes the file, and the reason for which it must be left out; empty if it may as well be packed."""


# ------------------------------------------------------------------------------------------------------ disguises


def playlists(canary: Path, url: str) -> dict[str, bytes]:
    """Texts that make players open another file. canary: an mp4. url: where a server listens."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n{extra}#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n"
    mpd = "urn:mpeg:dash"
    dash = (
        f'<?xml version="1.0"?>\n<MPD xmlns="{mpd}:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S" '
        f'profiles="{mpd}:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4"><Representation '
        f'id="1" bandwidth="1" width="64" height="48"><BaseURL>{url}/dash.mp4</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>\n"
    )
    texts = {
        "hls": hls.format(name=canary, extra=""),
        "hls relative": hls.format(name=canary.name, extra=""),
        "hls http": hls.format(name=f"{url}/hls.ts", extra=""),
        "hls key": hls.format(name=canary, extra=f'#EXT-X-KEY:METHOD=AES-128,URI="{url}/key"\n'),
        "hls map": hls.format(name=canary, extra=f'#EXT-X-MAP:URI="{canary}"\n'),
        "hls concat": hls.format(name=f"concat:{canary}|{canary}", extra=""),
        "dash": dash,
        "concat": f"ffconcat version 1.0\nfile '{canary}'\n",
        "concat relative": f"ffconcat version 1.0\nfile {canary.name}\n",
        "concat http": f"ffconcat version 1.0\nfile '{url}/concat.ts'\n",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video {url.rpartition(':')[2]} RTP/AVP 96\n",
        "pls": f"[playlist]\nFile1={url}/pls.mp4\nNumberOfEntries=1\n",
        "asx": f'<asx version="3.0"><entry><ref href="{url}/asx.mp4"/></entry></asx>',
        "smil": f'<smil><body><video src="{canary}"/></body></smil>',
        "reference": f"RTSPtextrtsp{url.removeprefix('http')}/rtsp",
    }
    return {name: text.encode() for name, text in texts.items()}


def disguises(canary: Path, url: str) -> dict[str, bytes]:
    """Playlists under the names of videos, with the first bytes of videos too."""
    found = {}
    for name, text in playlists(canary, url).items():
        for suffix in ("mp4", "ts"):
            found[f"{name}.{suffix}"] = text
    for kind, head in {
        "mp4": box(b"ftyp", b"isom", bytes(4), b"isom"),
        "mov": b"#EXTmoov",
        "mkv": bytes.fromhex("1a45dfa3"),
        "avi": b"RIFF\0\0\0\0AVI ",
        "mpg": bytes.fromhex("000001ba"),
        "gif": b"GIF89a",
        "png": b"\x89PNG\r\n\x1a\n",
        "jpg": b"\xff\xd8\xff",
        "webp": b"RIFF\0\0\0\0WEBP",
    }.items():
        for name in ("hls", "concat", "hls http"):
            found[f"{name} behind {kind}.{kind}"] = head + b"\n" + playlists(canary, url)[name]
    lines = playlists(canary, url)["concat"].splitlines(keepends=True)
    found["concat in packets.ts"] = b"".join(b"G" + line.rjust(187) for line in lines * 4)
    found["reference.mov"] = movie(reference=alias(canary))
    found["reference by url.mov"] = movie(reference=box(b"url ", numbers(0), f"{url}/dref.mov".encode() + b"\0"))
    return found


NAMES = [
    b"pipe:0.mp4",
    b"concat:a.mp4|b.mp4",
    b"subfile,,start,0,end,9,,:a.mp4",
    b"file:a.mp4",
    b"data:video,a.mp4",
    b"-i.mp4",
    b"--help.mp4",
    b"frame%03d.mp4",
    b"*?[a-z].mp4",
    b"$(touch pwned);`touch pwned`.mp4",
    b"'quoted' \"twice\".mp4",
    b"new\nline\r.mp4",
    b"\x1b]0;title\x07\x1b[2J\x1b[31mred.mp4",
    b"\xff\xfe not utf-8 \xe9.mp4",
    "\N{RIGHT-TO-LEFT OVERRIDE}4pm.mp4".encode(),
    b"<img src=x onerror=alert(1)>&lt;.mp4",
    b"a\\..\\..\\up.mp4",
    b" .mp4",
    b"n" * 251 + b".mp4",
    b"http:/example.invalid/a.mp4",
]
"""Names of good files, relative to a folder."""
