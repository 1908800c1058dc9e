"""Films with known transitions, cut together from real footage: what shot detection is measured with.

Every shot is a stretch of a real clip, seen through a window that moves over it (pans, zooms, a hand that shakes), with
a colour grade of its own, and often with something that is no transition: a flash, flicker, a whip pan, an explosion, a
change of exposure, a dark body that crosses the picture. Frames are uint8 RGB (T, H, W, 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.shots import Transition
from sora_lite.data.video import encode_mp4, read_frames

SHOTS = {
    "bikes.mp4": [(0, 30), (30, 76), (76, 137), (137, 187), (187, 242)],
    "bigbuckbunny.mp4": [(0, 132)],
    "carphone_pristine.mp4": [(0, 120)],
    "cityCC0.mpg": [(0, 116), (116, 190)],
    "face_noface.mov": [(0, 72), (74, 169)],
    "no_face.mp4": [(0, 95)],
    "obama_speech.mp4": [(0, 105)],
    "shot_change.mp4": [(0, 96), (96, 148)],
    "single_face.mp4": [(0, 72)],
    "small.mp4": [(0, 166)],
    "WolfgangLanger_Pexels.mp4": [(0, 236), (236, 472)],
}
"""Stretches without any transition in the real clips, half-open, found by eye."""
SIZE = (90, 160)
"""Height and width of a film."""
DISTURBANCES = ("flash", "flicker", "explosion", "exposure", "crossing", "whip", "shake")
"""What is no transition."""


@dataclass(kw_only=True)
class Film:
    """Frames and what is known about them."""

    frames: np.ndarray
    labels: list[Transition]

    def mp4(self) -> bytes:
        return encode_mp4(self.frames, Fraction(25), crf=23, preset="veryfast")


@dataclass(kw_only=True)
class Join:
    """How one shot becomes the next: `tail` frames of the old and `lead` of the new one are not themselves."""

    kind: str
    tail: int = 0
    hold: int = 0
    lead: int = 0
    colour: int = 0


@dataclass(kw_only=True)
class Score:
    """How often a detector was right. One found transition answers for one label at most."""

    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("cut", "dissolve", "fade"), 0))
    wanted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("cut", "dissolve", "fade"), 0))
    found: int = 0
    spanned: int = 0
    """Hard cuts that lie inside a shot, by even one frame."""

    def add(self, labels: list[Transition], found: list[Transition]) -> list[str]:
        """Count one film. Returns a line for each fault."""
        faults, free = [], list(found)
        for label in labels:
            hit = next((other for other in free if answers(other, label)), None)
            self.wanted[label.kind] += 1
            if hit is None:
                faults.append(f"missed {label}")
            else:
                self.right[label.kind] += 1
                free.remove(hit)
            if label.kind == "cut":
                self.spanned += not any(other.first <= label.first <= other.last for other in found)
        self.found += len(found)
        return faults + [f"false {other}" for other in free]

    def recall(self, kind: str) -> float:
        return self.right[kind] / max(1, self.wanted[kind])

    @property
    def precision(self) -> float:
        return sum(self.right.values()) / max(1, self.found)


def answers(found: Transition, label: Transition) -> bool:
    """A hard cut is found at its very frame; what is gradual overlaps, and is not much longer than it is."""
    if label.kind == "cut":
        return found.first == found.last == label.first
    overlaps = found.first <= label.last and found.last >= label.first
    return overlaps and found.last - found.first <= 2 * (label.last - label.first) + 10


def films(paths: list[Path], *, cuts: int, dissolves: int, fades: int, seed: int, per_film: int = 10) -> Iterator[Film]:
    """Films of `per_film` transitions each, `cuts` + `dissolves` + `fades` in all, from the clips at `paths`."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(["cut"] * cuts + ["dissolve"] * dissolves + ["fade"] * fades)
    for start in range(0, len(kinds), per_film):
        yield _film(_takes(paths), [_join(str(kind), rng) for kind in kinds[start : start + per_film]], rng)


