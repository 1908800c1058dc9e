"""Shots in made pictures: what must be found at which frame, and what is no transition."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data_tools import transnet
from data_tools.shots import Transition, find_transitions, shots_of
from sora_lite.errors import UserError

CUT_AT = (100, 103, 255, 261, 287, 290, 480, 512, 544)
"""Some shots are of three frames only; some cuts are at the seams of the chunks that are worked on at once."""


def scene(seed: int) -> np.ndarray:
    """A picture with large and small structure: (36, 64, 3) in [0, 255]."""
    rng = np.random.default_rng(seed)
    parts = [np.kron(rng.uniform(0, 1, (36 // n, 64 // n, 3)), np.ones((n, n, 1))) for n in (12, 4, 2)]
    grown = [np.pad(part, ((0, 36 - part.shape[0]), (0, 64 - part.shape[1]), (0, 0)), "edge") for part in parts]
    return 255 * np.average(grown, axis=0, weights=(3, 2, 1))


def film(*parts: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(np.concatenate(parts), 0, 255)).astype(np.uint8)


def still(seed: int, frames: int) -> np.ndarray:
    """A scene with a little noise, as cameras have it."""
    return scene(seed) + np.random.default_rng(seed).normal(0, 2, (frames, 36, 64, 3))


def ramp(first: np.ndarray | float, last: np.ndarray | float, frames: int) -> np.ndarray:
    """Frames strictly between two pictures, or plain grey levels."""
    parts = np.linspace(0, 1, frames + 2)[1:-1, None, None, None]
    return (1 - parts) * first + parts * np.broadcast_to(last, (36, 64, 3))


def test_cuts_at_their_very_frames() -> None:
    lengths = np.diff((0, *CUT_AT, 620))
    frames = film(*(still(i, length) for i, length in enumerate(lengths)))
    assert find_transitions(iter(frames)) == [Transition("cut", t, t) for t in CUT_AT]


@pytest.mark.parametrize("frames", [0, 1, 2, 17])
def test_short_videos(frames: int) -> None:
    assert find_transitions(still(0, frames).astype(np.uint8)) == []


@pytest.mark.parametrize("at", [1, 30, 59])
def test_one_cut_anywhere(at: int) -> None:
    assert shots_of(find_transitions(film(still(0, at), still(1, 60 - at))), 60) == [(0, at), (at, 60)]


def flash(frames: np.ndarray) -> np.ndarray:
    frames[30:32] = 0.2 * frames[30:32] + 200
    return frames


def lights_out(frames: np.ndarray) -> np.ndarray:
    frames[30:32] = 0
    return frames


def brighter(frames: np.ndarray) -> np.ndarray:
    return frames * np.linspace(0.5, 1.2, len(frames))[:, None, None, None]


def flicker(frames: np.ndarray) -> np.ndarray:
    return frames * np.random.default_rng(0).uniform(0.8, 1.1, (len(frames), 1, 1, 1))


def pan(frames: np.ndarray) -> np.ndarray:
    """The camera stands, and then whips around: 6 of 64 pixels a frame."""
    speeds = np.interp(np.arange(len(frames)), [20, 24, 50, 54], [0, 6, 6, 0])
    shifts = np.cumsum(speeds).astype(int)
    return np.stack([np.roll(frame, shift, axis=1) for frame, shift in zip(frames, shifts, strict=True)])


def on_twos(frames: np.ndarray) -> np.ndarray:
    """Drawn animation: every picture is shown twice, and much moves from one to the next."""
    return np.repeat(np.stack([np.roll(frame, 2 * i, axis=0) for i, frame in enumerate(frames[::2])]), 2, axis=0)


@pytest.mark.parametrize("change", [flash, lights_out, brighter, flicker, pan, on_twos])
def test_what_is_no_transition(change) -> None:
    assert find_transitions(film(change(still(3, 80)))) == []


@pytest.mark.parametrize(("bars", "colour"), [(0, 0), (5, 0), (0, 255), (5, 255)])
@pytest.mark.parametrize(("out", "hold", "back"), [(12, 8, 12), (10, 0, 15), (15, 4, 0), (0, 4, 15)])
def test_fades(bars: int, colour: int, out: int, hold: int, back: int) -> None:
    plain = np.full((hold, 36, 64, 3), colour)
    frames = film(still(0, 50), ramp(scene(0), colour, out), plain, ramp(colour, scene(1), back), still(1, 50))
    frames[:, :bars] = frames[:, 36 - bars :] = 0
    (found,) = find_transitions(frames)
    assert found.kind == "fade"
    assert abs(found.first - 50) <= 2 and abs(found.last - (50 + out + hold + back)) <= 2


@pytest.mark.parametrize("colour", [0, 255])
def test_one_blank_frame_between_two_shots_belongs_to_neither(colour: int) -> None:
    frames = film(still(0, 40), np.full((1, 36, 64, 3), colour), still(1, 40))
    assert shots_of(find_transitions(frames), 81) == [(0, 40), (41, 81)]


@pytest.mark.parametrize("frames", [6, 12, 24, 36])
def test_dissolves(frames: int) -> None:
    (found,) = find_transitions(film(still(4, 60), ramp(scene(4), scene(5), frames), still(5, 60)))
    assert found.kind == "dissolve"
    assert abs(found.first - 60) <= 3 and abs(found.last - (60 + frames)) <= 3


def test_shots_and_transitions_share_the_frames_out() -> None:
    found = [
        Transition("fade", 0, 10),
        Transition("cut", 30, 30),
        Transition("dissolve", 50, 60),
        Transition("fade", 90, 99),
    ]
    assert shots_of(found[::-1], 99) == [(10, 30), (30, 50), (60, 90)]
    assert shots_of([], 7) == [(0, 7)]
    assert shots_of([Transition("fade", 0, 7)], 7) == []


def peak_bytes(frames: int) -> int:
    """Most memory that Python held while a film that cuts every 50 frames was looked at."""

    def camera() -> Iterator[np.ndarray]:
        for i in range(frames):
            yield scenes[i // 50 % 2].copy()

    scenes = [scene(seed).astype(np.uint8) for seed in (0, 1)]
    tracemalloc.start()
    assert len(find_transitions(camera())) == (frames - 1) // 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_video() -> None:
    assert peak_bytes(3000) - peak_bytes(1000) < 2000 * 100  # of 6,912 bytes that a frame has


def test_a_film_of_nothing_but_cuts_takes_linear_time() -> None:
    frames = np.stack([scene(seed) for seed in range(8)]).astype(np.uint8)
    every_sixth = frames[np.arange(3000) // 6 % 8]
    assert len(find_transitions(every_sixth)) == 499


# ---------------------------------------------------------------------------------------------------------- TransNet V2


def test_colours_are_counted() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 27, 48, 3), dtype=np.uint8)
    counts = transnet.histograms(torch.from_numpy(frames)).numpy()
    for i, frame in enumerate(frames):
        expected, _ = np.histogramdd(frame.reshape(-1, 3), bins=8, range=[(0, 256)] * 3)
        assert np.array_equal(counts[i].reshape(8, 8, 8), expected)


def test_weights_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "junk.pth").write_bytes(b"no weights")
    save_file({"fc1.bias": np.zeros(1024, np.float32)}, tmp_path / "some.safetensors")
    for name, reason in (("gone.pth", "no such file"), ("junk.pth", "not the"), ("some.safetensors", "Missing key")):
        with pytest.raises(UserError, match=reason):
            transnet.load(tmp_path / name)


def test_every_frame_is_looked_at_once(tmp_path: Path) -> None:
    """With weights of chance: the number of frames is no multiple of that of a window."""
    model = transnet.TransNet()
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    model = transnet.load(tmp_path / "w.safetensors")
    frames = np.random.default_rng(0).integers(0, 256, (76, 27, 48, 3), dtype=np.uint8)
    chances: list[np.ndarray] = []
    assert np.array_equal(np.stack(list(transnet.watched(frames, model, chances))), frames)
    alone = np.concatenate([frames[:1].repeat(25, 0), frames[:75]])
    with torch.inference_mode():
        first = np.stack([part.numpy() for part in model(torch.from_numpy(alone))])[:, 25:75]
    together = np.concatenate(chances, axis=1)
    assert together.shape == (2, 76) and np.allclose(together[:, :50], first)
    assert transnet.find_transitions(iter(frames[:1]), model) == transnet.find_transitions(iter([]), model) == []
