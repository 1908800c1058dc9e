"""From decoded pictures to those that a model sees. NumPy in, NumPy out.

Shapes: H height, W width.
"""

import numpy as np
from PIL import Image

from sora_lite.data.video import Planes


def cover_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box (left, top, right, bottom) of the target's aspect ratio. Sizes are (height, width)."""
    height, width = size
    scale = min(height / target[0], width / target[1])
    box_height, box_width = target[0] * scale, target[1] * scale
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def resize_crop(planes: Planes, out: np.ndarray, box: tuple[float, float, float, float] | None = None) -> None:
    """Crop the planes of a picture (uint8 H W each) to a box (left, top, right, bottom in pixels) and scale them
    (antialiased bicubic) to those of `out` (uint8, planes x height x width).

    box: by default the largest centred one of the target's aspect ratio.
    """
    target = out.shape[1], out.shape[2]
    height, width = planes[0].shape
    shown = box or cover_box((height, width), target)
    as_it_is = (height, width) == target and list(shown) == [0, 0, width, height]
    if as_it_is and isinstance(planes, np.ndarray) and planes.strides[2] == out.strides[2]:
        out[:] = planes  # in one piece: both are packed
        return
    for plane, place in zip(planes, out, strict=True):
        if as_it_is:
            place[:] = plane
        else:
            image = Image.fromarray(np.ascontiguousarray(plane))
            place[:] = np.asarray(image.resize(target[::-1], Image.Resampling.BICUBIC, box=shown))


def mirror(clip: np.ndarray) -> np.ndarray:
    """(..., W), left to right: a view."""
    return clip[..., ::-1]
