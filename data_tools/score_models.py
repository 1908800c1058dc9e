"""The scores that need a model: how much of a picture is text, and how it looks to CLIP. Both are optional."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sora_lite.errors import UserError

TEXT_SIDE = 512
"""Longer side in pixels at which text is looked for."""
TEXT_HEIGHT = 0.4
"""Part of the picture's height from which on an outline is no line of text: large smooth things get such outlines."""
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def text_detector() -> Callable[[np.ndarray], float]:
    """The text detector of PP-OCR (its weights are inside the package) -> part of a picture (h, w, 3) that is text."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        raise UserError("score.text=true needs a text detector: pip install 'sora_lite[text]'.") from None
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    size = {"Det.limit_type": "max", "Det.limit_side_len": TEXT_SIDE}
    engine = RapidOCR(params={"Global.log_level": "error", "Det.box_thresh": 0.6, **size, **threads})

    def part(rgb: np.ndarray) -> float:
        outlines = engine(np.ascontiguousarray(rgb[..., ::-1]), use_det=True, use_cls=False, use_rec=False).boxes
        mask = np.zeros(rgb.shape[:2], dtype=np.uint8)
        for outline in [] if outlines is None else outlines:  # (4, 2), clockwise from the top left
            if min(np.linalg.norm(outline[1:3] - outline[:2], axis=1)) < TEXT_HEIGHT * rgb.shape[0]:
                cv2.fillPoly(mask, [np.rint(outline).astype(np.int32)], 1)
        return float(mask.mean())

    return part


def aesthetic_model(folder: Path) -> Callable[[list[np.ndarray]], float]:
    """CLIP and a linear head on its normalised embedding -> mean score of pictures (h, w, 3)."""
    try:
        from transformers import CLIPVisionModelWithProjection
    except ImportError:
        raise UserError("score.aesthetic needs transformers: pip install 'sora_lite[aesthetic]'.") from None
    import torch  # slow to import

    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        if kind not in ("clip", "clip_vision_model"):
            raise ValueError(f"its model is a {kind}")
        model, report = CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        head = load_file(folder / "head.safetensors")
        weight, bias = head["weight"].reshape(-1), head["bias"].reshape(1)
        if report["missing_keys"] or len(weight) != model.config.projection_dim:
            raise ValueError("the weights of the model or of the head do not fit its config.json")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"score.aesthetic={folder}: {str(error).splitlines()[0]}; it must hold a CLIP model as transformers saves "
            "it, and head.safetensors with `weight` (1, size of the embedding) and `bias` (1,)."
        ) from None
    side = model.config.image_size

    def opinion(pictures: list[np.ndarray]) -> float:
        ready = [(_square(rgb, side) / 255 - _CLIP_MEAN) / _CLIP_STD for rgb in pictures]
        pixels = torch.from_numpy(np.stack(ready).transpose(0, 3, 1, 2)).float()  # (n, 3, side, side)
        with torch.inference_mode():
            embedding = torch.nn.functional.normalize(model(pixel_values=pixels).image_embeds).numpy()
        return float((embedding @ weight + bias).mean())

    return opinion


def _square(rgb: np.ndarray, side: int) -> np.ndarray:
    """The middle of a picture, its shorter side scaled to `side` -> (side, side, 3)."""
    height, width = rgb.shape[:2]
    scale = side / min(height, width)
    size = max(round(width * scale), side), max(round(height * scale), side)
    scaled = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (scaled.shape[0] - side) // 2, (scaled.shape[1] - side) // 2
    return scaled[top : top + side, left : left + side]
