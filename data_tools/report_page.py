"""The page that `sora-data report` makes: histograms of the scores, and frames on both sides of every threshold.

Whatever the size of the data set, it shows some 250 frames at most. It is one file that loads nothing, runs
nothing, and shows texts as they are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import filters
from data_tools.config import SCORES, CaptionSource
from data_tools.filters import Threshold
from data_tools.job import Job
from data_tools.plan import Plan, crop_box, score_columns
from data_tools.report import (
    LEFT,
    REPORT,
    clip_reasons,
    clock,
    counted,
    kind_of,
    left_out_sources,
    short,
    splits,
    tally,
)
from data_tools.report_frames import Look, pictures
from data_tools.report_histogram import HEIGHT, PERCENTILES, WIDTH, Histogram, figure, histogram, percent
from data_tools.score import MEANINGS
from data_tools.split import Clip, Media
from sora_lite.evaluation.template import environment

NEAR = 6
"""Clips shown on either side of a threshold, and of either end of a score without one."""
NEAR_BOTH = 4
"""The same for a score that has a lower and an upper threshold."""
PAIRS = 6
CUTS = 12
CAPTIONS = 12
"""Most near duplicates, cuts and clips with captions that are shown."""
LINES = 300
"""Most rows of a table on the page; report.json has them all."""
MOVING = ("motion", "static_ratio")
"""Scores of which one frame shows nothing: first and last frame of a clip are shown."""


@dataclass(kw_only=True, slots=True)
class Tile:
    """Frames of a clip or a cut, and what is said of them."""

    looks: list[Look]
    name: str
    """The source's."""
    at: str
    """Time in the source."""
    key: str = ""
    value: str = ""
    note: str = ""
    box: tuple[float, ...] = ()
    """What is left of the picture without its bars: left, top, width, height in percent of it."""


@dataclass(kw_only=True, slots=True)
class Row:
    """Tiles side by side under a heading."""

    title: str
    tiles: list[Tile]


@dataclass(kw_only=True, slots=True)
class Section:
    """All about one score."""

    name: str
    about: str
    figures: list[tuple[str, str]]
    effect: str
    """What the thresholds leave out; empty without any."""
    histogram: Histogram
    rows: list[Row] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Effect:
    """What one rule does, in clips."""

    text: str
    alone: int
    only: int
    """That no other rule leaves out."""


