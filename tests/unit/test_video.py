"""Decoding: the right frames, upright, in the right colours, and a clear reason where that cannot be."""

import ctypes
import io
import itertools
import math
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import stamped as stamps
from grey import FRAMES, SIDE, muxed, numbers, stamped, textured
from PIL import Image

from sora_lite.data.buckets import frames_at
from sora_lite.data.video import (
    GOP,
    BadVideo,
    decode_clip,
    decoding,
    encode_mp4,
    probe,
    read_frames,
    reader,
    write_mp4,
)
from sora_lite.errors import UserError

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
    assert keys[0] == 0 and max(np.diff([*keys, 120])) <= GOP


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
    clip = muxed(stamped(6), times=[0, 1, 5, 6, 7, 12])  # at 8 ticks a second
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


# ---------------------------------------------------------------------------------------------------------- facts


def test_facts_flag_what_is_unusual() -> None:
    def flags(name: str) -> tuple[int, bool, bool, bool]:
        facts = probe(stamps.MAKERS[name]())
        return facts.bit_depth, facts.hdr, facts.interlaced, facts.variable_rate

    assert flags("h264_open_mkv") == (8, False, False, False), "a container's milliseconds make no variable rate"
    assert flags("ten_bit") == (10, False, False, False)
    assert flags("interlaced") == (8, False, True, False)
    assert flags("vfr_mp4") == flags("vfr_mkv") == (8, False, False, True)
    assert probe(stamps.hevc(":transfer=smpte2084")).hdr and probe(stamps.hevc(":colorprim=bt2020")).hdr


def test_hash_of_the_frames_is_that_of_their_pixels_alone() -> None:
    frames = textured()
    hashes = [probe(muxed(frames, container=container)).frames_hash for container in ("mp4", "matroska", "mpegts")]
    assert len(set(hashes)) == 1 and len(hashes[0]) == 32
    lossless = {"codec": "ffv1", "container": "matroska"}
    before = probe(muxed(frames, **lossless)).frames_hash
    frames[-1, 40:42, 40:42] ^= 8
    assert before != probe(muxed(frames, **lossless)).frames_hash != probe(muxed(frames[:-1], **lossless)).frames_hash
    for name in ("odd_size", "odd_444", "ten_bit", "animated_gif", "full_range", "png"):
        data = stamps.MAKERS[name]()
        assert probe(data).frames_hash == probe(data).frames_hash != before


