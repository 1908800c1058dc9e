"""Which clips are left out for their scores, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.config import FilterRule
from sora_lite.errors import UserError

_TURNED_ON_BY = {"text_ratio": "score.text=true", "aesthetic": "score.aesthetic=FOLDER"}


@dataclass(kw_only=True, slots=True)
class Threshold:
    """The range that one rule keeps, ends included, in units of the score."""

    score: str
    low: float = -np.inf
    high: float = np.inf
    low_origin: str = ""
    """Where `low` comes from if it was not given as a number, for example " (5th percentile)"."""
    high_origin: str = ""


def apply(scores: Mapping[str, np.ndarray], rules: Sequence[FilterRule]) -> list[str]:
    """Why each clip is left out, "" = it is kept; the first rule that it breaks is named.

    scores: name -> float (clips,). Percentiles are over these clips. Raises UserError as `thresholds` does.
    """
    reasons = [""] * len(next(iter(scores.values()), ()))
    for threshold in thresholds(scores, rules):
        values = scores[threshold.score]
        for i in np.flatnonzero((values < threshold.low) | (values > threshold.high)):
            reasons[i] = reasons[i] or _reason(threshold, float(values[i]))
    return reasons


def thresholds(scores: Mapping[str, np.ndarray], rules: Sequence[FilterRule]) -> list[Threshold]:
    """The range of each rule, in their order, with percentiles as numbers; of two lower or upper ends the stricter.

    Raises UserError for a rule on a score that was not measured (absent or NaN) of some clip.
    """
    return [_threshold(rule, scores.get(rule.score.value)) for rule in rules]


def _threshold(rule: FilterRule, values: np.ndarray | None) -> Threshold:
    name = rule.score.value
    if values is None or np.isnan(values).any():
        missing = "any clip" if values is None else f"{int(np.isnan(values).sum())} of {len(values)} clips"
        cure = f"set {_TURNED_ON_BY[name]}" if name in _TURNED_ON_BY else "run `sora-data score` again"
        raise UserError(f"filter.rules: {name} was not measured of {missing}; {cure}, or take out the rule.")
    lows, highs = [(-np.inf, "")], [(np.inf, "")]
    if rule.min is not None:
        lows.append((rule.min, ""))
    if rule.max is not None:
        highs.append((rule.max, ""))
    if rule.min_percentile is not None and len(values):
        lows.append((float(np.percentile(values, rule.min_percentile)), _nth(rule.min_percentile)))
    if rule.max_percentile is not None and len(values):
        highs.append((float(np.percentile(values, rule.max_percentile)), _nth(rule.max_percentile)))
    (low, low_origin), (high, high_origin) = max(lows), min(highs)
    return Threshold(score=name, low=low, high=high, low_origin=low_origin, high_origin=high_origin)


def _reason(threshold: Threshold, value: float) -> str:
    below = value < threshold.low
    side, end = ("below", threshold.low) if below else ("above", threshold.high)
    # as many digits as it takes to see that they differ
    for digits in range(3, 18):
        if f"{value:.{digits}g}" != f"{end:.{digits}g}":
            break
    origin = threshold.low_origin if below else threshold.high_origin
    return f"{threshold.score} {value:.{digits}g} {side} {end:.{digits}g}{origin}"


def _nth(percentile: float) -> str:
    last = int(percentile) % 10 if percentile == int(percentile) and int(percentile) % 100 not in (11, 12, 13) else 0
    return f" ({percentile:g}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(last, 'th') } percentile)"
