"""What becomes of every source and every clip. Arithmetic on what the stages found; no file is opened.

Every source and every clip gets exactly one fate, so the numbers always add up: found = packed + filtered +
duplicate + quarantined + removed.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools import dedupe, filters
from data_tools.config import SCORES, DataConfig
from data_tools.probe import Probed, limits_of
from data_tools.score import SCORER_VERSION
from data_tools.sources import Source
from data_tools.split import Clip, Media, clip_size, held_out, tile
from sora_lite.data.manifest import SCHEMA_VERSION
from sora_lite.data.video import Box

KINDS = ("packed", "filtered", "duplicate", "quarantined", "removed")

Row = dict[str, Any]
Rows = dict[str, Row]


@dataclass(kw_only=True, slots=True)
class Fate:
    """What becomes of a source or a clip, and why."""

    kind: str
    """One of KINDS."""
    reason: str = ""
    stage: str = ""
    original: str = ""
    """Of a near duplicate: key of the clip that stays."""


PACKED = Fate(kind="packed")


@dataclass(kw_only=True, slots=True)
class Packed:
    """What the shards hold already."""

    clips: dict[str, str] = field(default_factory=dict)
    """Key -> split."""
    sources: dict[str, str] = field(default_factory=dict)
    """First 16 hex digits of a source's hash -> split."""
    frames: dict[str, str] = field(default_factory=dict)
    """Hash of all frames of a source -> first 16 hex digits of the source's hash."""
    groups: dict[str, str] = field(default_factory=dict)
    """First 16 hex digits of a source's hash -> its group, if it has one."""
    phashes: dict[str, list[int]] = field(default_factory=dict)
    """Key -> perceptual hashes."""
    removed_keys: set[str] = field(default_factory=set)
    removed_sources: set[str] = field(default_factory=set)
    removed_frames: set[str] = field(default_factory=set)
    """Hashes of all frames of sources that were taken down: their copies are not packed either."""


@dataclass(kw_only=True, slots=True)
class Plan:
    """All sources and clips with their fates."""

    sources: list[Source]
    good: list[tuple[Source, Probed]] = field(default_factory=list)
    """Sources that can be read, each once, in the order in which they are packed: that of their hashes, which shuffles
    them."""
    media: list[Media] = field(default_factory=list)
    """Those that give clips."""
    source_fates: dict[str, Fate] = field(default_factory=dict)
    """By name."""
    clip_fates: dict[str, Fate] = field(default_factory=dict)
    """By key. A clip without one is to be packed."""
    splits: dict[str, str] = field(default_factory=dict)
    """Hash of a source -> train or validation."""
    scores: Rows = field(default_factory=dict)
    """What was measured, by key."""

    @property
    def clips(self) -> list[Clip]:
        """All clips, in the order in which they are packed."""
        return [clip for media in self.media for clip in media.clips]

    def left(self) -> list[Clip]:
        """Clips that have no fate yet."""
        return [clip for clip in self.clips if clip.key not in self.clip_fates]

    def give(self, clips: Iterable[Clip], fate: Fate) -> None:
        """Give a fate to those of the clips that have none."""
        for clip in clips:
            self.clip_fates.setdefault(clip.key, fate)

    def count(self) -> dict[str, int]:
        """Flat figures, as the manifest keeps them. Raises RuntimeError if anything got lost."""
        counts: dict[str, int] = {}
        for what, found, fates in (
            ("sources", len(self.sources), self.source_fates),
            ("clips", len(self.clips), self.clip_fates),
        ):
            kinds = Counter(fate.kind for fate in fates.values())
            counts[f"{what}_found"] = found
            counts |= {f"{what}_{kind}": kinds[kind] for kind in KINDS}
            if found != sum(kinds[kind] for kind in KINDS):
                raise RuntimeError(f"{what} got lost: {counts}")
        packed = [clip for clip in self.clips if self.clip_fates[clip.key].kind == "packed"]
        counts["frames_packed"] = sum(clip.frames for clip in packed)
        counts["frames_dropped"] = sum(media.dropped for media in self.media)
        return counts


