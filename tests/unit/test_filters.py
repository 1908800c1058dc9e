"""Which clips a rule leaves out, and the words for it."""

import numpy as np
import pytest

from data_tools.config import FilterRule, Score
from data_tools.filters import apply, thresholds
from sora_lite.errors import UserError

SCORES = {"motion": np.array([0.02, 0.1, 0.5]), "sharpness": np.array([1.0, 3.0, 2.0])}


def test_ends_are_kept_and_the_first_broken_rule_is_named() -> None:
    rules = [FilterRule(score=Score.motion, min=0.1), FilterRule(score=Score.sharpness, max=1.5, min=1.0)]
    assert apply(SCORES, rules) == ["motion 0.02 below 0.1", "sharpness 3 above 1.5", "sharpness 2 above 1.5"]
    assert apply(SCORES, rules[:1])[1:] == ["", ""]
    assert apply(SCORES, []) == ["", "", ""]


def test_percentiles_are_over_all_clips() -> None:
    scores = {"sharpness": np.arange(101.0)}
    rules = [FilterRule(score=Score.sharpness, min_percentile=5, max_percentile=97.5)]
    reasons = apply(scores, rules)
    assert [i for i, reason in enumerate(reasons) if reason] == [0, 1, 2, 3, 4, 98, 99, 100]
    assert reasons[3] == "sharpness 3 below 5 (5th percentile)"
    assert reasons[98] == "sharpness 98 above 97.5 (97.5th percentile)"


@pytest.mark.parametrize(("percentile", "words"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (11, "11th"), (22, "22nd")])
def test_percentiles_are_named_as_one_says_them(percentile: float, words: str) -> None:
    rule = FilterRule(score=Score.sharpness, min_percentile=percentile)
    assert f"({words} percentile)" in apply({"sharpness": np.arange(101.0)}, [rule])[0]


def test_the_stricter_of_two_ends_holds() -> None:
    rule = FilterRule(score=Score.motion, min=0.3, min_percentile=50, max=0.4, max_percentile=100)
    (threshold,) = thresholds(SCORES, [rule])
    assert (threshold.low, threshold.high, threshold.low_origin) == (0.3, 0.4, "")
    assert apply(SCORES, [rule]) == ["motion 0.02 below 0.3", "motion 0.1 below 0.3", "motion 0.5 above 0.4"]


def test_as_many_digits_as_it_takes_to_see_the_difference() -> None:
    scores = {"motion": np.array([0.09999999])}
    assert apply(scores, [FilterRule(score=Score.motion, min=0.1)]) == ["motion 0.09999999 below 0.1"]


def test_a_score_that_was_not_measured_never_passes() -> None:
    rule = FilterRule(score=Score.text_ratio, max=0.1)
    with pytest.raises(UserError, match=r"text_ratio was not measured of 1 of 2 clips; set score\.text=true"):
        apply({"text_ratio": np.array([0.0, np.nan])}, [rule])
    with pytest.raises(UserError, match=r"any clip; set score\.aesthetic=FOLDER"):
        thresholds(SCORES, [FilterRule(score=Score.aesthetic, min=5)])
    with pytest.raises(UserError, match="run `sora-data score` again"):
        apply({"motion": np.array([np.nan])}, [FilterRule(score=Score.motion, min=0)])


def test_no_clips_are_no_fault() -> None:
    assert apply({"motion": np.zeros(0)}, [FilterRule(score=Score.motion, min_percentile=5)]) == []
