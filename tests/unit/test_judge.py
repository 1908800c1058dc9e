"""The judge learns shapes and motions; distances and PSNR equal their definitions."""

import numpy as np
import pytest
import torch

from sora_lite.evaluation.judge import accuracy, nearest_distances, predict, psnr_db, train_judge


def toy_clips(count: int, seed: int, side: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bars (upright: 0, lying: 1) that move left (0) or right (1) -> clips, shapes, motions."""
    draws = np.random.default_rng(seed)
    shape, motion = draws.integers(0, 2, (2, count))
    clips = np.zeros((count, 9, side, side, 3), np.uint8)
    unit = side // 32
    for i in range(count):
        y, x = draws.integers(12, 20, 2)
        tall, wide = (7, 3) if shape[i] == 0 else (3, 7)
        for t in range(9):
            cx = x + (t - 4) * (1 if motion[i] else -1)
            clips[i, t, (y - tall) * unit : (y + tall) * unit, (cx - wide) * unit : (cx + wide) * unit] = 220
    return clips, shape, motion


def test_judge_learns_shape_and_motion() -> None:
    clips, shape, motion = toy_clips(128, seed=0)
    unseen, unseen_shape, unseen_motion = toy_clips(64, seed=1)
    for targets, truth in ((shape, unseen_shape), (motion, unseen_motion)):
        judge = train_judge(clips, targets, 2, steps=40, batch=32, seed=0, progress=False)
        assert accuracy(judge, unseen, truth) >= 0.95
        backwards = predict(judge, unseen[:, ::-1].copy()).argmax(1)
        if targets is motion:
            assert (backwards == 1 - truth).mean() >= 0.95


def test_same_seed_same_judge_and_global_generator_untouched() -> None:
    clips, shape, _ = toy_clips(24, seed=0)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = (
        predict(train_judge(clips, shape, 2, steps=3, batch=16, seed=seed, progress=False), clips) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(one.sum(1), 1, rtol=1e-5)


def test_any_size_and_few_frames_are_judged() -> None:
    clips, shape, _ = toy_clips(16, seed=0, side=64)
    judge = train_judge(torch.from_numpy(clips), torch.from_numpy(shape), 2, steps=2, batch=24, progress=False)
    assert predict(judge, clips).shape == (16, 2)
    assert predict(judge, clips[:, :1], batch=5).shape == (16, 2)


@pytest.mark.parametrize("targets", [[0, 1], [0, 1, 2], [0, 1, -1]])
def test_wrong_targets_are_refused(targets: list[int]) -> None:
    with pytest.raises(ValueError, match="targets"):
        train_judge(np.zeros((3, 2, 32, 32, 3), np.uint8), np.array(targets), 2, steps=1, progress=False)


@pytest.mark.parametrize("clips", [np.zeros((3, 3, 2, 32, 32), np.uint8), np.zeros((3, 2, 32, 32, 3), np.float32)])
def test_wrong_clips_are_refused(clips: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        psnr_db(clips, clips)


def test_nearest_distances_against_brute_force() -> None:
    draws = np.random.default_rng(0)
    others = draws.integers(0, 256, (13, 3, 8, 8, 3), dtype=np.uint8)
    clips = np.concatenate([draws.integers(0, 256, (4, 3, 8, 8, 3), dtype=np.uint8), others[11:12]])
    found = nearest_distances(clips, others, batch=5)
    difference = (clips[:, None].astype(float) - others[None]) / 255
    table = np.sqrt(np.square(difference).mean((2, 3, 4, 5)))
    np.testing.assert_array_equal(found.index, table.argmin(1))
    np.testing.assert_allclose(found.distance, table.min(1), rtol=1e-5)
    assert found.index[4] == 11 and found.distance[4] == 0


def test_psnr() -> None:
    a = np.full((3, 2, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 16
    b[2, 0, 0, 0, 0] += 96
    expected = [np.inf, 10 * np.log10(255**2 / 16**2), 10 * np.log10(255**2 / 96)]
    np.testing.assert_allclose(psnr_db(a, b), expected, rtol=1e-6)