class Page:
    """Gathers what is to be seen, has its frames decoded, and renders it."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self.job, self.plan = job, plan
        self.clips = plan.clips
        self.by_key = {clip.key: clip for clip in self.clips}
        self.wanted: dict[Look, Media] = {}
        scores = plan.scores
        self.scored = [clip for clip in self.clips if clip.key in scores and not scores[clip.key]["reason"]]
        columns = score_columns(self.scored, scores) if self.scored else {}
        self.columns = {name: columns[name] for name in SCORES if np.isfinite(columns.get(name, np.nan)).any()}
        rules = job.config.filter.rules
        self.thresholds = filters.thresholds(self.columns, rules) if self.scored else []

    def render(self) -> str:
        """The page, as HTML."""
        sections = [self._section(name, values) for name, values in self.columns.items()]
        cuts, pairs, captions = self._cuts(), self._pairs(), self._captions()
        templates = environment(Path(__file__).parent)
        templates.filters |= {
            "clock": clock,
            "counted": counted,
            "number": lambda count: f"{count:,}",
            "short": short,
        }
        return templates.get_template("report.html.jinja").render(
            title=short(self.job.folder.resolve().name),
            tallies=tally(self.plan),
            dropped=sum(media.dropped for media in self.plan.media),
            splits=list(splits(self.job.folder)),
            scored=len(self.scored),
            effects=self._effects(),
            together=int(self._outside(self.thresholds).sum()),
            sections=sections,
            cuts=cuts,
            pairs=pairs,
            captions=captions,
            sources=left_out_sources(self.plan),
            reasons=clip_reasons(self.plan),
            quarantined=[clip for clip in self.clips if kind_of(self.plan.clip_fates.get(clip.key)) == "quarantined"],
            fates=self.plan.clip_fates,
            lines=LINES,
            settings=json.dumps(self.job.config.content(), indent=2, ensure_ascii=False),
            pictures=pictures(self.wanted, self.job.config),
            json_file=REPORT,
            size=(WIDTH, HEIGHT),
        )

    # ------------------------------------------------------------------------------------------------------- scores

    def _outside(self, thresholds: Sequence[Threshold]) -> np.ndarray:
        """bool (scored clips,): whether any of them leaves a clip out."""
        outside = np.zeros(len(self.scored), dtype=bool)
        for one in thresholds:
            values = self.columns[one.score]
            outside |= (values < one.low) | (values > one.high)
        return outside

    def _effects(self) -> list[Effect]:
        masks = np.array([self._outside([one]) for one in self.thresholds], dtype=bool).reshape(
            len(self.thresholds), len(self.scored)
        )
        times = masks.sum(axis=0)
        return [
            Effect(text=_rule_text(one), alone=int(mask.sum()), only=int((mask & (times == 1)).sum()))
            for one, mask in zip(self.thresholds, masks, strict=True)
        ]

    def _section(self, name: str, values: np.ndarray) -> Section:
        known = values[np.isfinite(values)]
        own = [one for one in self.thresholds if one.score == name]
        low, high = max((one.low for one in own), default=-np.inf), min((one.high for one in own), default=np.inf)
        ends = [("min", low)] * bool(np.isfinite(low)) + [("max", high)] * bool(np.isfinite(high))
        figures = [("least", known.min())]
        figures += [(percent(part), np.percentile(known, part)) for part in PERCENTILES]
        figures += [("largest", known.max())]
        outside = int(((known < low) | (known > high)).sum())
        said = [f"{kind} {figure(end)}" for kind, end in ends]
        return Section(
            name=name,
            about=MEANINGS[name],
            figures=[(what, figure(value)) for what, value in figures],
            effect=f"{' and '.join(said)}: {_share(outside, len(known))} left out" if said else "",
            histogram=histogram(known, ends),
            rows=self._rows(name, values, ends) if known.min() < known.max() else [],
        )

    def _rows(self, name: str, values: np.ndarray, ends: list[tuple[str, float]]) -> list[Row]:
        """Clips around each threshold, or at both ends of the scale."""
        if not ends:
            known = int(np.isfinite(values).sum())
            lowest, highest = (self._order(signed)[: min(NEAR, known // 2)] for signed in (values, -values))
            highest = highest[values[highest] > np.nanmin(values)]
            return [self._row("lowest", name, values, lowest), self._row("highest", name, values, highest)]
        rows = []
        most = NEAR if len(ends) == 1 else NEAR_BOTH
        for kind, end in ends:
            inside = values >= end if kind == "min" else values <= end
            nearest = self._order(np.abs(values - end))
            kept, out = nearest[inside[nearest]][:most], nearest[~inside[nearest]][:most]
            if kind == "min":
                sides = [("left out: just below", out[::-1]), ("kept: from", kept)]
            else:
                sides = [("kept: up to", kept[::-1]), ("left out: just above", out)]
            rows += [self._row(f"{title} {figure(end)}", name, values, chosen) for title, chosen in sides]
        return rows

    def _order(self, values: np.ndarray) -> np.ndarray:
        """Clips by a value; among equals the first ones of every source come first, so that many sources are seen."""
        return np.lexsort((np.array([clip.number for clip in self.scored]), values))

    def _row(self, title: str, name: str, values: np.ndarray, chosen: np.ndarray) -> Row:
        tiles = []
        for i in chosen.tolist():
            tile = self._tile(self.scored[i], moving=name in MOVING)
            tile.value = figure(values[i])
            if name == "letterbox":
                tile.box = self._box(self.scored[i])
            tiles.append(tile)
        return Row(title=title, tiles=tiles)

    def _box(self, clip: Clip) -> tuple[float, ...]:
        box = crop_box(self.plan.scores[clip.key], clip.media, self.job.config)
        if box is None:
            return ()
        height, width = clip.media.probed.row["height"], clip.media.probed.row["width"]
        parts = (box.left / width, box.top / height, box.width / width, box.height / height)
        return tuple(round(100 * part, 2) for part in parts)

    # ------------------------------------------------------------------------------------------------- other samples

    def _tile(self, clip: Clip, *, moving: bool = False, pts: int | None = None) -> Tile:
        """A clip by the frame in its middle (moving: by its first and last; pts: by that at this time)."""
        middle = (clip.start_pts + clip.end_pts) // 2 if pts is None else pts
        times = [clip.start_pts, clip.end_pts] if moving and clip.end_pts > clip.start_pts else [middle]
        fate = self.plan.clip_fates.get(clip.key)
        return Tile(
            looks=[self._look(clip.media, time) for time in times],
            name=clip.media.source.name,
            at=_at(clip.media, clip.start_pts),
            key=clip.key,
            note="" if fate is None or fate.kind == "packed" else fate.kind,
        )

    def _look(self, media: Media, pts: int) -> Look:
        look = Look(media.sha256, pts)
        self.wanted[look] = media
        return look

    def _cuts(self) -> list[Tile]:
        """The last frame before and the first after some boundaries of shots, spread evenly over all of them."""
        all_of_them = [(media, i) for media in self.plan.media for i in range(len(media.shots) - 1)]
        tiles = []
        for media, i in _evenly(all_of_them, CUTS):
            last, first = media.shots[i][1] - 1, media.shots[i + 1][0]
            pts = media.probed.facts.pts
            between = first - last - 1
            tiles.append(
                Tile(
                    looks=[self._look(media, int(pts[last])), self._look(media, int(pts[first]))],
                    name=media.source.name,
                    at=_at(media, int(pts[first])),
                    value=counted(between, "frame") + " between" if between else "cut",
                )
            )
        return tiles

    def _pairs(self) -> list[list[Tile]]:
        """Near duplicates, each after the clip that is kept in its place; those that look least alike come first."""
        found = []
        for key, fate in self.plan.clip_fates.items():
            original = self.by_key.get(fate.original)
            if fate.kind == "duplicate" and original is not None:
                clip = self.by_key[key]
                bits, second, other = _alike(self.plan.scores[original.key]["phash"], self.plan.scores[key]["phash"])
                found.append((-bits, key, original, second, clip, other))
        pairs = []
        for bits, _, original, second, clip, other in sorted(found, key=lambda row: row[:2])[:PAIRS]:
            kept = self._tile(original, pts=_second(original, second))
            copy = self._tile(clip, pts=_second(clip, other))
            kept.value, copy.value = "kept", f"{-bits:.1f} bits differ"
            pairs.append([kept, copy])
        return pairs

    def _captions(self) -> dict[str, Any]:
        """How many of the clips that are kept have captions, and some of them."""
        kept = [clip for clip in self.clips if kind_of(self.plan.clip_fates.get(clip.key)) in ("packed", LEFT)]
        if self.job.config.caption.source is CaptionSource.metadata:
            texts = {clip.key: clip.media.source.row.captions for clip in kept}
        else:
            texts = {key: row["captions"] or [] for key, row in self.job.table("caption").read().items()}
        captioned = [clip for clip in kept if texts.get(clip.key)]
        tiles = [(self._tile(clip), [short(text) for text in texts[clip.key]]) for clip in _evenly(captioned, CAPTIONS)]
        return {"kept": len(kept), "captioned": len(captioned), "tiles": tiles}


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]


def _alike(one: list[int], other: list[int]) -> tuple[float, int, int]:
    """How two clips' perceptual hashes compare.

    -> mean, over the seconds of the one that has fewer, of the bits in which each differs from the most alike second of
    the other; and the second of each clip at which they are most alike. Both need a second that has a hash.
    """
    a, b = np.array(one, dtype=np.uint64), np.array(other, dtype=np.uint64)
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    bits = np.bitwise_count(a[rows, None] ^ b[None, columns])
    i, j = np.unravel_index(int(bits.argmin()), bits.shape)
    return float(bits.min(axis=int(len(rows) <= len(columns))).mean()), int(rows[i]), int(columns[j])


def _second(clip: Clip, second: int) -> int:
    """pts of a second of a clip."""
    ticks = second / Fraction(clip.media.probed.row["time_base"])
    return min(clip.start_pts + int(ticks), clip.end_pts)


def _at(media: Media, pts: int) -> str:
    row = media.probed.row
    return clock((pts - row["start"]) * Fraction(row["time_base"]), digits=1)


def _rule_text(one: Threshold) -> str:
    parts = []
    if np.isfinite(one.low):
        parts.append(f"at least {figure(one.low)}{one.low_origin}")
    if np.isfinite(one.high):
        parts.append(f"at most {figure(one.high)}{one.high_origin}")
    return f"{one.score} {' and '.join(parts)}"


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} clips ({100 * count / total:.1f} %)"
