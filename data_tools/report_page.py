"""The page that `sora-data report` makes: histograms of the scores, and frames on both sides of every threshold.

Whatever the size of the data set, it shows some 250 frames at most. They are decoded by workers that may die, as the
sources may be anything. The page is one file that loads nothing, runs nothing, and shows texts as they are.
"""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from tqdm import tqdm

from data_tools import filters
from data_tools.config import SCORES, CaptionSource, DataConfig
from data_tools.filters import Threshold
from data_tools.job import Job
from data_tools.locations import open_source
from data_tools.look import encode_jpeg
from data_tools.plan import Plan, crop_box, score_columns
from data_tools.pool import Rows, Task, beat
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
from data_tools.score import MEANINGS
from data_tools.split import Clip, Media
from data_tools.state import Unit, outcomes
from sora_lite.data.video import BadVideo, read_frames

BOX = (144, 192)
"""Most height and width in pixels of a picture on the page."""
NEAR = 6
"""Clips shown on either side of a threshold, and of either end of a score without one."""
NEAR_BOTH = 4
"""The same for a score that has a lower and an upper threshold."""
PAIRS = 6
CUTS = 12
CAPTIONS = 12
LINES = 300
"""Most rows of a table on the page; report.json has them all."""
BARS = 72
PERCENTILES = (1, 5, 50, 95, 99)
MOVING = ("motion", "static_ratio")
"""Scores of which one frame shows nothing: first and last frame of a clip are shown."""
SEEKABLE = ("mov", "matroska")
"""Containers in which going to a time costs less than decoding up to it."""
FAR_SECONDS = 10.0
"""Time between two wanted frames from which on it pays to seek."""


class Look(NamedTuple):
    """A frame that the page shows: the first of a source at or after a time."""

    sha256: str
    pts: int


@dataclass(kw_only=True, slots=True)
class Picture:
    """A decoded frame as a data: URL, or the reason why there is none."""

    url: str = ""
    reason: str = ""


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
class Bar:
    """One bar of a histogram, in the units of the drawing; `out` is the upper part, which a threshold cuts off."""

    left: float
    width: float
    kept: float
    out: float
    title: str


@dataclass(kw_only=True, slots=True)
class Histogram:
    """What the template draws; positions are in its units from the left."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    marks: list[tuple[float, str]]
    """Percentiles."""
    ends: list[tuple[float, str]]
    """Thresholds."""


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


WIDTH, HEIGHT = 1000.0, 150.0
"""Size of a histogram's drawing, in units of it."""


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
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {
            "clock": clock,
            "counted": counted,
            "number": lambda count: f"{count:,}",
            "short": short,
        }
        return environment.get_template("report.html.jinja").render(
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
        figures += [(_percent(part), np.percentile(known, part)) for part in PERCENTILES]
        figures += [("largest", known.max())]
        outside = int(((known < low) | (known > high)).sum())
        said = [f"{kind} {_figure(end)}" for kind, end in ends]
        return Section(
            name=name,
            about=MEANINGS[name],
            figures=[(what, _figure(value)) for what, value in figures],
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
            rows += [self._row(f"{title} {_figure(end)}", name, values, chosen) for title, chosen in sides]
        return rows

    def _order(self, values: np.ndarray) -> np.ndarray:
        """Clips by a value; among equals the first ones of every source come first, so that many sources are seen."""
        return np.lexsort((np.array([clip.number for clip in self.scored]), values))

    def _row(self, title: str, name: str, values: np.ndarray, chosen: np.ndarray) -> Row:
        tiles = []
        for i in chosen.tolist():
            tile = self._tile(self.scored[i], moving=name in MOVING)
            tile.value = _figure(values[i])
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


def histogram(values: np.ndarray, ends: list[tuple[str, float]]) -> Histogram:
    """Bars whose height is the square root of their count, so that rare values can be seen.

    values: finite, at least one. ends: ("min" | "max", value). A long tail is gathered in the last bar of its side.
    """
    first, last = (float(np.percentile(values, part)) for part in (1, 99))
    reach = 2 * (last - first) or np.inf
    low = min([max(float(values.min()), first - reach), *(end for _, end in ends)])
    high = max([min(float(values.max()), last + reach), *(end for _, end in ends)])
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):  # all the same
        high = low + 1.0
    edges = np.linspace(low, high, BARS + 1)
    outside = np.zeros(len(values), dtype=bool)
    for kind, end in ends:
        outside |= values < end if kind == "min" else values > end
    inside = np.clip(values, low, high)
    totals, cut = np.histogram(inside, edges)[0], np.histogram(inside[outside], edges)[0]
    bars = []
    for i in np.flatnonzero(totals).tolist():
        height = HEIGHT * float(np.sqrt(totals[i] / totals.max()))
        left_out = height * int(cut[i]) / int(totals[i])
        lower = "…" if i == 0 and values.min() < low else _figure(edges[i])
        upper = "…" if i == BARS - 1 and values.max() > high else _figure(edges[i + 1])
        title = f"{lower} to {upper}: {counted(int(totals[i]), 'clip')}" + (f", {cut[i]:,} left out" if cut[i] else "")
        step = WIDTH / BARS
        bars.append(Bar(left=i * step, width=step - 1.5, kept=height - left_out, out=left_out, title=title))

    def place(value: float) -> float:
        return round(WIDTH * (min(max(value, low), high) - low) / (high - low), 1)

    marks = [
        (place(at), f"{_percent(part)}: {_figure(at)}") for part in PERCENTILES for at in [np.percentile(values, part)]
    ]
    return Histogram(
        bars=bars,
        ticks=[(place(tick), _figure(tick)) for tick in _ticks(low, high)],
        marks=marks,
        ends=[(place(end), f"{kind} {_figure(end)}") for kind, end in ends],
    )


def _ticks(low: float, high: float) -> list[float]:
    """About eight round numbers in [low, high]."""
    rough = (high - low) / 8
    power = 10 ** np.floor(np.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    numbers = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1)
    return [float(number * step) + 0.0 for number in numbers]  # no -0


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
        parts.append(f"at least {_figure(one.low)}{one.low_origin}")
    if np.isfinite(one.high):
        parts.append(f"at most {_figure(one.high)}{one.high_origin}")
    return f"{one.score} {' and '.join(parts)}"


def _figure(value: float) -> str:
    return f"{value:.3g}"


def _percent(part: int) -> str:
    return "median" if part == 50 else f"{part} %"


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} clips ({100 * count / total:.1f} %)"