def calm(paths: list[Path], *, disturbance: str | None, shots: int, seed: int) -> Iterator[Film]:
    """Films of one shot each with one kind of disturbance: whatever is found in them is false."""
    rng = np.random.default_rng(seed)
    takes = _takes(paths)
    for _ in range(shots):
        yield Film(frames=_shot(takes[rng.integers(len(takes))], 80, disturbance, rng), labels=[])


def _takes(paths: list[Path]) -> list[tuple[Path, int, int]]:
    return [(path, first, last) for path in paths for first, last in SHOTS.get(path.name, [])]


def _join(kind: str, rng: np.random.Generator) -> Join:
    if kind == "cut":
        return Join(kind=kind)
    if kind == "dissolve":
        length = int(rng.integers(6, 36))
        return Join(kind=kind, tail=length, lead=length)
    tail, lead = (int(length) for length in rng.integers(5, 21, 2))
    one_way = int(rng.integers(4))  # 0: only out, 1: only in, else both
    tail, lead = (tail if one_way != 1 else 0), (lead if one_way != 0 else 0)
    hold = int(rng.choice([0, 1, 5, 12] if one_way > 1 else [1, 5, 12]))
    return Join(kind=kind, tail=tail, hold=hold, lead=lead, colour=int(rng.choice([0, 0, 255])))


def _film(takes: list[tuple[Path, int, int]], joins: list[Join], rng: np.random.Generator) -> Film:
    take, frames, labels = None, [], []
    for before, after in zip([None, *joins], [*joins, None], strict=True):
        others = [other for other in takes if other != take]
        take = others[rng.integers(len(others))]
        length = int(rng.integers(12, 60)) + (before.lead if before else 0) + (after.tail if after else 0)
        disturbance = str(rng.choice(DISTURBANCES)) if rng.random() < 0.3 else None
        shot = list(_shot(take, length, disturbance, rng))
        if before is None:
            frames = shot
        else:
            labels.append(_add(frames, shot, before))
    return Film(frames=np.stack(frames), labels=labels)


def _add(frames: list[np.ndarray], shot: list[np.ndarray], join: Join) -> Transition:
    """Append a shot to the frames so far. Returns what that makes."""
    first = len(frames) - join.tail
    if join.kind == "dissolve":
        for i in range(join.lead):
            frames[first + i] = _mix(frames[first + i], shot[i], (i + 1) / (join.lead + 1))
        frames += shot[join.lead :]
        return Transition(join.kind, first, first + join.lead)
    plain = np.full_like(shot[0], join.colour)
    for i in range(join.tail):
        frames[first + i] = _mix(frames[first + i], plain, (i + 1) / (join.tail + 1))
    for i in range(join.lead):
        shot[i] = _mix(plain, shot[i], (i + 1) / (join.lead + 1))
    frames += [plain] * join.hold
    last = len(frames) + join.lead
    frames += shot
    return Transition(join.kind, first, last)


def _mix(old: np.ndarray, new: np.ndarray, part: float) -> np.ndarray:
    return np.rint(old * (1 - part) + new * part).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------- one shot


@cache
def _footage(path: Path) -> np.ndarray:
    """All frames of a clip, 144 pixels high."""
    height, width = next(read_frames(path))[1].shape[:2]
    size = (144, round(144 * width / height))
    return np.stack([frame for _, frame in read_frames(path, size=size)])


