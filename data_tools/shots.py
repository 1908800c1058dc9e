"""Where one shot ends and the next begins: hard cuts, fades and dissolves, by how small pictures change.

A cut is a change of structure and colour that exceeds, by a margin, every change near it, small movements allowed for,
and that stays: after a flash the picture is again like the one before it. A fade passes through a blank picture, black
or white. In the middle of a dissolve the picture is close to the mean of the one well before and the one well after it,
which are unlike each other, and the fine contrast of both is half lost.

Letters: T frames; 18 x 32 is the size of a luma picture, 3 x 4 the number of patches that it is divided into.
The numbers below were chosen on films cut together from real footage, and checked on others.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

SIZE = (36, 64)
"""Height and width in pixels at which a video is best looked at."""
CUT = 0.3
"""How much more than any change near it a cut changes, as `_unlike` measures it."""
CUT_IN_HASTE = 0.7
"""The same where shots are so short that two other cuts are near it."""
NEAR = 4
"""Frames before and after a cut that are looked at for other changes."""
FLASH, LONG_FLASH = 2, 6
"""A disturbance of so many frames is no cut; in haste neither is one of so many."""
SHIFT = 2
"""Pixels (of 18 x 32) that a patch may have moved, each way."""
SPANS = (12, 20, 32, 44)
"""Frames from a picture before to a picture after a dissolve, one of these."""
APART = 24
"""Least distance in frames between the middles of two dissolves."""
BLANK = 24
"""Levels (of 255) from black or white that still are black or white."""
NOISE = 20
"""Variance (levels squared) below which structure counts for little."""
LOGO = 12
"""Pixels (of 18 x 32) that need not be blank in a blank picture."""
RAMP = 60
"""Most frames of a fade, each way."""
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
    """All transitions of a video, in order; none touches another.

    frames: uint8 RGB (H, W, 3), every frame of the video, all of one size, at least 18 x 32. They are worked on a chunk
    at a time; five floats of each are kept to the end.
    """
    cuts: list[int] = []
    hits: list[Hit] = []
    kept: list[np.ndarray] = []
    for rgb, offset, own in _chunks(frames):
        luma, hues = _look(rgb)
        jumps = _jumps(luma, hues)
        is_cut = _cuts(luma, hues, jumps)
        cuts += [offset + t for t in np.flatnonzero(is_cut).tolist() if t in own]
        hits += [(sure, offset + t, offset + a, offset + b) for sure, t, a, b in _mixed(luma, is_cut) if t in own]
        kept.append(np.stack([jumps, *_blankness(luma, 0), *_blankness(luma, 255)])[:, own.start : own.stop])
    if not kept:
        return []
    jumps, from_black, black, from_white, white = np.concatenate(kept, axis=1)
    found = _fades(from_black, black, jumps) + _fades(from_white, white, jumps)
    found += _dissolves(hits, len(jumps)) + [Transition("cut", t, t) for t in cuts]
    return untouched(found, len(jumps))


def untouched(found: list[Transition], frames: int) -> list[Transition]:
    """In order of time, those of a video of `frames` frames that do not touch one that comes earlier in the list."""
    free, taken = [], np.zeros(frames + 1, bool)
    for one in found:
        if not taken[one.first : one.last + 1].any():
            taken[one.first : one.last + 1] = True
            free.append(one)
    return sorted(free, key=lambda one: one.first)


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
    """(T, H, W, 3) -> luma (T, 18, 32) in [0, 255], and hues (T, 3, 4, 3), which light does not change much.

    Black bars, which are not part of the picture and always the same, are left out.
    """
    lit = rgb.max((0, 3)) >= BLANK  # H W
    (top, bottom), (left, right) = _ends(lit.any(1)), _ends(lit.any(0))
    rgb = rgb[:, top:bottom, left:right]
    rows, columns = _averages(bottom - top, 18), _averages(right - left, 32).T
    red, green, blue = (rows @ (rgb[..., i].astype(np.float32) @ columns) for i in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    red, green, blue, grey = (_patch_means(plane) for plane in (red, green, blue, luma))
    shade = (grey + 16) / (grey.mean((1, 2), keepdims=True) + 16) / 8
    return luma, np.stack([(red - green) / (grey + 32), (blue - green) / (grey + 32), shade], axis=-1)


def _ends(lit: np.ndarray) -> tuple[int, int]:
    """From the first to the last + 1 of what is true; everything where less than half is."""
    at = np.flatnonzero(lit)
    return (int(at[0]), int(at[-1]) + 1) if len(at) > len(lit) / 2 else (0, len(lit))


def _averages(size: int, parts: int) -> np.ndarray:
    """Matrix (parts, size) that averages `size` pixels over equal stretches."""
    ends = np.arange(1, parts + 1)[:, None] * size / parts
    pixels = np.arange(size)
    inside = np.minimum(ends, pixels + 1) - np.maximum(ends - size / parts, pixels)
    return (np.maximum(inside, 0) * parts / size).astype(np.float32)


_PATCH_ROWS, _PATCH_COLUMNS = _averages(18, 3), _averages(32, 4).T.copy()


def _patch_means(pictures: np.ndarray) -> np.ndarray:
    """(T, 18, 32) -> (T, 3, 4)."""
    return _PATCH_ROWS @ (pictures @ _PATCH_COLUMNS)


# -------------------------------------------------------------------------------------------------------------- cuts


def _unlike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How different the structure of two pictures is, (T, 18, 32) twice -> (T,): 0 for the same, 1 for unrelated ones.

    It is that of the structural similarity index (Wang et al. 2004) without its term for brightness, of every patch at
    the place where it fits best.
    """
    mean_a = _patch_means(a)
    variance_a = _patch_means(a**2) - mean_a**2
    padded = np.pad(b, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), "edge")
    likeness = np.full(mean_a.shape, -1, np.float32)
    for y, x in np.ndindex(2 * SHIFT + 1, 2 * SHIFT + 1):
        moved = np.ascontiguousarray(padded[:, y : y + a.shape[1], x : x + a.shape[2]])
        mean_b = _patch_means(moved)
        variance_b = _patch_means(moved**2) - mean_b**2
        shared = _patch_means(a * moved) - mean_a * mean_b
        np.maximum(likeness, (2 * shared + NOISE) / (variance_a + variance_b + NOISE), out=likeness)
    return 1 - likeness.mean((1, 2))