def choose(sources: list[Source], keys: dict[str, str], probed: Rows, packed: Packed, config: DataConfig) -> Plan:
    """Sources that can be read, each once; clips come later. Files of equal bytes or equal frames count once.

    keys: name of a source -> key of its row in `probed`.
    """
    plan = Plan(sources=sources)
    good: list[tuple[Source, Probed]] = []
    limits = limits_of(config.probe)
    for source in sources:
        row = {"reason": source.reason} if source.reason else probed[keys[source.name]]
        if row["reason"]:
            plan.source_fates[source.name] = Fate(kind="quarantined", reason=row["reason"], stage="probe")
        else:
            good.append((source, Probed(sha256=row["sha256"], row=row, limits=limits)))
    # what is packed comes first, so that it stays the original of its copies
    good.sort(key=lambda pair: (pair[1].sha256[:16] not in packed.sources, pair[1].sha256, pair[0].name))
    first: dict[str, str] = {}
    for source, one in good:
        same_file, same_frames = first.get(one.sha256), first.get(one.row["frames_hash"])
        elsewhere = packed.frames.get(one.row["frames_hash"], one.sha256[:16])
        flags = [name for name in ("hdr", "interlaced", "variable_rate") if one.row[name]]
        unwanted = [name for name in flags if name not in {flag.name for flag in config.filter.keep_flagged}]
        if one.sha256[:16] in packed.removed_sources or one.row["frames_hash"] in packed.removed_frames:
            fate = Fate(kind="removed", reason="was taken down")
        elif same_file is not None:
            fate = Fate(kind="duplicate", reason=f"has the same bytes as {same_file}", stage="dedupe")
        elif same_frames is not None:
            fate = Fate(kind="duplicate", reason=f"shows the same frames as {same_frames}", stage="dedupe")
        elif elsewhere != one.sha256[:16]:
            fate = Fate(kind="duplicate", reason=f"shows the same frames as {elsewhere} in the shards", stage="dedupe")
        elif unwanted and one.sha256[:16] not in packed.sources:
            why = f"{', '.join(unwanted)}: not among filter.keep_flagged"
            fate = Fate(kind="filtered", reason=why, stage="filter")
        else:
            first[one.sha256] = first[one.row["frames_hash"]] = source.name
            plan.good.append((source, one))
            continue
        plan.source_fates[source.name] = fate
    plan.good.sort(key=lambda pair: pair[1].sha256)
    return plan


def cut(plan: Plan, shots: Rows, packed: Packed, config: DataConfig) -> None:
    """Cut the sources into clips; what is packed or taken down has its fate at once."""
    for source, probed in plan.good:
        row = shots[probed.sha256]
        if row["reason"]:
            plan.source_fates[source.name] = Fate(kind="quarantined", reason=row["reason"], stage="split")
            continue
        media = tile(source, probed, row, config.split)
        if media.clips:
            plan.media.append(media)
            continue
        longest = max((last - first for first, last in media.shots), default=0)
        why = f"too short: its longest shot has {longest} frames, split.min_frames={config.split.min_frames}"
        plan.source_fates[source.name] = Fate(kind="filtered", reason=why, stage="split")
    for clip in plan.clips:
        if clip.key in packed.removed_keys:
            plan.clip_fates[clip.key] = Fate(kind="removed", reason="was taken down")
        elif clip.key in packed.clips:
            plan.clip_fates[clip.key] = PACKED


