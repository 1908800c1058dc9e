"""Scores of a clip, its crop box and its hashes, from some of its frames at low resolution.

N looked-at frames of h x w pixels, of an upright picture of H x W. Everything but `letterbox` is measured inside the
crop box. Pixels count as square.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor
from pathlib import Path

import cv2
import numpy as np

from data_tools.config import ScoreConfig
from data_tools.dedupe import SIDE, phash
from data_tools.letterbox import crop_box
from data_tools.score_models import aesthetic_model, text_detector
from sora_lite.data.video import Box

SCORER_VERSION = 1
"""Rises whenever the same clip may score differently than before."""
MEANINGS = {
    "motion": "mean length of the optical flow, in widths of the picture per second (0 to about 1; 0 = still)",
    "static_ratio": "part of the pairs of frames, one after the other, that are all but equal (0 to 1; 1 = still)",
    "sharpness": "strength of the Laplacian against that of the contrast, median (0 to about 4; 0 = blurred or flat)",
    "brightness": "mean luma, as a part of full scale (0 to 1)",
    "contrast": "standard deviation of the luma, as a part of full scale (0 to 0.5)",
    "dark_ratio": "part of the pixels that are all but black: luma at or below 16 of 255 (0 to 1)",
    "bright_ratio": "part of the pixels that are all but white: luma at or above 239 of 255 (0 to 1)",
    "letterbox": "part of the picture that the crop box cuts away: dark bars at its sides (0 to 1)",
    "text_ratio": "part of the picture within outlines of lines of text, needs score.text=true (0 to 1)",
    "aesthetic": "the head's opinion of CLIP's embedding, needs score.aesthetic=FOLDER (scale of the head)",
}
LOOK_SIDE = 512
"""Longer side in pixels at which frames are looked at; smaller pictures as they are. Sharpness is that at this size."""
PAIR_SECONDS = 0.125
"""Time between the frames of a pair of which motion is measured: a tenth of a width in it is what flow can follow."""
FLOW_SIDE = 160
"""Longer side in pixels at which flow is measured."""
FEW = 4
"""Frames at most, evenly spaced, that the slow scores (text_ratio, aesthetic) look at."""


@dataclass(kw_only=True, slots=True)
class ClipScores:
    """What was measured of a clip."""

    values: dict[str, float]
    """By names of MEANINGS; NaN = not asked for."""
    crop: Box
    """What remains without bars, in pixels of the upright picture."""
    phash: list[int]
    """64-bit hash of each second of the clip, 0 = that second has none."""


def look_size(upright: tuple[int, int]) -> tuple[int, int]:
    """(h, w) at which to look at an upright picture of (H, W)."""
    scale = min(1.0, LOOK_SIDE / max(upright))
    return max(1, round(upright[0] * scale)), max(1, round(upright[1] * scale))


def looks(frames: int, rate: float, fps: float) -> np.ndarray:
    """Which of a clip's frames to look at, rising: `fps` a second, at least 3, and PAIR_SECONDS after each a partner.

    rate: frames of the clip per second.
    """
    count = max(ceil(frames / rate * fps), 3)
    chosen = np.unique((np.arange(count) * min(rate / fps, (frames - 1) / (count - 1))).round().astype(int))
    partners = chosen + max(ceil(PAIR_SECONDS * rate - 1e-6), 1)
    return np.unique(np.r_[chosen, partners[partners < frames]])


class Scorer:
    """Measures clips. Loads the models of the optional scores once; raises UserError if they are not there."""

    def __init__(self, settings: ScoreConfig) -> None:
        cv2.setNumThreads(1)  # a worker is one process on one core
        self.text = text_detector() if settings.text else None
        self.aesthetic = aesthetic_model(Path(settings.aesthetic)) if settings.aesthetic is not None else None

    def score(self, frames: Sequence[tuple[float, np.ndarray]], upright: tuple[int, int]) -> ClipScores:
        """Measure one clip. frames: (seconds, uint8 RGB (h, w, 3)), at least one, best those of `looks` in `look_size`.

        upright: (H, W). Takes about 2 h w N bytes beside the frames.
        """
        seconds = np.array([time for time, _ in frames])
        whole = np.stack([cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY) for _, rgb in frames])
        crop = crop_box(whole, upright)
        cell_y, cell_x = upright[0] / whole.shape[1], upright[1] / whole.shape[2]
        rows = slice(ceil(crop.top / cell_y), max(floor((crop.top + crop.height) / cell_y), 1))
        columns = slice(ceil(crop.left / cell_x), max(floor((crop.left + crop.width) / cell_x), 1))
        luma = whole[:, rows, columns]  # (N, h', w')
        motion, static = _motion(luma, seconds)
        few = [frames[i][1][rows, columns] for i in np.unique(np.linspace(0, len(frames) - 1, FEW).round().astype(int))]
        values = {
            "motion": motion,
            "static_ratio": static,
            "sharpness": float(np.median([_sharpness(one) for one in luma])),
            "brightness": float(luma.mean()) / 255,
            "contrast": float(np.mean([one.std() for one in luma])) / 255,
            "dark_ratio": float((luma <= 16).mean()),
            "bright_ratio": float((luma >= 239).mean()),
            "letterbox": 1 - crop.height * crop.width / (upright[0] * upright[1]),
            "text_ratio": float(np.mean([self.text(rgb) for rgb in few])) if self.text else np.nan,
            "aesthetic": self.aesthetic(few) if self.aesthetic else np.nan,
        }
        return ClipScores(values=values, crop=crop, phash=_hashes(luma, seconds))


def _motion(luma: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """(motion, static_ratio) of uint8 (N, h, w). Flow: dense inverse search (Kroeger et al., arXiv:1603.03590)."""
    scale = FLOW_SIDE / max(luma.shape[1:])
    width, height = (max(round(side * scale), 24) for side in (luma.shape[2], luma.shape[1]))
    small = [cv2.resize(one, (width, height), interpolation=_resampling(scale)) for one in luma]
    # of a still picture that was coded, hardly a pixel differs by more than 8 of 255
    static = [float((cv2.absdiff(a, b) > 8).mean() < 0.005) for a, b in pairwise(small)]
    partner = np.searchsorted(seconds, seconds + 0.9 * PAIR_SECONDS)
    first = np.flatnonzero(partner < len(seconds))
    gaps = seconds[partner[first]] - seconds[first]
    pairs = [(i, partner[i]) for i in first[gaps <= 1.5 * gaps.min(initial=np.inf)]] or [(0, len(small) - 1)]
    flow, rates = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM), []
    for i, j in pairs:
        if seconds[j] > seconds[i]:
            field = flow.calc(small[i], small[j], np.empty(0, np.float32))  # (height, width, 2) pixels
            rates.append(np.linalg.norm(field, axis=2).mean() / width / (seconds[j] - seconds[i]))
    return float(np.mean(rates or [0.0])), float(np.mean(static or [1.0]))


def _resampling(scale: float) -> int:
    return cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR


def _sharpness(luma: np.ndarray) -> float:
    contrast = luma.std()
    return float(cv2.Laplacian(luma, cv2.CV_32F).std() / contrast) if contrast >= 2 else 0.0


def _hashes(luma: np.ndarray, seconds: np.ndarray) -> list[int]:
    """Hash of the frame nearest to each full second of the clip; none if that is more than half a second away."""
    hashes = []
    for second in np.arange(floor(seconds[-1] - seconds[0]) + 1) + seconds[0]:
        nearest = int(np.abs(seconds - second).argmin())
        small = cv2.resize(luma[nearest].astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        hashes.append(phash(small) if abs(seconds[nearest] - second) <= 0.5 else 0)
    return hashes
