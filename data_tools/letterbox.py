"""The dark bars that a picture was put between: letterbox, pillarbox, or both."""

from math import ceil

import numpy as np

from sora_lite.data.video import Box

SMALLEST = 64
"""Pixels of a side below which nothing is taken for a bar."""


def crop_box(luma: np.ndarray, upright: tuple[int, int]) -> Box:
    """What remains of the upright (H, W) picture without the dark bars at its sides, from luma uint8 (N, h, w).

    A bar is dark, uniform, the same in all frames, at least 2 % of the side, and ends in a straight sharp edge that the
    picture reaches along its length in a third of the frames. Where that shows on one side only, the other side has an
    equal bar if it is dark so far (in a night scene nobody can see where it ends), and else the bar must be at most a
    quarter. Bars all around must be pairs of equals. Rounded inwards: no line of a bar remains.
    """
    height, width = luma.shape[1:]
    across = luma.transpose(0, 2, 1)
    rows, columns = _bars(luma), _bars(across)
    if not any(rows + columns):
        # bars all around hide the ends of each other's edges
        (top, bottom), (left, right) = _dark_rows(luma), _dark_rows(across)
        if top + bottom < height and left + right < width:
            rows, columns = _bars(luma[:, :, left : width - right]), _bars(across[:, :, top : height - bottom])
        if not all(rows + columns) or abs(rows[0] - rows[1]) > 2 or abs(columns[0] - columns[1]) > 2:
            rows = columns = 0, 0
    top, bottom = (_to_cut(one, upright[0] / height) for one in rows)
    left, right = (_to_cut(one, upright[1] / width) for one in columns)
    return Box(top=top, left=left, height=upright[0] - top - bottom, width=upright[1] - left - right)


def _to_cut(rows: int, cell: float) -> int:
    """Pixels for rows of `cell` pixels: half a row more, for a scaler's blur, and even, as chroma planes need it."""
    return 2 * ceil((rows + 0.5) * cell / 2) if rows else 0


def _bars(luma: np.ndarray) -> tuple[int, int]:
    """How many rows of (N, rows, columns) bars take in front and behind, each with the row in which it ends."""
    rows = luma.shape[1]
    dark, dark_behind = _dark_rows(luma)
    if dark + dark_behind >= rows:
        return 0, 0
    bar, bar_behind = _bar(luma, dark), _bar(luma[:, ::-1], dark_behind)
    if bar and not bar_behind and dark_behind >= dark - 1:
        bar_behind = bar
    elif bar_behind and not bar and dark >= dark_behind - 1:
        bar = bar_behind
    most = 0.8 if bar and bar_behind else 0.25
    return (bar, bar_behind) if bar + bar_behind <= most * rows else (0, 0)


def _dark_rows(luma: np.ndarray) -> tuple[int, int]:
    """How many of the first and of the last rows are dark, and of one even level in all frames."""
    counts = []
    for view in (luma, luma[:, ::-1]):
        level = round(float(np.median(view[:, 0])))
        count = 0
        # compression spoils some pixels of a bar beside a bright edge
        while level <= 40 and count < view.shape[1] and _part_away(view[:, count], level, 10) <= 0.02:
            count += 1
        counts.append(count)
    return counts[0], counts[1]


def _bar(luma: np.ndarray, dark: int) -> int:
    """Rows up to the end of a bar of `dark` rows, with that in which it ends; 0 = it does not end as a bar does."""
    rows, columns = luma.shape[1:]
    if dark == 0 or dark + 1 < 0.02 * rows or rows < SMALLEST:
        return 0
    level, tenth = round(float(np.median(luma[:, 0]))), max(columns // 10, 1)
    for end in range(dark, min(dark + 2, rows - 1)):
        reached = [
            _part_away(row, level, 16) > 0.6
            and _part_away(row[:tenth], level, 16) > 0.25
            and _part_away(row[-tenth:], level, 16) > 0.25
            for row in luma[:, end]
        ]
        if np.mean(reached) > 0.33:
            return end + 1
    return 0


def _part_away(luma: np.ndarray, level: int, tolerance: int) -> float:
    return float((np.abs(luma.astype(np.int16) - level) > tolerance).mean())