def _shot(take: tuple[Path, int, int], length: int, disturbance: str | None, rng: np.random.Generator) -> np.ndarray:
    """`length` frames of a take, at another speed, through a moving window, mirrored and graded by chance."""
    path, first, last = take
    footage = _footage(path)[first:last]
    times = np.floor(rng.integers(len(footage)) + np.arange(length) * rng.choice([0.5, 1, 1, 1, 2])).astype(int)
    there_and_back = np.concatenate([np.arange(len(footage)), np.arange(len(footage) - 2, 0, -1)])
    windows = _windows(footage.shape[1:3], length, disturbance, rng)
    gain, gamma = rng.uniform(0.75, 1.2) * rng.uniform(0.92, 1.08, 3), rng.uniform(0.8, 1.25)
    curve = 255 * np.clip(gain * (np.arange(256)[:, None] / 255) ** gamma, 0, 1)  # 256 3
    mirrored = bool(rng.integers(2))
    frames = np.empty((length, *SIZE, 3))
    for i, time in enumerate(times):
        picture = Image.fromarray(footage[there_and_back[time % len(there_and_back)]])
        seen = np.asarray(picture.resize(SIZE[::-1], Image.Resampling.BILINEAR, box=tuple(windows[i])))
        frames[i] = curve[seen[:, ::-1] if mirrored else seen, [0, 1, 2]]
    return np.rint(np.clip(_disturb(frames, disturbance, rng), 0, 255)).astype(np.uint8)


def _windows(size: tuple[int, int], length: int, disturbance: str | None, rng: np.random.Generator) -> np.ndarray:
    """Boxes (left, top, right, bottom) in pixels of a picture of `size`: (length, 4). They drift slowly, as a rule."""
    height, width = size
    aspect = min(height / SIZE[0], width / SIZE[1]) * np.array(SIZE)  # the largest window of a film's shape
    scale = np.linspace(*rng.uniform(0.5, 0.95, 2), length) if disturbance != "whip" else np.full(length, 0.5)
    path = np.linspace(*rng.uniform(0, 1, (2, 2)), length)  # T 2: place of the window in the room that it has
    if disturbance == "whip":
        start, lasts = int(length * rng.uniform(0.2, 0.6)), int(rng.integers(4, 10))
        x = np.clip((np.arange(length) - start) / lasts, 0, 1)
        path = np.stack([np.full(length, 0.5), x if rng.integers(2) else 1 - x], axis=1)
    sway = rng.normal(0, 0.04 if disturbance == "shake" else 0.003, (length, 2))
    box = aspect * scale[:, None]
    corner = np.clip((path + sway), 0, 1) * (np.array(size) - box)
    return np.stack([corner[:, 1], corner[:, 0], corner[:, 1] + box[:, 1], corner[:, 0] + box[:, 0]], axis=1)


def _disturb(frames: np.ndarray, disturbance: str | None, rng: np.random.Generator) -> np.ndarray:
    """Add what happens inside a shot, somewhere in its middle. frames: (T, H, W, 3) in [0, 255]."""
    count = len(frames)
    start = int(count * rng.uniform(0.25, 0.6))
    since = np.arange(count)[:, None, None, None] - start
    y, x = np.mgrid[: SIZE[0], : SIZE[1], :1][:2]
    match disturbance:
        case "flash":
            lit = (since >= 0) & (since < rng.integers(1, 3))
            return frames + lit * rng.uniform(0.4, 1.0) * (255 - frames)
        case "flicker":
            return frames * (1 + rng.normal(0, 0.08, count)[:, None, None, None])
        case "explosion":
            fire = np.where(since >= 0, np.exp(-np.maximum(since, 0) / rng.uniform(3, 8)), 0)
            radius = 10 + 8.0 * np.maximum(since, 0)
            ball = np.exp(-((y - SIZE[0] / 2) ** 2 + (x - SIZE[1] * rng.uniform(0.2, 0.8)) ** 2) / radius**2)
            return frames * (1 + 0.5 * fire) + fire * ball * np.array([255, 190, 90])
        case "exposure":
            return frames * rng.uniform(0.55, 1.6) ** np.clip(since / rng.integers(8, 25), 0, 1)
        case "crossing":
            left = SIZE[1] * (since / rng.integers(8, 20) * 1.6 - 0.6)
            body = (x > left) & (x < left + SIZE[1] * rng.uniform(0.2, 0.5))
            return np.where(body, frames[0, :1, :1] * 0.3 + 10 * np.sin(y / 5), frames)
    return frames
