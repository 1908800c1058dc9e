"""From a decoded clip to the clip that a model sees. NumPy in, NumPy out.

Shapes: T frames, H height, W width; clips are uint8 (T, H, W, 3).
"""

import numpy as np
from PIL import Image


def cover_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box (left, top, right, bottom) of the target's aspect ratio. Sizes are (height, width)."""
    height, width = size
    scale = min(height / target[0], width / target[1])
    box_height, box_width = target[0] * scale, target[1] * scale
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def resize_crop(
    clip: np.ndarray, target: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Crop to a box (left, top, right, bottom in pixels) and scale (antialiased bicubic) to (height, width).

    box: by default the largest centred one of the target's aspect ratio.
    """
    height, width = clip.shape[1:3]
    if box is None:
        box = cover_box((height, width), target)
    if (height, width) == target and list(box) == [0, 0, width, height]:
        return clip
    size = (target[1], target[0])
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC, box=box) for frame in clip]
    return np.stack([np.asarray(frame) for frame in frames])


def mirror(clip: np.ndarray) -> np.ndarray:
    """Left to right."""
    return clip[:, :, ::-1]