def _change(luma: np.ndarray, hues: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How much structure and colour differ between the frames numbered a and b: (n,) twice -> (n,)."""
    return _unlike(luma[a], luma[b]) + 6 * np.abs(hues[a] - hues[b]).mean((1, 2, 3))


def _jumps(luma: np.ndarray, hues: np.ndarray) -> np.ndarray:
    """(T,): change from frame t - 1 to t that lasts, the least between two frames around it at most FLASH + 1 apart."""
    jumps, t = np.full(len(luma), np.inf, np.float32), np.arange(len(luma))
    jumps[:1] = 0
    for apart in range(1, min(FLASH + 2, len(luma))):
        change = _change(luma, hues, t[:-apart], t[apart:])
        for first in range(1, apart + 1):
            own = jumps[first : first + len(change)]
            np.minimum(own, change, out=own)
    return jumps


def _cuts(luma: np.ndarray, hues: np.ndarray, jumps: np.ndarray) -> np.ndarray:
    """(T,): whether a jump exceeds all of the NEAR before and after it, or by far all but two, which are cuts too."""
    padded = np.pad(jumps, NEAR)
    near = np.stack([padded[i : i + len(jumps)] for i in range(2 * NEAR + 1) if i != NEAR])
    alone = jumps - near.max(0) > CUT
    closest, third = near[NEAR - FLASH : NEAR + FLASH].max(0), np.sort(near, axis=0)[-3]
    haste = jumps - np.maximum(closest, third) > CUT_IN_HASTE
    t = np.flatnonzero(haste & ~alone)
    for apart in range(FLASH + 2, LONG_FLASH + 2):  # what lies between two jumps may be a longer flash
        before, after = np.maximum(t - apart, 0), np.minimum(t - 1 + apart, len(luma) - 1)
        t = t[(_change(luma, hues, t - 1, after) > CUT) & (_change(luma, hues, before, t) > CUT)]
    alone[t] = True
    return alone


# ---------------------------------------------------------------------------------------------------------- dissolves


Hit = tuple[float, int, int, int]
"""How sure it is that a frame is the middle of a dissolve; that frame; first and last of the dissolve."""


def _mixed(luma: np.ndarray, is_cut: np.ndarray) -> list[Hit]:
    """Frames that look like the middle of a dissolve."""
    hits: list[Hit] = []
    rough = np.diff(luma, axis=1, append=luma[:, -1:]) ** 2 + np.diff(luma, axis=2, append=luma[:, :, -1:]) ** 2
    fine, cuts = _patch_means(rough), np.cumsum(is_cut)
    for span in (span for span in SPANS if span < len(luma)):
        half = span // 2
        before, middle, after = luma[:-span], luma[half:-half], luma[span:]
        off = ((middle - (before + after) / 2) ** 2).mean((1, 2)) / (((after - before) ** 2).mean((1, 2)) + 4)
        # what is left of the fine contrast: about half in a dissolve of unlike pictures; that of the third-best patches
        left = fine[half:-half] / ((fine[:-span] + fine[span:]) / 2 + 4)
        left = np.partition(left.reshape(len(left), -1), 8)[:, 8]
        at = np.flatnonzero((off < 0.3) & (left < 1.2) & (cuts[span:] == cuts[:-span]))
        if len(at) == 0:
            continue
        # weights by logistic regression, rounded
        scores = _unlike(before[at], after[at]) - 2.5 * off[at] - 0.4 * left[at]
        for t, score in zip(at[scores > 0].tolist(), scores[scores > 0].tolist(), strict=True):
            step, first, last = _course(luma[t : t + span + 1])
            if score > 0.6 * step:
                hits.append((score - 0.6 * step, t + half, t + first, t + last))
    return hits


def _course(luma: np.ndarray) -> tuple[float, int, int]:
    """How a stretch goes from its first picture to its last: its largest step (1: all at once), and first and last."""
    pictures = luma.reshape(len(luma), -1)
    way = pictures[-1] - pictures[0]
    part = (pictures - pictures[0]) @ way / (way @ way + 1)  # from 0 to 1
    quarter, rest = int(np.argmax(part > 0.25)), int(np.argmax(part > 0.75))  # robust where the ends are not
    middle, length = (quarter + rest) // 2, max(2 * (rest - quarter), 2)
    first, last = middle - length // 2 - 1, middle + length // 2 + 2
    return float(np.diff(part).max()), max(1, first), min(len(luma) - 1, last)


def _dissolves(hits: list[Hit], frames: int) -> list[Transition]:
    """The surest of the hits that are close together."""
    best, taken = [], np.zeros(frames, bool)
    for _, middle, first, last in sorted(hits, reverse=True):
        if not taken[middle]:
            taken[max(0, middle - APART + 1) : middle + APART] = True
            best.append(Transition("dissolve", first, last))
    return best


# -------------------------------------------------------------------------------------------------------------- fades


def _blankness(luma: np.ndarray, colour: int) -> tuple[np.ndarray, np.ndarray]:
    """(distance of each picture from plain black (0) or white (255) in levels, 1 where it is plain): (T,) each."""
    distance = np.abs(luma - colour)
    most = np.partition(distance.reshape(len(luma), -1), -LOGO)[:, -LOGO]
    return distance.mean((1, 2)) + distance.std((1, 2)), (most < BLANK).astype(np.float32)


def _fades(distance: np.ndarray, plain: np.ndarray, jumps: np.ndarray) -> list[Transition]:
    """Plain stretches, with the ramps that lead into them and out of them."""
    found = []
    edges = np.flatnonzero(np.diff(plain, prepend=0, append=0))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        first, last = start - _ramp(distance[start::-1]), end + _ramp(distance[end - 1 :])
        if last - first > FLASH or jumps[first] > 2 * CUT:
            found.append(Transition("fade", first, last))
    return found


def _ramp(distance: np.ndarray) -> int:
    """Frames after the first until the distance no longer rises as before."""
    n = 0
    while n + 3 < len(distance) and n < RAMP:
        slope = (distance[n + 1] - distance[0]) / (n + 1)
        rise = max(distance[n + 2] - distance[n + 1], (distance[n + 3] - distance[n + 1]) / 2)
        if slope < 1 or rise < 0.25 * slope:
            break
        n += 1
    return n