def test_sources_may_be_open_files_and_the_caller_is_kept_informed(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", stamped(), 8)
    beats: list[int] = []
    with (tmp_path / "a.mp4").open("rb") as file:
        file.read(100)
        assert probe(file, beat=lambda: beats.append(0)).frames == FRAMES and len(beats) >= FRAMES
        seen = len(beats)
        assert len(list(read_frames(file, start=0, beat=lambda: beats.append(0)))) == FRAMES
        assert not file.closed and len(beats) >= seen + FRAMES


def test_drafts_are_near_the_real_thing() -> None:
    data = stamps.MAKERS["h264_closed"]()
    pairs = zip(read_frames(data, size=(48, 64), draft=True), read_frames(data, size=(48, 64)), strict=True)
    assert max(np.abs(draft[1].astype(int) - exact[1]).mean() for draft, exact in pairs) < 4


# -------------------------------------------------------------------------------------------------------- decord


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_agreed", [])


@pytest.mark.usefixtures("undecided")
def test_decord_picks_the_same_frames() -> None:
    pytest.importorskip("decord")
    clip = encode_mp4(list(stamps.pictures(60)), Fraction(30000, 1001), 18)
    for wanted in ({"frames": 60}, {"frames": 9, "fps": 8.0}, {"frames": 30, "fps": 60.0, "start_frame_offset": 44}):
        ours, theirs = (decode_clip(clip, decoder=name, **wanted) for name in ("pyav", "decord"))
        assert [stamps.read_stamp(frame) for frame in theirs] == [stamps.read_stamp(frame) for frame in ours]
        assert np.abs(ours.astype(int) - theirs).mean() < 2
    for wanted in ({"frames": 61}, {"frames": 18, "fps": 8.0}):
        reasons = []
        for name in ("pyav", "decord"):
            with pytest.raises(BadVideo, match="ends after") as found:
                decode_clip(clip, decoder=name, **wanted)
            reasons.append(str(found.value))
        assert reasons[0] == reasons[1]


@pytest.mark.usefixtures("undecided")
def test_decord_is_not_used_if_it_decodes_something_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("decord")
    clip, by_decord = encode_mp4(stamped(), 8, 10), decoding._decode_by_decord
    monkeypatch.setattr(decoding, "_decode_by_decord", lambda *wanted: by_decord(*wanted)[::-1])
    for _ in range(2):
        assert numbers(decode_clip(clip, frames=FRAMES, decoder="decord")) == list(range(FRAMES))
    assert capsys.readouterr().err.count("PyAV decodes instead") == 1


@pytest.mark.usefixtures("undecided")
def test_decord_never_sees_files_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_decode_by_decord", lambda *wanted: pytest.fail("it did"))
    assert numbers(decode_clip(muxed(stamped()), frames=FRAMES, decoder="decord")) == list(range(FRAMES))


@pytest.mark.usefixtures("undecided")
def test_a_missing_decord_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match="pip install decord"):
        decode_clip(encode_mp4(stamped(), 8, 10), frames=3, decoder="decord")


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30), Fraction(25, 2)])
def test_frames_that_nobody_wants_are_passed_over_and_the_others_are_exact(
    monkeypatch: pytest.MonkeyPatch, rate: Fraction
) -> None:
    """Against a decoding of every frame, by number: floor(i * rate / fps)."""
    clip = encode_mp4(list(stamps.pictures(100)), rate, 18)
    whole = decode_clip(clip, frames=100)
    decoded, check = [], reader.Check.__call__
    monkeypatch.setattr(reader.Check, "__call__", lambda self, *frame: decoded.append(frame) or check(self, *frame))
    for start, stride in itertools.product(
        (0, 1, 46, 70), (Fraction(1), Fraction(2), Fraction(7, 2), Fraction(4), Fraction(9))
    ):
        count = math.ceil((100 - start) / stride)
        decoded.clear()
        found = decode_clip(clip, frames=count, fps=rate / stride, start_frame_offset=start)
        assert np.array_equal(found, whole[[start + math.floor(i * stride) for i in range(count)]])
        if stride >= 4 and start == 0:
            assert len(decoded) < 90  # of 100
        with pytest.raises(BadVideo, match="ends after"):
            decode_clip(clip, frames=count + 1, fps=rate / stride, start_frame_offset=start)


def test_own_clips_are_entered_at_the_keyframe_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = encode_mp4(list(stamps.pictures(120)), Fraction(24000, 1001), 18)
    decoded, check = [], reader.Check.__call__
    monkeypatch.setattr(reader.Check, "__call__", lambda self, *frame: decoded.append(frame) or check(self, *frame))
    for start in (1, 47, 48, 49, 95, 97, 118):
        decoded.clear()
        frames = decode_clip(clip, frames=2, start_frame_offset=start)
        assert [stamps.read_stamp(frame) for frame in frames] == [start, start + 1] and len(decoded) <= 49


def test_small_clips_decode_fast() -> None:
    clip = encode_mp4(stamped(17), 8, 10)
    decode_clip(clip, frames=17)
    start = time.process_time()
    for _ in range(50):
        decode_clip(clip, frames=17, fps=8.0)
    assert (time.process_time() - start) / 50 < 0.02  # measured: about 1 ms


class Malloc(ctypes.Structure):
    """What glibc's `mallinfo2` says of the heap. used: bytes that were asked for and not given back."""

    _fields_ = [("before", ctypes.c_size_t * 7), ("used", ctypes.c_size_t), ("after", ctypes.c_size_t * 2)]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts what glibc has given away")
@pytest.mark.parametrize("wanted", [{}, {"fps": 4.0}, {"start_frame_offset": 3}], ids=["own", "rate", "offset"])
def test_a_clip_that_was_decoded_leaves_no_memory_behind(wanted: dict[str, float]) -> None:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Malloc
    for data in (encode_mp4(stamped(), 8, 30), muxed(stamped())):  # the latter is read from its beginning
        for calls in (20, 200):  # the first fill what is kept
            before = mallinfo2().used
            for _ in range(calls):
                decode_clip(data, frames=5, **wanted)
        assert mallinfo2().used - before < 100 * calls  # a packet alone has 104 bytes
