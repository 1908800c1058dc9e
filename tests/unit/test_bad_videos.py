"""Files that are no videos, or hold more than they may: refused with a reason, at no cost."""

import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import stamped as stamps
from grey import FRAMES, muxed, stamped, textured
from odd_videos import audio_only
from PIL import Image

from sora_lite.data.video import (
    BadVideo,
    Limits,
    decode_clip,
    encode_mp4,
    probe,
    probing,
    read_frames,
    reader,
    write_mp4,
)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_pixels": 1000}, "pixels, more than 1000"),
        ({"max_frames": 19}, "frames, more than 19"),
        ({"max_seconds": 2.0}, "seconds, more than 2"),
        ({"max_streams": 0}, "1 streams, more than 0"),
        ({"max_bytes": 500}, "bytes, more than 500"),
    ],
)
def test_what_is_beyond_the_limits_is_refused_before_it_is_decoded(
    limits: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode_mp4(stamped(), 8, 10)
    monkeypatch.setattr(reader.Check, "__call__", lambda *frame: pytest.fail("it was decoded"))
    for call in (probe, lambda data, limits: list(read_frames(data, limits=limits))):
        with pytest.raises(BadVideo, match=reason):
            call(data, limits=Limits(**limits))


def test_limits_hold_where_headers_name_nothing() -> None:
    data = muxed(stamped(), container="matroska", movflags="")
    with pytest.raises(BadVideo, match="more than 19 frames"):
        probe(data, Limits(max_frames=19))
    stream = stamps.MAKERS["mpeg2_ps"]()
    with pytest.raises(BadVideo, match=r"longer than 1 seconds|seconds, more than 1"):
        probe(stream, Limits(max_seconds=1))
    for small in (stamps.MAKERS["mpeg2_ts"](), stamps.MAKERS["vp9"](), stamps.MAKERS["gif"]()):
        with pytest.raises(BadVideo, match=r"pixels|cannot be decoded"):
            probe(small, Limits(max_pixels=5000))
    still = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(still, "PNG")
    with pytest.raises(BadVideo, match=r"pixels|bomb"):
        probe(still.getvalue())


def test_a_canvas_of_a_thousand_million_pixels_costs_nothing() -> None:
    """A gif of 35 bytes, whose header is all that is large."""
    gif = b"GIF89a" + (32768).to_bytes(2, "little") * 2 + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    gif += b"\x2c\0\0\0\0\1\0\1\0\0\x02\x02\x44\x01\0;"
    start = time.process_time()
    with pytest.raises(BadVideo, match="more than 64000000 pixels"):
        probe(gif)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "empty"),
        (lambda: b"just some text, long enough to be looked at\n" * 20, "not a video"),
        (lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n", "not a video"),
        (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video"),
        (lambda: b"Gentle text that begins as a transport stream does" * 20, "not a video"),
        (audio_only, "no video stream"),
        (lambda: muxed(textured())[:-800], "header"),  # the moov box stands last and is cut off
        (lambda: encode_mp4(textured(), 8, 18)[:20_000], "cut off"),  # it stands first and promises more
        (lambda: encode_mp4(textured(), 8, 18)[:100], "header"),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "image"),
    ],
)
def test_bad_files_are_refused_with_a_reason(make, reason: str, tmp_path: Path) -> None:
    data = make()
    (tmp_path / "bad.mp4").write_bytes(data)
    with pytest.raises(BadVideo, match=reason):
        probe(data)
    with pytest.raises(BadVideo, match=reason):
        list(read_frames(tmp_path / "bad.mp4"))
    with pytest.raises(BadVideo):
        decode_clip(data, frames=FRAMES)


def test_no_second_file_is_opened_even_if_the_first_bytes_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mp4(tmp_path / "secret.mp4", stamped(3), 8)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n"
    monkeypatch.setattr(probing, "sniff", lambda head: "hls")
    with pytest.raises((BadVideo, PermissionError), match="hls"):
        probe(playlist.encode())


def test_flipped_bytes_end_in_frames_or_in_a_reason() -> None:
    good = encode_mp4(stamped(), 8, 10)
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(good)
        bad[rng.integers(0, len(bad))] ^= 1 << int(rng.integers(0, 8))
        try:
            clip = decode_clip(bytes(bad), frames=FRAMES)
        except BadVideo:
            continue
        assert clip.shape[0] == FRAMES and clip.dtype == np.uint8


def test_a_few_bytes_that_fill_many_pixels_are_a_bomb() -> None:
    """A GIF whose frames change one pixel of a huge canvas, all of which is decoded each time."""
    head = b"GIF89a" + struct.pack("<HHBBB", 5000, 5000, 0x80, 0, 0) + bytes(3) + b"\xff\xff\xff"
    frame = b"!\xf9\x04\x00\x0a\x00\x00\x00," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    with pytest.raises(BadVideo, match="decompression bomb"):
        probe(head + 200 * frame + b";")
    assert probe(head + 3 * frame + b";").frames == 3
