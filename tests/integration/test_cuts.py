"""Shots in real footage: what the clips hold as they are, and films cut together from them whose cuts are known."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cuts_set
import footage
import numpy as np
import pytest

from data_tools import shots, transnet
from data_tools.digits import render
from data_tools.shots import Transition
from sora_lite.data.video import read_frames

Detect = Callable[[Iterator[np.ndarray]], list[Transition]]

REAL = {
    "bikes.mp4": [30, 76, 137, 187, 242],
    "cityCC0.mpg": [116],
    "face_noface.mov": [(72, 73)],
    "noface_face.mov": [96, (168, 169)],
    "shot_change.mp4": [96],
}
"""The cuts in the real clips, and the frames (first, last + 1) that are blank; the others are one shot each."""


@pytest.fixture(scope="module")
def real() -> list[Path]:
    return footage.clips()


def frames_of(source: Path | bytes, size: tuple[int, int]) -> Iterator[np.ndarray]:
    return (frame for _, frame in read_frames(source, size=size, draft=True))


def measure(films: Iterator[cuts_set.Film], detect: Detect, size: tuple[int, int]) -> cuts_set.Score:
    """Encode each film, look at it, and compare with what is known of it."""
    score = cuts_set.Score()
    for number, film in enumerate(films):
        for fault in score.add(film.labels, detect(frames_of(film.mp4(), size))):
            print(f"film {number}: {fault}")
    print({kind: f"{score.recall(kind):.3f}" for kind in score.wanted}, f"precision {score.precision:.3f}")
    return score


def test_the_shots_of_real_clips(real: list[Path]) -> None:
    for path in real:
        found = [(one.first, one.last) for one in shots.find_transitions(frames_of(path, shots.SIZE))]
        assert found == [at if isinstance(at, tuple) else (at, at) for at in REAL.get(path.name, [])], path.name


def test_films_with_known_transitions(real: list[Path]) -> None:
    films = cuts_set.films(real, cuts=60, dissolves=20, fades=10, seed=100)
    score = measure(films, shots.find_transitions, shots.SIZE)
    assert score.wanted == {"cut": 60, "dissolve": 20, "fade": 10}
    assert score.recall("cut") >= 0.97 and score.spanned == 0
    assert score.recall("fade") >= 0.8
    assert score.recall("dissolve") >= 0.5  # with the network 0.8
    assert score.precision >= 0.95


def test_dissolves_by_transnet(real: list[Path]) -> None:
    model = transnet.load(footage.transnet_weights())
    films = cuts_set.films(real, cuts=3, dissolves=8, fades=0, seed=101, per_film=11)
    score = measure(films, lambda frames: transnet.find_transitions(frames, model), transnet.SIZE)
    assert score.recall("dissolve") >= 0.8 and score.spanned == 0 and score.precision >= 0.9


def test_moving_digits_are_one_shot(tmp_path: Path) -> None:
    render(tmp_path, clips=60, seed=3)
    assert not any(shots.find_transitions(frames_of(path, shots.SIZE)) for path in tmp_path.glob("*.mp4"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [200, 201, 202, 203, 204])
def test_more_films(real: list[Path], seed: int) -> None:
    films = cuts_set.films(real, cuts=120, dissolves=40, fades=40, seed=seed)
    score = measure(films, shots.find_transitions, shots.SIZE)
    assert score.recall("cut") >= 0.97 and score.recall("fade") >= 0.8 and score.precision >= 0.95


@pytest.mark.slow
def test_films_by_transnet(real: list[Path]) -> None:
    model = transnet.load(footage.transnet_weights())
    films = cuts_set.films(real, cuts=60, dissolves=20, fades=10, seed=100)
    score = measure(films, lambda frames: transnet.find_transitions(frames, model), transnet.SIZE)
    assert score.recall("cut") >= 0.97 and score.recall("fade") >= 0.8 and score.precision >= 0.95
    assert score.recall("dissolve") >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("disturbance", [None, *cuts_set.DISTURBANCES])
def test_what_happens_inside_a_shot(real: list[Path], disturbance: str | None) -> None:
    films = cuts_set.calm(real, disturbance=disturbance, shots=40, seed=300)
    score = measure(films, shots.find_transitions, shots.SIZE)
    assert score.found <= (10 if disturbance == "explosion" else 4)
