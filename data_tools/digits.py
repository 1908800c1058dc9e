"""The embedded demo data set: real scans of handwritten digits that move across a dark canvas, as labelled mp4 files.

The scans are the 1,797 digits of 8 x 8 pixels that scikit-learn carries (from the UCI repository: Optical Recognition
of Handwritten Digits).
"""

import json
import os
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sora_lite.data.video import encode_mp4
from sora_lite.errors import UserError

FRAMES, SIDE, FPS = 17, 32, Fraction(8)
DIGIT_SIDE = 22.0
"""Pixels that the 8 cells of a scan span on the canvas; with TRAVEL it exactly fills the canvas."""
TRAVEL = 5.0
"""Pixels from the centre at which a digit starts and ends."""
CRF = 10
"""x264's quality factor: about 43 dB, so that compression does not limit what a model can learn."""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Name of a direction -> (dy, dx)."""


@dataclass(kw_only=True, slots=True)
class Row:
    """One line of metadata.jsonl, and so one clip. `group` names the scan: no scan is in both train and validation."""

    file_name: str
    caption: str
    label: int
    group: str
    digit: str
    direction: str


def render(out: Path, clips: int = 5000, seed: int = 0) -> None:
    """Write `clips` mp4 files (17 frames of 32 x 32 at 8 fps) and `metadata.jsonl` that describes them into `out`.

    Every scan is used equally often (give or take one), each time with another direction; a file's name alone says
    what it shows, so that a call that was interrupted goes on where it stopped. metadata.jsonl is written last.
    Raises UserError if there are not so many different clips, or if `out` holds clips of another selection.
    """
    scans, labels = _load_scans()
    rows = select(labels, clips, seed)
    out.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in out.glob("*.mp4")}
    if strangers := sorted(present - {row.file_name for row in rows}):
        raise UserError(
            f"{out} already holds {strangers[0]} and {len(strangers) - 1} other clips that are not among the {clips} "
            f"of seed {seed}: name an empty folder, or ask for the clips and seed that it was made with."
        )
    missing = [row for row in rows if row.file_name not in present]
    for row in tqdm(missing, desc="rendering digits", unit="clip", mininterval=0.5):
        frames = draw(scans[int(row.group.removeprefix("scan"))], row.direction)
        _replace(out / row.file_name, encode_mp4(frames, FPS, CRF))
    lines = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    _replace(out / "metadata.jsonl", lines.encode())


def select(labels: np.ndarray, clips: int, seed: int) -> list[Row]:
    """Choose a scan and a direction for each clip: scans in a random order, round after round, directions in turn.

    labels: digit (0 to 9) of every scan. A larger number of clips begins with the rows of a smaller one.
    """
    names = list(DIRECTIONS)
    most = len(labels) * len(names)
    if not 1 <= clips <= most:
        raise UserError(f"clips={clips}: there are from 1 to {most} different clips (scans x directions).")
    order = np.random.default_rng(seed).permutation(len(labels))
    rows = []
    for i in range(clips):
        turn, place = divmod(i, len(order))
        scan, direction = int(order[place]), names[(place + turn) % len(names)]
        digit = WORDS[labels[scan]]
        rows.append(
            Row(
                file_name=f"scan{scan:04d}_{digit}_{direction}.mp4",
                caption=f"the digit {digit} moves {direction}",
                label=int(labels[scan]),
                group=f"scan{scan:04d}",
                digit=digit,
                direction=direction,
            )
        )
    return rows


def draw(scan: np.ndarray, direction: str) -> np.ndarray:
    """Draw one scan (8, 8), ink in [0, 1], on its way across the canvas -> uint8 (FRAMES, SIDE, SIDE, 3).

    The scan is enlarged and displaced in one resampling, so that sub-pixel motion costs no sharpness.
    """
    dy, dx = DIRECTIONS[direction]
    frames = []
    for offset in np.linspace(-TRAVEL, TRAVEL, FRAMES):
        ink = _cubic(offset * dy, scan.shape[0]) @ scan @ _cubic(offset * dx, scan.shape[1]).T
        frames.append(np.rint(ink.clip(0, 1) * 255).astype(np.uint8))
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


def _cubic(offset: float, cells: int) -> np.ndarray:
    """(SIDE, cells) weights that enlarge a row of cells to DIGIT_SIDE pixels, displaced from the centre by `offset`.

    Keys' cubic convolution (a = -1/2), the "bicubic" of image editors; beyond its cells a scan is blank.
    """
    pixels = np.arange(SIDE) + 0.5
    position = (pixels - SIDE / 2 - offset) * cells / DIGIT_SIDE + cells / 2 - 0.5
    d = np.abs(position[:, None] - np.arange(cells))
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))


def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans, float (N, 8, 8) in [0, 1], and their digits, int (N,)."""
    try:
        from sklearn.datasets import load_digits  # slow to import, and needed by the demo alone
    except ImportError:
        raise UserError("The demo's digits come with scikit-learn: pip install 'sora_lite[demo]'.") from None
    digits = load_digits()
    return digits.images / 16.0, digits.target


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent; an interrupted call leaves at most one `.partial` behind."""
    partial = path.with_name(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
