"""Where one shot ends and the next begins: hard cuts, fades and dissolves, by how small pictures change.

A cut is a change of structure and colour that exceeds, by a margin, every change near it, small movements allowed for,
and that stays: after a flash the picture is again like the one before it. A fade passes through a blank picture, black
or white. In the middle of a dissolve the picture is close to the mean of the one well before and the one well after it,
which are unlike each other, and the fine contrast of both is half lost.

Letters: T frames; 18 x 32 is the size of a luma picture, 3 x 4 the number of patches that it is divided into.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SIZE = (36, 64)
"""Height and width of the frames that `find_transitions` takes."""
CUT = 0.3
"""How much more than any change near it a cut changes, as `_unlike` measures it."""
NEAR = 4
"""Frames before and after a cut that are looked at for other changes."""
FLASH = 2
"""A disturbance of so many frames is no cut."""
SHIFT = 2
"""Pixels (of 18 x 32) that a patch may have moved, each way."""
SPANS = (12, 20, 32, 44)
"""Frames from a picture before to a picture after a dissolve, one of these."""
DISSOLVE = 0.6
"""How unlike each other these two must be."""
CHUNK, MARGIN = 256, 32
"""Frames that are worked on at once, and frames around them that are looked at too."""


@dataclass(frozen=True, slots=True)
class Transition:
    """Frames first .. last - 1 belong to no shot. A hard cut has first == last: the first frame of the new shot."""

    kind: str
    """cut, fade or dissolve."""
    first: int
    last: int


def shots_of(transitions: list[Transition], frames: int) -> list[tuple[int, int]]:
    """What the transitions leave of a video of `frames` frames: half-open intervals of frame numbers."""
    shots, start = [], 0
    for one in sorted(transitions, key=lambda one: one.first):
        shots.append((start, one.first))
        start = max(start, one.last)
    return [(first, last) for first, last in [*shots, (start, frames)] if first < last]


def find_transitions(frames: Iterable[np.ndarray]) -> list[Transition]:
    """All transitions of a video, in order; none overlaps another.

    frames: uint8 RGB (36, 64, 3), every frame of the video. They are taken a chunk at a time; three floats of each are
    kept to the end.
    """
    cuts, middles, kept = [], [], []
    for rgb, offset, core in _chunks(frames):
        luma, tint = _look(rgb)
        jump = _jumps(luma, tint)
        is_cut = jump - _near(jump) > CUT
        cuts += [offset + int(t) for t in np.flatnonzero(is_cut) if t in core]
        middles += [(offset + t, offset + a, offset + b, off) for t, a, b, off in _mixed(luma, tint, is_cut) if t in core]
        kept.append(np.stack([jump, *_blankness(luma)])[:, core.start : core.stop])
    if not kept:
        return []
    jump, black, white = np.concatenate(kept, axis=1)
    fades = _fades(black, jump) + _fades(white, jump)
    found = _apart(fades, [])
    found = _apart(_dissolves(middles), found)
    found = _apart([Transition("cut", t, t) for t in cuts], found)
    return sorted(found, key=lambda one: one.first)


def _apart(new: list[Transition], taken: list[Transition]) -> list[Transition]:
    """`taken`, and of `new` what does not touch it."""
    for one in new:
        if all(one.first > other.last or one.last < other.first for other in taken):
            taken = [*taken, one]
    return taken


def _chunks(frames: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int, range]]:
    """(frames with margins, number of the first of them, positions among them that are this chunk's own)."""
    held: list[np.ndarray] = []
    offset = own = 0
    for frame in frames:
        held.append(frame)
        if len(held) == own + CHUNK + MARGIN:
            yield np.stack(held), offset, range(own, own + CHUNK)
            drop = own + CHUNK - MARGIN
            held, offset, own = held[drop:], offset + drop, MARGIN
    if len(held) > own:
        yield np.stack(held), offset, range(own, len(held))


def _look(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T, 36, 64, 3) -> luma (T, 18, 32) in [0, 255], and colour without brightness (T, 3, 4, 2), about -4 to 4."""
    quads = rgb.astype(np.float32).reshape(len(rgb), 18, 2, 32, 2, 3)
    small = quads.sum((2, 4)) / 4
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    red, green, blue = (_patch_means(small[..., i]) for i in range(3))
    luma = small @ weights
    tint = np.stack([red - green, blue - green], axis=-1) * 4 / (_patch_means(luma)[..., None] + 32)
    return luma, tint


_ROWS, _COLUMNS = np.kron(np.eye(3), np.full((1, 6), 1 / 6)).astype(np.float32), np.kron(np.eye(4), np.full((8, 1), 1 / 8)).astype(np.float32)


def _patch_means(picture: np.ndarray) -> np.ndarray:
    """(T, 18, 32) -> (T, 3, 4)."""
    return _ROWS @ (picture @ _COLUMNS)


def _unlike(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """How different pictures are, pair by pair: (T,), 0 for the same, about 1 for pictures that have nothing in common.

    Structure is compared patch by patch as the structural similarity index does (Wang et al. 2004, without its term for
    brightness), each patch where it fits best; colour where it stands.
    """
    (luma_a, tint_a), (luma_b, tint_b) = a, b
    height, width = luma_a.shape[1:]
    mean_a = _patch_means(luma_a)
    variance_a = _patch_means(luma_a**2) - mean_a**2
    padded, best = np.pad(luma_b, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), "edge"), np.full(mean_a.shape, -1, np.float32)
    for y in range(2 * SHIFT + 1):
        for x in range(2 * SHIFT + 1):
            moved = np.ascontiguousarray(padded[:, y : y + height, x : x + width])
            mean_b = _patch_means(moved)
            variance_b = _patch_means(moved**2) - mean_b**2
            together = _patch_means(luma_a * moved) - mean_a * mean_b
            np.maximum(best, (2 * together + 30) / (variance_a + variance_b + 30), out=best)
    return 1 - best.mean((1, 2)) + np.abs(tint_a - tint_b).mean((1, 2, 3))


def _jumps(luma: np.ndarray, tint: np.ndarray) -> np.ndarray:
    """Change from frame t - 1 to t that lasts: the least over all pairs up to FLASH + 1 apart that span it. (T,)"""
    jumps = np.full(len(luma), np.inf, np.float32)
    jumps[:1] = 0
    for apart in range(1, min(FLASH + 2, len(luma))):
        change = _unlike((luma[:-apart], tint[:-apart]), (luma[apart:], tint[apart:]))
        for t in range(1, apart + 1):
            own = jumps[t : t + len(change)]
            np.minimum(own, change, out=own)
    return jumps


def _near(jumps: np.ndarray) -> np.ndarray:
    """The largest jump in the NEAR frames before and after each. (T,)"""
    padded = np.pad(jumps, NEAR)
    return np.max([padded[i : i + len(jumps)] for i in range(2 * NEAR + 1) if i != NEAR], axis=0)


# ---------------------------------------------------------------------------------------------------------- gradual


def _mixed(luma: np.ndarray, tint: np.ndarray, is_cut: np.ndarray) -> list[tuple[int, int, int, float]]:
    """Frames that look like the middle of a dissolve: (frame, first and last of the dissolve, how far from the mean)."""
    hits = []
    fine = (np.diff(luma, axis=1) ** 2).mean((1, 2)) + (np.diff(luma, axis=2) ** 2).mean((1, 2))
    cuts = np.cumsum(is_cut)
    for span in (span for span in SPANS if span < len(luma)):
        a, middle, b = luma[:-span], luma[span // 2 : -span // 2], luma[span:]
        away = ((b - a) ** 2).mean((1, 2)) + 4
        off = ((middle - (a + b) / 2) ** 2).mean((1, 2)) / away
        dip = fine[span // 2 : -span // 2] / ((fine[:-span] + fine[span:]) / 2 + 2)
        at = np.flatnonzero((off < 0.25) & (dip < 0.7) & (cuts[span:] == cuts[:-span]))
        if len(at) == 0:
            continue
        at = at[_unlike((luma[at], tint[at]), (luma[at + span], tint[at + span])) > DISSOLVE]
        for t in at.tolist():
            stretch = luma[t : t + span + 1].reshape(span + 1, -1)
            way = stretch[-1] - stretch[0]
            part = (stretch - stretch[0]) @ way / (way @ way)  # from 0 to 1
            if np.diff(part).max() < 0.35 and 0.2 < part[span // 2] < 0.8:
                quarter, rest = np.argmax(part > 0.25), np.argmax(part > 0.75)
                length = max(2 * (rest - quarter), 2)
                middle = t + (quarter + rest) // 2
                hits.append((t + span // 2, max(t, int(middle - length // 2)), min(t + span, int(middle + length // 2 + 1)), float(off[t])))
    return hits


def _dissolves(middles: list[tuple[int, int, int, float]]) -> list[Transition]:
    """One transition of all hits that overlap, with the limits of the best of them."""
    found: list[Transition] = []
    for _, first, last, _ in sorted(middles, key=lambda hit: hit[3]):
        found = _apart([Transition("dissolve", first, last)], found)
    return found


def _blankness(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each frame's centre is from plain black, and from plain white: (T,) each, in levels."""
    centre = luma[:, 3:15, 4:28]
    contrast, mean = centre.std((1, 2)), centre.mean((1, 2))
    return contrast + mean, contrast + 255 - mean


def _fades(blankness: np.ndarray, jump: np.ndarray) -> list[Transition]:
    """Blank stretches, with the ramps that lead into them and out of them."""
    count, found = len(blankness), []
    blank = np.flatnonzero(blankness < 20)
    for run in np.split(blank, np.flatnonzero(np.diff(blank) > 1) + 1):
        if len(run) == 0:
            continue
        first = run[0] - _ramp(blankness[run[0] :: -1])
        last = run[-1] + _ramp(blankness[run[-1] :]) + 1
        if last - first <= FLASH and jump[first] < CUT:
            continue
        found.append(Transition("fade", int(first), int(last)))
    return found


def _ramp(level: np.ndarray) -> int:
    """Frames after the first until the level no longer rises."""
    n = 0
    while n + 2 < len(level) and n < 60:
        slope = (level[n] - level[0]) / n if n else 0
        rise = (level[n + 2] - level[n]) / 2
        if rise < max(1, 0.3 * slope) or level[n+1]-level[n] > max(60,4*slope):
            break
        n += 1
    return n