def sieve(plan: Plan, scores: Rows, config: DataConfig) -> None:
    """Leave out clips by their scores."""
    plan.scores = scores
    for clip in plan.left():
        if reason := scores[clip.key]["reason"]:
            plan.clip_fates[clip.key] = Fate(kind="quarantined", reason=reason, stage="score")
        elif clip_size(clip.media, cropped(scores[clip.key], clip.media, config), config) is None:
            height, width = clip.media.size
            why = f"too small: {height} x {width} pixels"
            plan.clip_fates[clip.key] = Fate(kind="filtered", reason=why, stage="filter")
    # percentiles are over all clips, so that they mean the same when some of them are packed already
    clips = [clip for clip in plan.clips if clip.key in scores and not scores[clip.key]["reason"]]
    if config.filter.rules and clips:
        for clip, why in zip(clips, filters.apply(score_columns(clips, scores), config.filter.rules), strict=True):
            if why:
                plan.clip_fates.setdefault(clip.key, Fate(kind="filtered", reason=why, stage="filter"))


def thin(plan: Plan, packed: Packed, config: DataConfig) -> None:
    """Leave out all but one of clips that look alike, and say which sources are held out."""
    clusters = _dedupe(plan, packed, config)
    _assign(plan, clusters, packed, config)


def score_columns(clips: list[Clip], scores: Rows) -> dict[str, np.ndarray]:
    """Score -> float64 (clips,); NaN where it was not measured."""
    names = [name for name in next(iter(scores.values()), {}) if name in SCORES]
    return {
        name: np.array([np.nan if (value := scores[clip.key][name]) is None else value for clip in clips])
        for name in names
    }


def _dedupe(plan: Plan, packed: Packed, config: DataConfig) -> dict[str, int]:
    """Clusters of near duplicates by key. In each, one source keeps its clips: what follows itself is no copy of it."""
    if not config.dedupe.near:
        return {}
    clips = {clip.key: clip for clip in plan.left()}
    phashes = {key: plan.scores[key]["phash"] for key in clips} | packed.phashes
    keys = sorted(phashes)
    found = dedupe.clusters(
        [np.array(phashes[key], dtype=np.uint64) for key in keys], config.dedupe.distance, config.dedupe.overlap
    )
    clusters = dict(zip(keys, found.tolist(), strict=True))

    def rank(key: str) -> tuple[Any, ...]:
        if key not in clips:
            return (0, key)  # packed already
        media = clips[key].media
        return (1, not media.source.row.captions, -media.size[0] * media.size[1], -clips[key].seconds, key)

    best: dict[int, str] = {}
    for key in sorted(keys, key=rank):
        original = best.setdefault(clusters[key], key)
        if original[:16] != key[:16] and key in clips:
            reason = f"looks like {original}"
            plan.clip_fates[key] = Fate(kind="duplicate", reason=reason, stage="dedupe", original=original)
    return clusters


