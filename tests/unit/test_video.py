"""Decoding: the right frames, upright, in the right colours, and a clear reason where that cannot be."""

import io
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from odd_videos import audio_only
from PIL import Image

from sora_lite.data import video
from sora_lite.data.buckets import frames_at
from sora_lite.data.video import BadVideo, decode_clip, encode_mp4, probe, read_frames, write_mp4

FRAMES, SIDE = 20, 32


def stamped(frames: int = FRAMES, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Frames of one grey each, 12 levels apart, so that a frame's number can be read back from its brightness."""
    levels = (np.arange(frames, dtype=np.uint8) * 12)[:, None, None, None]
    return np.ascontiguousarray(np.broadcast_to(levels, (frames, height, width, 3)))


def numbers(clip: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 12) for frame in clip]


def muxed(
    frames: np.ndarray,
    pts: list[int] | None = None,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    rotation: int = 0,
    movflags: str = "",
) -> bytes:
    """A file as others may write it."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options={"movflags": movflags} if movflags else {}) as muxer:
        stream = muxer.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 8)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = i if pts is None else pts[i], Fraction(1, 8)
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("shape", [(17, 32, 32), (9, 48, 64), (50, 66, 34), (1, 16, 16)])
def test_encoding_keeps_every_frame_and_its_bytes_never_vary(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (shape[0], shape[1] // 8, shape[2] // 2, 3), dtype=np.uint8)
    frames = np.ascontiguousarray(frames.repeat(8, axis=1).repeat(2, axis=2))
    first = encode_mp4(frames, 8, 12)
    for _ in range(5):
        junk = [np.full(int(n), 7, np.uint8) for n in rng.integers(100, 40_000, 20)]  # another state of the heap
        del junk
        assert encode_mp4(frames, 8, 12) == first
    assert decode_clip(first, frames=shape[0]).shape == frames.shape
    assert first.index(b"moov") < first.index(b"mdat")


def test_written_files_have_closed_groups_constant_rate_and_colour_tags(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", np.resize(stamped(), (120, SIDE, SIDE, 3)), Fraction(30000, 1001))
    facts = probe(tmp_path / "a.mp4")
    assert (facts.frames, facts.average_rate, facts.codec) == (120, Fraction(30000, 1001), "h264")
    assert len(set(np.diff(facts.pts))) == 1 and facts.pts[0] == 0
    with av.open(str(tmp_path / "a.mp4")) as file:
        keys = [i for i, frame in enumerate(file.decode(video=0)) if frame.key_frame]
        context = file.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (1, 1)
    assert keys[0] == 0 and max(np.diff([*keys, 120])) <= video.GOP


def test_colours_come_back() -> None:
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    frames[:, :, :32], frames[:, :, 32:] = (200, 30, 60), (20, 180, 220)
    clip = decode_clip(encode_mp4(frames, 8, 4), frames=2).astype(int)
    assert np.abs(clip[:, :, 4:28] - frames[:, :, 4:28]).max() <= 3
    assert np.abs(clip[:, :, 36:60] - frames[:, :, 36:60]).max() <= 3
    ramp = np.ascontiguousarray(np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[:, None, None], (2, 64, 64, 3)))
    error = decode_clip(encode_mp4(ramp, 8, 2), frames=2).astype(int) - ramp
    assert np.abs(error).mean() < 1 and abs(error.mean()) < 0.2


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        encode_mp4(stamped(2, 31, 32), 8, 12)
    with pytest.raises(ValueError, match="uint8"):
        encode_mp4(stamped(2).astype(np.float32), 8, 12)


# ---------------------------------------------------------------------------------------------------- at a rate


def test_frames_at_another_rate_are_the_last_ones_at_or_before_each_time() -> None:
    clip = encode_mp4(stamped(), 8, 10)
    assert numbers(decode_clip(clip, frames=20)) == list(range(20))
    assert numbers(decode_clip(clip, frames=20, fps=8)) == list(range(20))
    assert numbers(decode_clip(clip, frames=10, fps=4.0)) == list(range(0, 20, 2))
    assert numbers(decode_clip(clip, frames=40, fps=16.0)) == [i // 2 for i in range(40)]
    assert numbers(decode_clip(clip, frames=7, fps=3.0)) == [i * 8 // 3 for i in range(7)]
    assert numbers(decode_clip(clip, frames=5, start_frame_offset=7)) == [7, 8, 9, 10, 11]
    assert numbers(decode_clip(clip, frames=3, fps=2, start_frame_offset=5)) == [5, 9, 13]


@pytest.mark.parametrize("fps", [1, 3, 7.5, 8, 9, 12, 16, 24, 29.97])
def test_frames_at_says_exactly_how_many_there_are(fps: float) -> None:
    clip = encode_mp4(stamped(), 8, 10)
    count = int(frames_at(np.array([FRAMES]), np.array([8.0]), fps)[0])
    assert numbers(decode_clip(clip, frames=count, fps=fps))[-1] <= FRAMES - 1
    with pytest.raises(BadVideo, match=f"after {count} of {count + 1}"):
        decode_clip(clip, frames=count + 1, fps=fps)


def test_variable_rate_follows_the_times() -> None:
    clip = muxed(stamped(6), pts=[0, 1, 5, 6, 7, 12])  # at 8 ticks a second
    assert probe(clip).frames == 6
    assert numbers(decode_clip(clip, frames=13, fps=8)) == [0, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 4, 5]
    assert numbers(decode_clip(clip, frames=6)) == [0, 1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------- files made by others


@pytest.mark.parametrize(
    ("container", "codec", "name"),
    [
        ("mp4", "libx264", "mov"),
        ("mov", "libx264", "mov"),
        ("matroska", "libx264", "matroska"),
        ("webm", "libvpx-vp9", "matroska"),
        ("avi", "mpeg4", "avi"),
        ("mpegts", "libx264", "mpegts"),
        ("vob", "mpeg2video", "mpeg"),
        ("mp4", "libx265", "mov"),
    ],
)
def test_common_containers(container: str, codec: str, name: str) -> None:
    frames = stamped(12, 64, 64)
    data = muxed(frames, container=container, codec=codec) if codec != "mpeg2video" else mpeg2(frames)
    facts = probe(data)
    assert (facts.container, facts.frames, facts.height, facts.width) == (name, 12, 64, 64)
    assert numbers(np.stack([frame for _, frame in read_frames(data)])) == list(range(12))
    last = int(facts.pts[7])
    assert [pts for pts, _ in read_frames(data, start=last)] == facts.pts[7:].tolist()
    assert numbers(np.stack([frame for _, frame in read_frames(data, start=last)])) == list(range(7, 12))


def mpeg2(frames: np.ndarray) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="vob") as muxer:
        stream = muxer.add_stream("mpeg2video", rate=25)  # the codec knows few rates
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for rgb in frames:
            muxer.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        muxer.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_files_come_upright(rotation: int) -> None:
    picture = np.zeros((3, 32, 64, 3), np.uint8)
    picture[:, :16, :32] = 250  # bright upper left
    facts = probe(muxed(picture, rotation=rotation))
    upright = np.rot90(picture[0], facts.rotation // 90)
    ((_, frame), *_) = read_frames(muxed(picture, rotation=rotation))
    assert facts.rotation == rotation % 360
    assert (facts.height, facts.width) == frame.shape[:2] == upright.shape[:2]
    assert np.abs(frame.astype(int) - upright).mean() < 6
    assert decode_clip(muxed(picture, rotation=rotation), frames=3).shape == (3, *upright.shape)


def test_scaling_on_the_way() -> None:
    data = muxed(stamped(4, 64, 32), rotation=90)
    assert [frame.shape for _, frame in read_frames(data, size=(16, 40))] == [(16, 40, 3)] * 4


@pytest.mark.parametrize("ext", ["PNG", "JPEG", "WEBP"])
def test_still_images_are_clips_of_one_frame(ext: str) -> None:
    out = io.BytesIO()
    Image.fromarray(stamped(6, 20, 30)[5]).save(out, ext)
    clip = decode_clip(out.getvalue(), frames=1, fps=24.0)
    assert clip.shape == (1, 20, 30, 3) and numbers(clip) == [5]
    assert (probe(out.getvalue()).frames, probe(out.getvalue()).height) == (1, 20)
    with pytest.raises(BadVideo, match="still"):
        decode_clip(out.getvalue(), frames=2)


# ------------------------------------------------------------------------------------------------------ bad input


def textured() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (FRAMES, 64, 64, 3), dtype=np.uint8)


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
    monkeypatch.setattr(video, "sniff", lambda head: "hls")
    with pytest.raises((BadVideo, PermissionError)):
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


def test_small_clips_decode_fast() -> None:
    clip = encode_mp4(stamped(17), 8, 10)
    decode_clip(clip, frames=17)
    start = time.process_time()
    for _ in range(50):
        decode_clip(clip, frames=17, fps=8.0)
    assert (time.process_time() - start) / 50 < 0.02  # measured: about 1 ms
