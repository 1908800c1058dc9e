"""Scaling laws: how the validation loss falls with the FLOPs of training (Hoffmann et al., arXiv 2203.15556).

Shapes: N runs, each with K validations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sora_lite.errors import UserError

LEAST_RUNS = 4
"""Two runs always lie on a power law, so three make one, and the largest is held out."""
RUNS_FOR_A_FLOOR = 5
"""Runs that a third number, the irreducible loss, needs: with fewer it fits anything."""
HUBER = 0.01
"""Residuals of the logarithm above this (1 % of the loss) count linearly, not squared: one bad run bends no line."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Curve:
    """Validation of one run. flops: int (K,), of training so far, rising; losses: float (K,)."""

    name: str
    flops: np.ndarray
    losses: np.ndarray

    def __post_init__(self) -> None:
        if self.flops.shape != self.losses.shape or self.flops.ndim != 1 or not len(self.flops):
            raise ValueError(f"{self.name}: flops {self.flops.shape} and losses {self.losses.shape}")


@dataclass(kw_only=True, slots=True, frozen=True)
class PowerLaw:
    """loss = floor + scale * (flops / unit)^-exponent. floor is the irreducible loss, 0 where there is none."""

    scale: float
    exponent: float
    floor: float
    unit: float

    def __call__(self, flops: np.ndarray | float) -> np.ndarray:
        return self.floor + self.scale * (np.asarray(flops, dtype=float) / self.unit) ** -self.exponent


def fit(flops: np.ndarray, losses: np.ndarray, *, floor: bool) -> PowerLaw:
    """The power law nearest to the logarithms of the losses under a Huber loss, with or without an irreducible loss.

    The best of several starts, since the problem with a floor is not convex. flops, losses: (N,), above 0.
    """
    from scipy.optimize import least_squares  # half a second that other users of this room need not wait for

    unit = float(np.exp(np.log(flops).mean()))
    x, y = np.log(flops / unit), np.log(losses)

    def residuals(numbers: np.ndarray) -> np.ndarray:
        scale, exponent, part = numbers if floor else (*numbers, 0.0)
        return np.log(part * losses.min() + np.exp(scale - exponent * x)) - y

    best = None
    for part in (0.001, 0.1, 0.5, 0.9) if floor else (0.0,):
        slope, level = np.polyfit(x, np.log(losses - 0.999 * part * losses.min()), 1)
        start, bounds = [level, -slope], [(-np.inf, np.inf), (-np.inf, np.inf)]
        if floor:  # as a part of the lowest loss that was seen
            start, bounds = [*start, part], [*bounds, (0.0, 0.999)]
        lower, upper = zip(*bounds, strict=True)
        found = least_squares(residuals, start, bounds=(lower, upper), loss="huber", f_scale=HUBER, xtol=1e-12)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    scale, exponent, part = best.x if floor else (*best.x, 0.0)
    return PowerLaw(scale=math.exp(scale), exponent=float(exponent), floor=float(part * losses.min()), unit=unit)


@dataclass(kw_only=True, slots=True, frozen=True)
class Fit:
    """A law and how well it holds.

    exponent_error: jackknife standard error. left_out: relative error of the prediction of a run by the law of the
    others, root mean square over the runs.
    """

    law: PowerLaw
    exponent_error: float
    left_out: float


def assess(flops: np.ndarray, losses: np.ndarray, *, floor: bool) -> Fit:
    """Fit, and fit again without each of the runs."""
    laws = [fit(np.delete(flops, i), np.delete(losses, i), floor=floor) for i in range(len(flops))]
    errors = np.array([float(law(flops[i])) / losses[i] - 1 for i, law in enumerate(laws)])
    exponents = np.array([law.exponent for law in laws])
    spread = np.square(exponents - exponents.mean()).sum()
    return Fit(
        law=fit(flops, losses, floor=floor),
        exponent_error=math.sqrt((len(laws) - 1) / len(laws) * spread),
        left_out=math.sqrt(np.square(errors).mean()),
    )


def choose(flops: np.ndarray, losses: np.ndarray) -> Fit:
    """A fit with an irreducible loss where there are runs enough for one; where they show none it comes out as 0."""
    return assess(flops, losses, floor=len(flops) >= RUNS_FOR_A_FLOOR)


