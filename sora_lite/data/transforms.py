"""From decoded pictures to those that a model sees. NumPy in, NumPy out.

Shapes: H height, W width.
"""

from collections.abc import Iterable

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
    planes: Iterable[np.ndarray], out: np.ndarray, box: tuple[float, float, float, float] | None = None
) -> None:
    """Crop the planes of a picture (uint8 H W each) to a box (left, top, right, bottom in pixels) and scale them
    (antialiased bicubic) to those of `out` (uint8, planes x height x width).

    box: by default the largest centred one of the target's aspect ratio.
    """
    target = out.shape[1], out.shape[2]
    for plane, place in zip(planes, out, strict=True):
        height, width = plane.shape
        shown = box or cover_box((height, width), target)
        if (height, width) == target and list(shown) == [0, 0, width, height]:
            place[:] = plane
        else:
            image = Image.fromarray(np.ascontiguousarray(plane))
            place[:] = np.asarray(image.resize(target[::-1], Image.Resampling.BICUBIC, box=shown))


def mirror(clip: np.ndarray) -> np.ndarray:
    """(..., W), left to right: a view."""
    return clip[..., ::-1]
