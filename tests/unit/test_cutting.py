"""Clips that are cut out of sources: their frames, their colours, and bytes that never vary."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import stamped as stamps
from PIL import Image

from sora_lite.data.video import (
    BadVideo,
    Box,
    cut_clips,
    decode_clip,
    probe,
    read_frames,
    reader,
)


def cut(data: bytes, picks: np.ndarray, size: tuple[int, int], **how: object) -> bytes:
    """One clip of few losses."""
    settings = {"fps": Fraction(25), "crf": 4, "preset": "ultrafast", **how}
    (media,) = cut_clips(data, pts=probe(data).pts, clips=[picks], size=size, **settings)  # type: ignore[arg-type]
    return media


def patches(matrix: int, full: bool) -> bytes:
    """Lossless yuv444p of four plain patches, coded by ITU-T H.273's matrix of that number, in a range."""
    red, blue = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    rgb = np.array(COLOURS) / 255
    luma = rgb @ [red, 1 - red - blue, blue]
    planes = np.stack([luma, (rgb[:, 2] - luma) / (2 - 2 * blue), (rgb[:, 0] - luma) / (2 - 2 * red)])
    low, steps = (0, (255, 255, 255)) if full else (16, (219, 224, 224))
    coded = (planes * np.array(steps)[:, None] + np.array([low, 128, 128])[:, None]).round().clip(0, 255)
    pictures = np.repeat(coded.astype(np.uint8), 32, axis=1)[:, None].repeat(64, axis=1)  # 3 H W
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as muxer:
        stream = muxer.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for _ in range(2):
            muxer.mux(stream.encode(av.VideoFrame.from_ndarray(pictures, format="yuv444p")))
        muxer.mux(stream.encode())
    return out.getvalue()


COLOURS = [(200, 30, 60), (20, 180, 90), (40, 60, 220), (235, 220, 30)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 6, 9])
def test_clips_keep_their_colours_however_they_are_coded(matrix: int, full: bool) -> None:
    data = patches(matrix, full)
    ((_, read), *_) = read_frames(data)
    for frame in (read, *decode_clip(cut(data, np.arange(2), (64, 128)), frames=2)):
        shown = np.stack([frame[8:56, 32 * i + 8 : 32 * i + 24].mean(axis=(0, 1)) for i in range(4)])
        assert np.abs(shown - COLOURS).max() < 4


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_crops_are_taken_from_the_upright_picture(rotation: int) -> None:
    name = f"rotated_{rotation}" if rotation else "h264_closed"
    data, box = stamps.MAKERS[name](), Box(top=10, left=22, height=60, width=90)
    pictures = [frame[10:70, 22:112] for _, frame in read_frames(data)][:4]
    same = decode_clip(cut(data, np.arange(4), (60, 90), crop=box), frames=4)
    assert np.abs(same.astype(int) - pictures).mean() < 2
    halved = decode_clip(cut(data, np.arange(4), (30, 44), crop=box), frames=4)
    wanted = [np.asarray(Image.fromarray(one).resize((44, 30), Image.Resampling.BICUBIC)) for one in pictures]
    assert np.abs(halved.astype(int) - wanted).mean() < 2.5
    with pytest.raises(BadVideo, match="outside"):
        cut(data, np.arange(4), (60, 90), crop=Box(top=40, left=22, height=60, width=90))


def test_a_side_that_is_only_odd_loses_its_last_row() -> None:
    for name in ("odd_444", "odd_size"):
        data = stamps.MAKERS[name]()
        clip = decode_clip(cut(data, np.arange(3), (96, 130)), frames=3)
        exact = np.stack([frame[:96, :130] for _, frame in read_frames(data)][:3])
        assert np.abs(clip.astype(int) - exact).mean() < 2
    image = io.BytesIO()
    Image.fromarray(stamps.picture(9, 51, 33)).save(image, "png")
    (trimmed,) = cut_clips(image.getvalue(), pts=np.zeros(1, np.int64), clips=[np.zeros(1, np.int64)], size=(50, 32),
                           fps=Fraction(1), crf=0)  # fmt: skip
    assert np.array_equal(decode_clip(trimmed, frames=1)[0], stamps.picture(9, 51, 33)[:50, :32])


def test_clips_have_nothing_of_their_source_but_its_pictures() -> None:
    """Not its kinds of frames, so that keyframes stand where the encoder puts them, nor its times and turns."""
    for name in ("full_range", "rotated_90", "interlaced", "vfr_mp4"):
        with av.open(io.BytesIO(cut(stamps.MAKERS[name](), np.arange(40), (64, 64), preset="fast", crf=20))) as file:
            frames = list(file.decode(video=0))
            context = file.streams.video[0].codec_context
        assert [frame.pts for frame in frames] == [512 * i for i in range(40)] and frames[0].time_base * 512 * 25 == 1
        assert sum(frame.key_frame for frame in frames) == 1, name
        assert not any(frame.interlaced_frame or frame.rotation for frame in frames)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


def test_the_bytes_of_clips_never_vary() -> None:
    data, rng = stamps.MAKERS["h264_open"](), np.random.default_rng(0)
    first = cut(data, np.arange(30), (66, 34), preset="medium", crf=18)
    for _ in range(5):
        junk = [np.full(int(n), 7, np.uint8) for n in rng.integers(100, 40_000, 20)]  # another state of the heap
        del junk
        assert cut(data, np.arange(30), (66, 34), preset="medium", crf=18) == first


def test_long_gaps_between_clips_are_leapt(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stamps.h264(pictures=stamps.pictures(240))
    pts, decoded = probe(data).pts, []
    check = reader.Check.__call__
    monkeypatch.setattr(reader.Check, "__call__", lambda self, *frame: decoded.append(frame) or check(self, *frame))
    clips = [np.arange(first, first + 3) for first in (5, 100, 200)]
    found = list(cut_clips(data, pts=pts, clips=clips, size=(96, 128), fps=Fraction(25), crf=20))
    assert [stamps.read_stamp(frame) for media in found for frame in decode_clip(media, frames=3)] == [
        *clips[0],
        *clips[1],
        *clips[2],
    ]
    assert len(decoded) < 100
    with pytest.raises(ValueError, match="asked for after"):
        list(cut_clips(data, pts=pts, clips=clips[::-1], size=(96, 128), fps=Fraction(25), crf=20))
