"""The promised frames and no others, out of files of every kind, wherever reading begins."""

import io
from fractions import Fraction
from functools import cache
from itertools import pairwise

import av
import numpy as np
import pytest
from stamped import HEIGHT, MAKERS, ONE, STAMPS, WIDTH, read_stamp

from sora_lite.data.video import BadVideo, cut_clips, decode_clip, probe, read_frames, reader

RATE = Fraction(25)
CLIP = {"size": (80, 112), "fps": RATE, "crf": 20, "preset": "ultrafast"}
made = cache(lambda name: MAKERS[name]())
MOVING = [name for name in MAKERS if name not in ONE]


def shown(media: bytes) -> list[int]:
    """Stamps of a clip's frames, by a plain reading of the file from its beginning."""
    if media.startswith(b"\x89PNG"):
        return [read_stamp(decode_clip(media, frames=1)[0])]
    with av.open(io.BytesIO(media)) as file:
        return [read_stamp(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]


def stretches(count: int, seed: int) -> list[list[np.ndarray]]:
    """Lists of clips, one after the other, as the packing of a source asks for them; half repeat and skip frames."""
    rng, found = np.random.default_rng(seed), []
    for i in range(6):
        bounds = np.sort(rng.choice(count + 1, size=min(count + 1, int(rng.integers(2, 6))), replace=False))
        clips = [np.arange(first, last) for first, last in pairwise(bounds)]
        found.append([np.sort(rng.choice(clip, len(clip) + 2)) for clip in clips] if i % 2 else clips)
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_a_whole_reading_shows_every_frame_once(name: str) -> None:
    facts = probe(made(name))
    frames = list(read_frames(made(name)))
    assert [read_stamp(frame) for _, frame in frames] == STAMPS[name]
    assert [time for time, _ in frames] == facts.pts.tolist()
    assert {frame.shape[:2] for _, frame in frames} == {(facts.height, facts.width)}
    if name != "jpeg_upside_down" and not name.startswith("rotated"):  # plain PyAV turns nothing
        assert shown(made(name)) == STAMPS[name]


@pytest.mark.parametrize("name", MOVING)
def test_reading_may_begin_at_any_frame(name: str) -> None:
    facts = probe(made(name))
    for i, start in enumerate(facts.pts.tolist()):
        time, frame = next(read_frames(made(name), start=start, draft=True))
        assert (time, read_stamp(frame)) == (start, STAMPS[name][i])


@pytest.mark.parametrize("name", MOVING)
def test_clips_hold_the_promised_frames(name: str) -> None:
    facts = probe(made(name))
    for clips in stretches(facts.frames, seed=len(name)):
        for clip, media in zip(clips, cut_clips(made(name), pts=facts.pts, clips=clips, **CLIP), strict=True):
            assert shown(media) == [STAMPS[name][pick] for pick in clip]
            assert media[4:8] == b"ftyp"


@pytest.mark.parametrize("name", ONE)
def test_a_single_frame_is_a_clip(name: str) -> None:
    facts = probe(made(name))
    (media,) = cut_clips(made(name), pts=facts.pts, clips=[np.zeros(1, np.int64)], **CLIP)
    assert facts.frames == 1 and shown(media) == [0] and decode_clip(media, frames=1).shape[1:3] == CLIP["size"]


@pytest.mark.parametrize("name", ["h264_open", "h264_open_mkv", "hevc_open", "vp9", "av1", "h264_ts", "mpeg2_ps"])
def test_what_comes_before_is_not_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, decoded = probe(made(name)), []
    check = reader.Check.__call__
    monkeypatch.setattr(reader.Check, "__call__", lambda self, *frame: decoded.append(frame) or check(self, *frame))
    next(read_frames(made(name), start=int(facts.pts[40])))
    assert len(decoded) <= 24, "two groups of 12 at most"


@pytest.mark.parametrize("name", ["h264_open", "vp9", "h264_ts", "rotated_90", "ten_bit"])
def test_a_clip_is_the_same_bytes_wherever_the_stretch_begins(name: str) -> None:
    facts = probe(made(name))
    clips = [np.arange(first, first + 8) for first in range(0, 48, 8)]
    together = list(cut_clips(made(name), pts=facts.pts, clips=clips, **CLIP))
    alone = [next(cut_clips(made(name), pts=facts.pts, clips=[clip], **CLIP)) for clip in reversed(clips)]
    assert together == alone[::-1]


def test_times_that_are_not_those_of_before_are_noticed() -> None:
    pts = probe(made("h264_closed")).pts
    clips = [np.arange(20, 30)]
    for changed in (pts + 1, np.concatenate([pts[:25], pts[25:] + 512])):
        with pytest.raises(BadVideo, match="not where it was"):
            list(cut_clips(made("h264_closed"), pts=changed, clips=clips, **CLIP))
    longer = np.append(pts, pts[-1] + 512)
    with pytest.raises(BadVideo, match="not there any more"):
        list(cut_clips(made("h264_closed"), pts=longer, clips=[np.arange(46, 49)], **CLIP))


@pytest.mark.parametrize("name", ["h264_ts", "hevc_open", "mpeg2_ts", "mpeg2_ps"])
def test_a_recording_that_begins_amid_a_group(name: str) -> None:
    """Its first frames build on what was cut away; those that can be decoded keep their numbers everywhere."""
    out, kind = io.BytesIO(), "vob" if name == "mpeg2_ps" else "mpegts"
    with av.open(io.BytesIO(made(name))) as source, av.open(out, "w", format=kind) as muxer:
        track = muxer.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.dts is not None][5:]:
            packet.stream = track
            muxer.mux(packet)
    data = out.getvalue()
    facts = probe(data)
    stamps = [read_stamp(frame) for _, frame in read_frames(data)]
    assert stamps == list(range(stamps[0], 48)) and len(stamps) >= 36
    clips = [np.arange(0, 5), np.arange(17, 30)]
    cut = [shown(media) for media in cut_clips(data, pts=facts.pts, clips=clips, **CLIP)]
    assert cut == [[stamps[pick] for pick in clip] for clip in clips]


def test_the_stamps_themselves_can_be_wrong() -> None:
    frame = next(iter(read_frames(made("png"))))[1]
    assert [read_stamp(np.rot90(frame, turns)) for turns in range(4)] == [0, -1, 255, -1]
    assert read_stamp(np.zeros((HEIGHT, WIDTH, 3), np.uint8)) == -1