def frontier(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """(flops, losses) of all validations that no other of any run beats with as little or less compute."""
    flops = np.concatenate([curve.flops for curve in curves])
    losses = np.concatenate([curve.losses for curve in curves])
    order = np.lexsort((losses, flops))
    flops, losses = flops[order], losses[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(losses)[:-1]])
    return flops[losses < before], losses[losses < before]


@dataclass(kw_only=True, slots=True, frozen=True)
class Scaling:
    """What a sweep shows. Runs stand in the order of their FLOPs.

    without_largest: the law of all runs but the last; held_out: its prediction for that one. every: the law of all
    runs; straight: the same without irreducible loss. next_flops, next_loss: the prediction of `every` for a size that
    is as much larger than the last as that than the one before.
    """

    curves: list[Curve]
    without_largest: Fit
    held_out: float
    every: Fit
    straight: Fit
    next_flops: float
    next_loss: float

    @property
    def held_out_error(self) -> float:
        """Relative error of the held-out prediction: predicted / measured - 1."""
        return self.held_out / float(self.curves[-1].losses[-1]) - 1


def analyse(curves: Sequence[Curve]) -> Scaling:
    """Fit the last validation of each run, predict the largest from the others and the next size from all.

    Raises:
        UserError: too few runs, or two of equal FLOPs at the upper end.
    """
    ordered = sorted(curves, key=lambda curve: int(curve.flops[-1]))
    if len(ordered) < LEAST_RUNS:
        raise UserError(f"runs: found {len(ordered)}; train at least {LEAST_RUNS} sizes, one of which is held out")
    flops = np.array([curve.flops[-1] for curve in ordered], dtype=float)
    losses = np.array([curve.losses[-1] for curve in ordered])
    if flops[-1] == flops[-2]:
        raise UserError(f"runs: {ordered[-2].name} and {ordered[-1].name} took equal FLOPs; leave one of them out")
    without, every = choose(flops[:-1], losses[:-1]), choose(flops, losses)
    following = float(flops[-1] ** 2 / flops[-2])
    return Scaling(
        curves=ordered,
        without_largest=without,
        held_out=float(without.law(flops[-1])),
        every=every,
        straight=assess(flops, losses, floor=False),
        next_flops=following,
        next_loss=float(every.law(following)),
    )


def plot(scaling: Scaling, out: Path) -> None:
    """Draw curves, frontier, laws and predictions as a PNG with logarithmic axes, for light and dark pages."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    grey, blue, orange, green = "#84848c", "#4c8dd6", "#e08a3c", "#4ca66b"
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    for curve in scaling.curves:
        axes.plot(curve.flops, curve.losses, color=grey, alpha=0.45, linewidth=0.9)
    axes.plot(*frontier(scaling.curves), color=green, linewidth=1.2, alpha=0.9, label="compute frontier of the curves")
    last = [(curve.flops[-1], curve.losses[-1]) for curve in scaling.curves]
    flops, losses = np.array(last).T
    span = np.geomspace(flops[0] / 1.5, scaling.next_flops * 1.3, 200)
    axes.plot(span, scaling.without_largest.law(span), "--", color=blue, linewidth=1.4, label="law of the blue runs")
    axes.plot(flops[:-1], losses[:-1], "o", color=blue, markersize=6, label="fitted runs, fully trained")
    axes.plot(flops[-1], losses[-1], "o", color=orange, markersize=8, label=f"held out: {scaling.held_out_error:+.1%}")
    axes.plot(flops[-1], scaling.held_out, "x", color=orange, markersize=9, markeredgewidth=2, label="its prediction")
    axes.plot(scaling.next_flops, scaling.next_loss, "*", color=grey, markersize=11, label="next size, predicted")
    for curve in scaling.curves:
        where = (curve.flops[-1], curve.losses[-1])
        axes.annotate(curve.name, where, xytext=(5, 5), textcoords="offset points", color=grey, size=7)
    axes.set(xscale="log", yscale="log")
    low, high = min(*losses, scaling.next_loss), losses[0]
    axes.set_ylim(low * (low / high) ** 0.15, high * (high / low) ** 0.6)
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}" if high / low < 5 else NullFormatter())
    axes.set_xlabel("FLOPs of training", color=grey)
    axes.set_ylabel("validation loss", color=grey)
    axes.tick_params(which="both", colors=grey)
    axes.grid(which="both", color=grey, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(grey)
    axes.legend(frameon=False, labelcolor=grey, fontsize=8)
    figure.savefig(out, metadata={"Software": None})