# -------------------------------------------------------------------------------------------------------------- frames


def pictures(wanted: dict[Look, Media], config: DataConfig) -> dict[Look, Picture]:
    """Decode frames, one task for each source."""
    times: dict[str, list[int]] = {}
    media_of = {look.sha256: media for look, media in wanted.items()}
    for look in sorted(wanted):
        times.setdefault(look.sha256, []).append(look.pts)
    units = [Unit(keys=[sha256], task=_task(media_of[sha256], pts)) for sha256, pts in times.items()]
    found: dict[Look, Picture] = {}
    with tqdm(total=len(wanted), desc="report", unit="picture", mininterval=0.5) as bar:
        for unit, outcome in outcomes(work, units, config):
            (sha256,) = unit.keys
            for row in outcome.rows:
                found[Look(sha256, row["pts"])] = Picture(url=_data_url(row["jpeg"]))
            if outcome.reason:
                found |= {Look(sha256, pts): Picture(reason=outcome.reason) for pts in unit.task["pts"]}
            bar.update(len(unit.task["pts"]))
    return found


def _task(media: Media, pts: list[int]) -> Task:
    height, width = media.size
    scale = min(Fraction(BOX[0], height), Fraction(BOX[1], width))
    row = media.probed.row
    return {
        "location": media.source.location,
        "pts": pts,
        "size": [max(1, round(height * scale)), max(1, round(width * scale))],
        "far": int(FAR_SECONDS / Fraction(row["time_base"])) if row["container"] in SEEKABLE else None,
    }


def work(task: Task) -> Rows:
    """The frames of a source that are first at or after some times (ascending), as small JPEG files."""
    rows = []
    with open_source(task["location"]) as file:

        def begin(pts: int) -> Iterator[tuple[int, np.ndarray]]:
            return read_frames(file, start=pts, size=tuple(task["size"]), draft=True, beat=beat)

        for pts, frame in _frames_at(begin, task["pts"], task["far"]):
            rows.append({"pts": pts, "jpeg": encode_jpeg(frame)})
    return rows


def _frames_at(
    begin: Callable[[int], Iterator[tuple[int, np.ndarray]]], times: list[int], far: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """(wanted time, frame). begin: decodes from a time on; it is called anew to leap over more than `far` ticks."""
    frames = begin(times[0])
    now = frame = None
    for wanted in times:
        if far is not None and now is not None and wanted - now > far:
            frames, now = begin(wanted), None
        while now is None or frame is None or now < wanted:
            now, frame = next(frames, (None, None))
            if now is None:
                raise BadVideo("changed since it was probed: it ends before this frame")
        yield wanted, frame


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
