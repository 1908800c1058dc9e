"""Histograms for the page of `sora-data report`, in the units of their drawing."""

from dataclasses import dataclass

import numpy as np

from data_tools.report import counted

BARS = 72
PERCENTILES = (1, 5, 50, 95, 99)
"""Those that are marked and listed."""
WIDTH, HEIGHT = 1000.0, 150.0
"""Size of a histogram's drawing, in units of it."""


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
        lower = "…" if i == 0 and values.min() < low else figure(edges[i])
        upper = "…" if i == BARS - 1 and values.max() > high else figure(edges[i + 1])
        title = f"{lower} to {upper}: {counted(int(totals[i]), 'clip')}" + (f", {cut[i]:,} left out" if cut[i] else "")
        step = WIDTH / BARS
        bars.append(Bar(left=i * step, width=step - 1.5, kept=height - left_out, out=left_out, title=title))

    def place(value: float) -> float:
        return round(WIDTH * (min(max(value, low), high) - low) / (high - low), 1)

    marks = [
        (place(at), f"{percent(part)}: {figure(at)}") for part in PERCENTILES for at in [np.percentile(values, part)]
    ]
    return Histogram(
        bars=bars,
        ticks=[(place(tick), figure(tick)) for tick in _ticks(low, high)],
        marks=marks,
        ends=[(place(end), f"{kind} {figure(end)}") for kind, end in ends],
    )


def _ticks(low: float, high: float) -> list[float]:
    """About eight round numbers in [low, high]."""
    rough = (high - low) / 8
    power = 10 ** np.floor(np.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    numbers = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1)
    return [float(number * step) + 0.0 for number in numbers]  # no -0


def figure(value: float) -> str:
    """A number as people read it: three digits."""
    return f"{value:.3g}"


def percent(part: int) -> str:
    """Name of a percentile."""
    return "median" if part == 50 else f"{part} %"
