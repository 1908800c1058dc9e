"""The demo's data set: what is drawn, which clips are chosen, and that rendering goes on where it stopped."""

import json
from collections import Counter

import numpy as np
import pytest

from data_tools import digits
from sora_lite.data.video import decode_clip
from sora_lite.errors import UserError

LABELS = np.arange(1797) % 10


def centre_of_ink(frames: np.ndarray) -> np.ndarray:
    """(T, 2): mean y and x of the bright pixels in each frame."""
    ink = frames[..., 0].astype(float)
    axis = np.arange(digits.SIDE)
    return np.stack([ink.sum(2) @ axis, ink.sum(1) @ axis], axis=1) / ink.sum((1, 2))[:, None]


@pytest.mark.parametrize("direction", digits.DIRECTIONS)
def test_digit_moves_evenly_through_the_centre(direction: str) -> None:
    scan = np.zeros((8, 8))
    scan[2:6, 2:6] = 0.7
    frames = digits.draw(scan, direction)
    assert frames.shape == (digits.FRAMES, digits.SIDE, digits.SIDE, 3) and frames.dtype == np.uint8
    offsets = np.linspace(-digits.TRAVEL, digits.TRAVEL, digits.FRAMES)
    expected = (digits.SIDE - 1) / 2 + offsets[:, None] * np.array(digits.DIRECTIONS[direction])
    np.testing.assert_allclose(centre_of_ink(frames), expected, atol=0.05)


def test_digit_stays_upright_and_keeps_its_brightness() -> None:
    scan = np.zeros((8, 8))
    scan[0:4, 3] = 1.0  # a stroke in the upper half
    middle = digits.draw(scan, "right")[digits.FRAMES // 2, :, :, 0]
    assert middle[:16].sum() > 20 * middle[16:].sum()
    assert middle.max() > 230


def test_scans_and_directions_are_used_alike() -> None:
    rows = digits.select(LABELS, 5000, seed=0)
    assert len({row.file_name for row in rows}) == 5000
    assert set(Counter(row.direction for row in rows).values()) == {1250}
    assert set(Counter(row.group for row in rows).values()) == {2, 3}
    assert all(row.caption == f"the digit {digits.WORDS[row.label]} moves {row.direction}" for row in rows)
    assert digits.select(LABELS, 30, seed=0) == rows[:30]
    assert digits.select(LABELS, 30, seed=1) != rows[:30]


@pytest.mark.parametrize("clips", [0, 4 * 1797 + 1])
def test_impossible_number_of_clips(clips: int) -> None:
    with pytest.raises(UserError, match="7188"):
        digits.select(LABELS, clips, seed=0)


def test_render_resumes_and_is_deterministic(tmp_path) -> None:
    out = tmp_path / "raw"
    digits.render(out, clips=6, seed=3)
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    files = {row["file_name"]: (out / row["file_name"]).read_bytes() for row in rows}
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, "metadata.jsonl"])

    scans, labels = digits._load_scans()
    for row in rows:
        scan = int(row["group"].removeprefix("scan"))
        assert labels[scan] == row["label"]
        drawn = digits.draw(scans[scan], row["direction"])
        decoded = decode_clip(files[row["file_name"]], frames=digits.FRAMES)
        assert np.square(decoded.astype(float) - drawn).mean() < 25  # the codec costs less than 5 of 255 levels

    lost, *others = files
    kept = out / others[0]
    (out / lost).unlink()
    (out / "metadata.jsonl").unlink()
    before = kept.stat().st_mtime_ns
    digits.render(out, clips=6, seed=3)
    assert {name: (out / name).read_bytes() for name in files} == files
    assert kept.stat().st_mtime_ns == before
    assert (out / "metadata.jsonl").exists()

    with pytest.raises(UserError, match="empty folder"):
        digits.render(out, clips=2, seed=3)