def _assign(plan: Plan, clusters: dict[str, int], packed: Packed, config: DataConfig) -> None:
    """Give every source its split. Sources of one group, or with clips that look alike, share theirs."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = parent.setdefault(above, above)
            name = parent[name]
        return name

    def join(one: str, other: str) -> None:
        one, other = sorted((root(one), root(other)))
        parent[other] = one

    for media in plan.media:
        join(f"source {media.sha256[:16]}", f"source {media.sha256[:16]}")
        if media.source.row.group is not None:
            join(f"source {media.sha256[:16]}", f"group {media.source.row.group}")
    for source, group in packed.groups.items():
        join(f"source {source}", f"group {group}")
    for key, cluster in clusters.items():
        join(f"source {key[:16]}", f"cluster {cluster}")

    settled: dict[str, set[str]] = {}
    for source, split in packed.sources.items():
        settled.setdefault(root(f"source {source}"), set()).add(split)
    # named by the user's groups or the files' content, so that the split is the same wherever the files lie
    names: dict[str, str] = {}
    for media in {clip.media.sha256: clip.media for clip in plan.left()}.values():
        place, name = root(f"source {media.sha256[:16]}"), media.source.row.group or media.sha256
        names[place] = min(name, names.get(place, name))
    fresh = {name for place, name in names.items() if place not in settled}
    held = held_out(fresh, config.validation_fraction, at_least_one=not packed.sources)
    for media in plan.media:
        place = root(f"source {media.sha256[:16]}")
        splits = settled.get(place, {"validation" if names.get(place) in held else "train"})
        if (own := packed.sources.get(media.sha256[:16])) is not None:
            splits = {own}
        if len(splits) > 1:
            why = "is like sources in train and like others in validation, so it fits in neither"
            plan.give(media.clips, Fate(kind="duplicate", reason=why, stage="dedupe"))
        plan.splits[media.sha256] = min(splits)


def quarantine(plan: Plan, rows: Rows, stage: str) -> None:
    """Quarantine the clips that a stage could do nothing with."""
    for clip in plan.left():
        if clip.key in rows and rows[clip.key]["reason"]:
            plan.clip_fates[clip.key] = Fate(kind="quarantined", reason=rows[clip.key]["reason"], stage=stage)


def finish(plan: Plan) -> None:
    """Every clip that has no other fate is packed; a source is what most befell its clips, packed if any of them is."""
    plan.give(plan.clips, PACKED)
    for media in plan.media:
        fates = [plan.clip_fates[clip.key] for clip in media.clips]
        kinds = Counter(fate.kind for fate in fates)
        if kinds["packed"]:
            plan.source_fates[media.source.name] = PACKED
            continue
        kind = max(KINDS, key=lambda kind: kinds[kind])
        example = next(fate for fate in fates if fate.kind == kind)
        reason = example.reason
        if len(fates) > 1:
            others = f", {len(fates) - kinds[kind]} otherwise" if kinds[kind] < len(fates) else ""
            reason = f"{kinds[kind]} of its {len(fates)} clips are {kind}{others}; the first: {reason}"
        plan.source_fates[media.source.name] = Fate(kind=kind, reason=reason, stage=example.stage)


def cropped(row: Row, media: Media, config: DataConfig) -> tuple[int, int] | None:
    """Height and width in square pixels of what is left of a clip's picture without bars; None if there are none."""
    box = crop_box(row, media, config)
    return None if box is None else (box.height, int(box.width * media.probed.facts.sar))


def crop_box(row: Row, media: Media, config: DataConfig) -> Box | None:
    """What is left of a clip's upright picture without bars, in its own pixels; None if there are no bars."""
    if not config.pack.crop or media.still or row["crop"] is None:
        return None
    top, left, height, width = row["crop"]
    box = Box(top=top, left=left, height=height, width=width)
    whole = media.probed.row["height"], media.probed.row["width"]
    return None if (box.height, box.width) == whole else box


def meta(clip: Clip, scores: Row, captions: list[str], config: DataConfig, config_hash: str) -> Row:
    """Content of KEY.json. What is not known is left out. config_hash: that of the settings, which takes a while."""
    media = clip.media
    row, facts = media.source.row, media.probed.row
    source = {
        "id": media.source.name,
        "sha256": media.sha256,
        "frames_hash": facts["frames_hash"],
        "licence": config.licence,
    }
    size = clip_size(media, cropped(scores, media, config), config)
    box = crop_box(scores, media, config)
    assert size is not None
    measured = {name: scores[name] for name in SCORES if scores[name] is not None}
    optional = {
        "captions": captions,
        "label": row.label,
        "group": row.group,
        "extra": row.extra,
        "crop": box and [box.top, box.left, box.height, box.width],
        "phash": [f"{value:016x}" for value in scores["phash"]],
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "source": {name: value for name, value in source.items() if value is not None},
        "start_pts": clip.start_pts,
        "end_pts": clip.end_pts,
        "time_base": facts["time_base"],
        "frames": clip.frames,
        "fps": float(media.fps),
        "height": size[0],
        "width": size[1],
        "sar": facts["sar"],
        "rotation": facts["rotation"],
        "scores": {**measured, "version": SCORER_VERSION},
        "config_hash": config_hash,
        **{name: value for name, value in optional.items() if value is not None and value not in ([], {})},
    }
