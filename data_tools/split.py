"""Second stage: which clips each source gives, and which sources are held out. No pixel is touched here."""

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data_tools.config import PrepareConfig
from sora_lite.data.video import STILLS, VideoFacts, rational

MIN_SIDE = 16
"""Smaller pictures hold nothing to learn from, and video codecs do not like them."""


class Unusable(Exception):
    """A source gives no clip, for the reason in the message."""


@dataclass(kw_only=True, slots=True)
class Tiling:
    """The clips of a source. Output frame i shows source frame picks[i]; clip c is frames [bounds[c], bounds[c+1])."""

    fps: Fraction
    size: tuple[int, int]
    """Height and width of the clips in pixels, even."""
    picks: np.ndarray
    """int64: numbers of source frames, never falling."""
    bounds: np.ndarray
    """int64 (clips + 1)."""
    dropped: int
    """Frames at the end that make no clip of their own."""


def tile(facts: VideoFacts, config: PrepareConfig) -> Tiling:
    """Cut a source into clips, one after the other from its first frame. Raises Unusable if there is none."""
    size = clip_size(facts, config.max_side)
    fps = rational(config.fps) if config.fps else facts.average_rate
    if facts.container in STILLS:
        picks, length, shortest = np.zeros(1, dtype=np.int64), 1, 1
    else:
        picks, shortest = frames_at_rate(facts, fps), config.min_frames
        length = config.clip_frames or max(config.min_frames, round(config.clip_seconds * fps))
    whole, rest = divmod(len(picks), length)
    bounds = [length * i for i in range(whole + 1)] + ([len(picks)] if rest >= shortest else [])
    if len(bounds) == 1:
        raise Unusable(f"too short: {len(picks)} frames at {float(fps):g} fps, min_frames={shortest}")
    clips = list(zip(picks[bounds[:-1]], picks[np.array(bounds[1:]) - 1], strict=True))
    if len(set(clips)) < len(clips):
        raise Unusable(f"clips at {float(fps):g} fps would repeat the same few of its {facts.frames} frames")
    dropped = len(picks) - bounds[-1]
    return Tiling(fps=fps, size=size, picks=picks, bounds=np.array(bounds, dtype=np.int64), dropped=dropped)


def frames_at_rate(facts: VideoFacts, fps: Fraction) -> np.ndarray:
    """Source frame of every output frame i: the last whose time is <= start + i / fps. int64, as long as the source.

    Times of a source of constant rate are taken as exact, since containers round them (to milliseconds, often).
    """
    elapsed = facts.pts - facts.pts[0]
    ticks = 1 / (facts.average_rate * facts.time_base)  # of a frame
    ideal = np.arange(facts.frames) * float(ticks)
    if np.abs(elapsed - ideal).max() <= max(1.0, 0.25 * float(ticks)):
        # exact arithmetic: floor(i * rate / fps), for all i below frames * fps / rate
        step = facts.average_rate / fps
        count = -(-facts.frames * step.denominator // step.numerator)
        return np.arange(count, dtype=np.int64) * step.numerator // step.denominator
    end = int(elapsed[-1]) + ticks
    step = 1 / (fps * facts.time_base)  # ticks of an output frame
    count = -(-end // step)
    times = np.arange(int(count), dtype=np.int64) * step.numerator // step.denominator
    return np.searchsorted(elapsed, times, side="right").astype(np.int64) - 1


def clip_size(facts: VideoFacts, max_side: int | None) -> tuple[int, int]:
    """Even (height, width) with square pixels, at most `max_side`. Raises Unusable if that is hardly a picture."""
    height, width = Fraction(facts.height), facts.width * facts.sar
    scale = min(Fraction(1), Fraction(max_side) / max(height, width)) if max_side else Fraction(1)
    size = (int(height * scale) // 2 * 2, int(width * scale) // 2 * 2)
    if facts.container in STILLS:
        size = (int(height * scale), int(width * scale))
    if min(size) < MIN_SIDE:
        raise Unusable(f"too small: {size[0]} x {size[1]} pixels, at least {MIN_SIDE} are needed")
    return size


def held_out(groups: set[str], fraction: float) -> set[str]:
    """The groups for validation: those whose hash falls below `fraction`, and at least one if there are two or more."""
    if fraction == 0 or len(groups) < 2:
        return set()
    place = {group: int(hashlib.sha256(f"split:{group}".encode()).hexdigest()[:12], 16) / 16**12 for group in groups}
    order = sorted(groups, key=lambda group: (place[group], group))
    chosen = {group for group in order if place[group] < fraction} or {order[0]}
    return chosen if len(chosen) < len(groups) else chosen - {order[-1]}
