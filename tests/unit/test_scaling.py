"""The scaling law is found where there is one, with an irreducible loss only where there is one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_lite.errors import UserError
from sora_lite.evaluation.scaling import Curve, analyse, choose, fit, frontier, plot

FLOPS = np.geomspace(1e12, 3e14, 7)


def law(flops: np.ndarray, floor: float, exponent: float) -> np.ndarray:
    return floor + 0.5 * (flops / 1e13) ** -exponent


def curves(losses: np.ndarray) -> list[Curve]:
    """Runs whose loss was half as large again when they had taken a third of their FLOPs."""
    return [
        Curve(name=f"size_{i}", flops=np.array([int(f / 3), int(f)]), losses=np.array([1.5 * loss, loss]))
        for i, (f, loss) in enumerate(zip(FLOPS, losses, strict=True))
    ]


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("exponent", [0.05, 0.4])
def test_an_exact_law_is_found_and_goes_on(floor: float, exponent: float) -> None:
    scaling = analyse(curves(law(FLOPS, floor, exponent))[::-1])
    assert [curve.name for curve in scaling.curves] == [f"size_{i}" for i in range(7)]
    assert scaling.every.law.exponent == pytest.approx(exponent, rel=1e-3)
    assert scaling.every.law.floor == pytest.approx(floor, abs=2e-3)
    assert scaling.held_out_error == pytest.approx(0, abs=1e-4)
    following = FLOPS[-1] ** 2 / FLOPS[-2]
    assert scaling.next_flops == pytest.approx(following)
    assert scaling.next_loss == pytest.approx(float(law(following, floor, exponent)), rel=1e-3)


def test_a_run_that_goes_wrong_bends_no_law() -> None:
    losses = law(FLOPS, 0.0, 0.2)
    losses[3] *= 1.3
    assert fit(FLOPS, losses, floor=False).exponent == pytest.approx(0.2, rel=0.02)
    assert choose(FLOPS[:4], losses[:4]).law.floor == 0  # four runs support no irreducible loss
    losses[-1] *= 1.3  # at the end, where a run has most weight
    robust, squares = fit(FLOPS, losses, floor=False).exponent, -np.polyfit(np.log(FLOPS), np.log(losses), 1)[0]
    assert abs(robust - 0.2) < 0.5 * abs(squares - 0.2)


def test_the_largest_run_has_no_part_in_its_prediction() -> None:
    losses = law(FLOPS, 0.0, 0.2)
    losses[-1] *= 1.1
    scaling = analyse(curves(losses))
    assert scaling.without_largest.law.exponent == pytest.approx(0.2, rel=1e-3)
    assert scaling.held_out_error == pytest.approx(1 / 1.1 - 1, rel=1e-3)


def test_errors_cover_what_noise_does() -> None:
    """Over many sweeps with 1 % of noise, the jackknife's error is the deviation of the exponent, within a factor."""
    rng = np.random.default_rng(0)
    fits = [choose(FLOPS[:4], law(FLOPS[:4], 0, 0.2) * np.exp(0.01 * rng.standard_normal(4))) for _ in range(60)]
    deviation = np.std([one.law.exponent for one in fits])
    assert 0.5 < np.sqrt(np.mean([one.exponent_error**2 for one in fits])) / deviation < 2


def test_frontier_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(1)
    some = [Curve(name=str(i), flops=np.sort(rng.integers(1, 50, 9)), losses=rng.random(9).round(1)) for i in range(5)]
    points = {(int(f), float(v)) for curve in some for f, v in zip(curve.flops, curve.losses, strict=True)}
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    flops, losses = frontier(some)
    assert set(zip(flops.tolist(), losses.tolist(), strict=True)) == best
    assert (np.diff(flops) > 0).all() and (np.diff(losses) < 0).all()


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UserError, match="found 3; train at least 4"):
        analyse(curves(law(FLOPS, 0, 0.2))[:3])
    twice = curves(law(FLOPS, 0, 0.2))
    with pytest.raises(UserError, match="equal FLOPs"):
        analyse([*twice, twice[-1]])


def test_plot_shows_runs_and_prediction(tmp_path: Path) -> None:
    plot(analyse(curves(law(FLOPS, 0.1, 0.3))), tmp_path / "scaling.png")
    picture = np.asarray(Image.open(tmp_path / "scaling.png").convert("RGBA")).astype(int)
    assert picture[0, 0, 3] == 0  # transparent paper
    for colour in [(0x4C, 0x8D, 0xD6), (0xE0, 0x8A, 0x3C), (0x4C, 0xA6, 0x6B)]:
        assert (np.abs(picture[..., :3] - colour).max(-1) < 8).sum() > 100
