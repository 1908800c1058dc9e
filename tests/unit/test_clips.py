"""Which frames of a source become which clips, and which sources are held out: arithmetic alone."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.config import DataConfig, PackConfig, SplitConfig
from data_tools.lists import Row
from data_tools.probe import Probed
from data_tools.probe import facts_of as facts_of_row
from data_tools.sources import Source
from data_tools.split import Media, clip_size, frames_at_rate, held_out, tile
from sora_lite.data.video import VideoFacts


def facts_of(pts: np.ndarray, rate: Fraction, time_base: Fraction, variable_rate: bool) -> VideoFacts:
    return VideoFacts(
        container="mov",
        codec="h264",
        width=64,
        height=48,
        sar=Fraction(4, 3),
        rotation=90,
        time_base=time_base,
        average_rate=rate,
        bit_depth=8,
        hdr=False,
        interlaced=False,
        variable_rate=variable_rate,
        frames_hash="",
        pts=pts.astype(np.int64),
    )


RATES = st.sampled_from(
    [Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60), Fraction(8)]
)


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(2, 3000), rate=RATES, fps=RATES, start=st.integers(-900, 900), data=st.data())
def test_constant_rate_is_exact_even_where_times_are_rounded_to_milliseconds(
    frames: int, rate: Fraction, fps: Fraction, start: int, data: st.DataObject
) -> None:
    pts = np.array([start + round(i * 1000 / rate) for i in range(frames)])
    first = data.draw(st.integers(0, frames - 1))
    last = data.draw(st.integers(first + 1, frames))
    picks = frames_at_rate(facts_of(pts, rate, Fraction(1, 1000), False), fps, (first, last))
    assert picks.tolist() == [first + i * rate / fps // 1 for i in range(len(picks))]
    assert picks[-1] < last <= first + len(picks) * rate / fps
    if rate == fps:
        assert picks.tolist() == list(range(first, last))


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(1, 4000), min_size=1, max_size=60), fps=RATES, data=st.data())
def test_variable_rate_shows_the_last_frame_before_each_time(
    steps: list[int], fps: Fraction, data: st.DataObject
) -> None:
    pts = np.cumsum([100, *steps])
    rate = Fraction(1000 * len(steps), sum(steps))
    facts = facts_of(pts, rate, Fraction(1, 1000), True)
    first = data.draw(st.integers(0, len(pts) - 1))
    last = data.draw(st.integers(first + 1, len(pts)))
    picks = frames_at_rate(facts, fps, (first, last))
    end = pts[last] if last < len(pts) else pts[-1] + 1000 / rate
    times = [t for i in range(len(picks) + 1) if (t := pts[first] + i * 1000 / fps) < end]
    assert picks.tolist() == [max(k for k, p in enumerate(pts) if p <= t) for t in times]
    assert facts_of_row(Probed.from_facts("ab", facts).row).pts.tolist() == pts.tolist()


def media_of(facts: VideoFacts, *transitions: tuple[str, int, int], **settings_: object) -> Media:
    kinds, firsts, lasts = (list(column) for column in zip(*transitions, strict=True)) if transitions else ([], [], [])
    row = {"kinds": kinds, "firsts": firsts, "lasts": lasts}
    source = Source(location="/a", name="a", row=Row())
    return tile(source, Probed.from_facts("ab" * 32, facts), row, SplitConfig(**settings_))


def spans(media: Media) -> list[tuple[int, int]]:
    return [(media.shots[clip.shot][0] + clip.first, media.shots[clip.shot][0] + clip.last) for clip in media.clips]


def test_tiles_are_gapless_and_the_rest_is_counted() -> None:
    facts = facts_of(np.arange(100), Fraction(8), Fraction(1, 8), False)
    media = media_of(facts, clip_frames=30, min_frames=9)
    assert spans(media) == [(0, 30), (30, 60), (60, 90), (90, 100)] and media.dropped == 0
    media = media_of(facts, clip_frames=30, min_frames=17)
    assert spans(media) == [(0, 30), (30, 60), (60, 90)] and media.dropped == 10
    assert media.size == (48, 85)  # 64 * 4/3 wide
    assert clip_size(media, None, DataConfig(pack=PackConfig(max_side=40))) == (22, 40)
    assert clip_size(media, (24, 85), DataConfig()) == (24, 84)
    assert clip_size(media, (12, 85), DataConfig()) is None
    assert spans(media_of(facts, clip_seconds=4))[0] == (0, 32)


def test_no_clip_crosses_a_boundary() -> None:
    facts = facts_of(np.arange(100), Fraction(8), Fraction(1, 8), False)
    media = media_of(facts, ("cut", 25, 25), ("fade", 60, 70), clip_frames=20, min_frames=5)
    assert spans(media) == [(0, 20), (20, 25), (25, 45), (45, 60), (70, 90), (90, 100)] and media.dropped == 10


@given(groups=st.sets(st.text(max_size=4), max_size=40), more=st.text(max_size=4), fraction=st.floats(0, 0.9))
def test_what_is_held_out_depends_on_the_group_alone(groups: set[str], more: str, fraction: float) -> None:
    held = held_out(groups, fraction)
    assert held <= groups
    if fraction > 0 and len(groups) > 1:
        assert 0 < len(held) < len(groups)
    later = held_out({*groups, more}, fraction, at_least_one=False)
    assert held_out(groups, fraction, at_least_one=False) == later - ({more} - groups)
