"""`sora-lite evaluate frames=[...]`: are given frames kept, and does the motion go on in the right direction?"""

import numpy as np
import torch

from sora_lite.config import FrameMode, SamplingConfig
from sora_lite.evaluation.judge import Judge, accuracy, psnr_db
from sora_lite.generation.frames import Given, given_frames, given_mask
from sora_lite.generation.pipeline import Pipeline, Request, to_float, to_uint8
from sora_lite.models.vae import CausalVAE

PROMPTED = (FrameMode.none, FrameMode.first, FrameMode.last)
"""Where one picture, or none, cannot tell where things move, the caption does; elsewhere the frames alone do."""
LATENT_FRAMES = 2
"""Latent frames that extensions are given: 5 frames, where the VAE compresses time by 4."""


def evaluate_frames(
    pipeline: Pipeline,
    mode: FrameMode,
    clips: np.ndarray,
    requests: list[Request],
    judges: dict[str, tuple[Judge, np.ndarray]],
    sampling: SamplingConfig,
) -> dict[str, float]:
    """Figures of one mode on held-out clips, uint8 N T H W 3, which give their frames.

    `MODE_ATTRIBUTE_accuracy`: judged by what was made, and the given frames next to it. `MODE_given_psnr_db`: given
    frames of the generations against the real ones; `MODE_vae_psnr_db`: the VAE's reconstruction of the whole real clip
    in the same frames. `MODE_seam`: change from given frames to those next to them, against that in the real clips.
    judges: attribute -> judge and targets (N,).
    """
    vae = pipeline.vae
    video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3)  # N 3 T H W
    frames, height, width = clips.shape[1:4]
    mask = given_mask(mode, vae.latent_shape(frames, height, width)[1], LATENT_FRAMES)
    if mode not in PROMPTED:
        requests = [Request()] * len(requests)
    given = Given(video=video, mask=mask.expand(len(clips), -1))
    made = pipeline.generate(requests, clip=(frames, height, width), sampling=sampling, given=given)
    generated = np.stack([clip.numpy() for clip in made])
    kept = given_frames(mask, vae.time_factor)
    judged = beside_or_free(kept, frames)
    figures = {
        f"{mode.value}_{name}_accuracy": accuracy(judge, generated[:, judged], targets)
        for name, (judge, targets) in judges.items()
    }
    if kept:
        real, whole = clips[:, kept], reconstruct(vae, video)[:, kept]
        figures[f"{mode.value}_given_psnr_db"] = float(psnr_db(generated[:, kept], real).mean())
        figures[f"{mode.value}_vae_psnr_db"] = float(psnr_db(whole, real).mean())
        figures[f"{mode.value}_seam"] = seam(generated, kept) / seam(clips, kept)
    return figures


def beside_or_free(kept: list[int], frames: int) -> list[int]:
    """Frames of a clip that were made, and the given ones that are next to one that was made."""
    made = set(range(frames)) - set(kept)
    return [t for t in range(frames) if {t - 1, t, t + 1} & made]


def seam(clips: np.ndarray, kept: list[int]) -> float:
    """Root mean square change of pixels in [0, 1] between a given frame and one next to it that was made."""
    pairs = [(t, other) for t in kept for other in (t - 1, t + 1) if 0 <= other < clips.shape[1] and other not in kept]
    here, there = (clips[:, list(side)].astype(np.float32) / 255 for side in zip(*pairs, strict=True))
    return float(np.sqrt(np.square(here - there).mean()))


@torch.no_grad()
def reconstruct(vae: CausalVAE, video: torch.Tensor, batch: int = 50) -> np.ndarray:
    """What the VAE makes of whole clips uint8 N 3 T H W: uint8 N T H W 3."""
    device = vae.latent_mean.device
    parts = [to_uint8(vae.decode(vae.encode(to_float(some.to(device))).mean)) for some in video.split(batch)]
    return torch.cat(parts).permute(0, 2, 3, 4, 1).cpu().numpy()
