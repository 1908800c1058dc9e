"""Given frames: one mechanism for image to video, extension forward and backward, and interpolation.

What is given is a mask over latent frames. A run of given latent frames s to e stands for the pixel frames f s to f e
(f: the VAE's time factor), which are encoded alone and placed in these slots: in the whole clip a causal latent would
carry what comes before it. So f j + 1 pixel frames fill j + 1 slots wherever they stand; a single picture fills one
slot, and in a slot after the first it is the last of the slot's f frames.

A model sees them beside the noisy latent (`Conditions.frames`); it is trained to predict the slots of given frames like
all others, so neither losses nor samplers know of them. In a generation the given frames are those that the VAE makes
of them alone, and the latents before which nothing was made are kept for what follows.

Shapes: B clips, C latent channels, T H W pixel frames, t h w latent frames and cells.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sora_lite.config import ConditionConfig, FrameMode, FrameRule
from sora_lite.data.transforms import resize_crop
from sora_lite.data.video import BadVideo, read_frames
from sora_lite.errors import UserError
from sora_lite.models.vae import CausalVAE


@dataclass(kw_only=True, slots=True, frozen=True)
class Given:
    """Frames to keep. video: uint8 B 3 T H W, of which only given frames matter; mask: bool B t."""

    video: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.video.dtype != torch.uint8 or self.video.ndim != 5 or self.mask.ndim != 2:
            raise ValueError(f"given video {self.video.dtype} {tuple(self.video.shape)}, mask {tuple(self.mask.shape)}")
        if len(self.video) != len(self.mask):
            raise ValueError(f"{len(self.video)} clips and {len(self.mask)} masks")


def read_given(condition: ConditionConfig, clip: tuple[int, int, int], factor: int, count: int) -> Given:
    """The pictures or clips that all of `count` generations of (T, H, W) keep. factor: the VAE's, in time.

    Raises:
        UserError: a file is missing, is neither picture nor video, or too short; or more is given than fits.
    """
    frames, height, width = clip
    first, last = (_read(key, condition, (height, width), factor) for key in ("first", "last"))
    if max(len(first), len(last)) == 1 < condition.frames != ConditionConfig().frames:
        raise UserError(
            f"condition.frames: {condition.frames} frames are of clips, and pictures have one; leave it out"
        )
    if len(first) + len(last) > frames - factor:  # a latent frame at least is made
        raise UserError(
            f"frames: {len(first) + len(last)} given frames leave none of {frames} to make; give fewer, or take more"
        )
    video = np.zeros((frames, height, width, 3), np.uint8)
    mask = torch.zeros((frames - 1) // factor + 1, dtype=torch.bool)
    if len(first):
        video[: len(first)] = first
        mask[: (len(first) - 1) // factor + 1] = True
    if len(last):
        video[-len(last) :] = last
        mask[-((len(last) - 1) // factor + 1) :] = True
    tensor = torch.from_numpy(video).permute(3, 0, 1, 2)  # 3 T H W
    return Given(video=tensor.expand(count, *tensor.shape), mask=mask.expand(count, -1))


def _read(key: str, condition: ConditionConfig, size: tuple[int, int], factor: int) -> np.ndarray:
    """The frames to keep of `condition.first` or `last`, uint8 n H W 3; none where it is not set."""
    name, wanted = getattr(condition, key), condition.frames
    if name is None:
        return np.zeros((0, *size, 3), np.uint8)
    path = Path(name)
    if not path.is_file():
        raise UserError(f"condition.{key}: {path} is no file; name a picture or a clip")
    try:
        shown = [frame for _, frame in read_frames(path)]
    except BadVideo as error:
        raise UserError(f"condition.{key}: {path} cannot be read ({error}); name a picture or a clip") from error
    if len(shown) > 1:
        if wanted < 1 or (wanted - 1) % factor:
            raise UserError(f"condition.frames: {wanted} is not of the form {factor}k+1; take {factor + 1}")
        if len(shown) < wanted:
            raise UserError(f"condition.frames: {path} has {len(shown)} frames, not {wanted}; take fewer")
        shown = shown[-wanted:] if key == "first" else shown[:wanted]
    kept = np.empty((len(shown), 3, *size), np.uint8)
    for frame, place in zip(shown, kept, strict=True):
        resize_crop(frame.transpose(2, 0, 1), place)
    return kept.transpose(0, 2, 3, 1)


def given_frames(mask: Tensor, factor: int) -> list[int]:
    """Numbers of the pixel frames that bool (t,) gives."""
    return [frame for first, last in runs(mask) for frame in range(factor * first, factor * last + 1)]


def draw_given(rules: Sequence[FrameRule], count: int, seed: int) -> Tensor:
    """Which of `count` latent frames are given: bool (count,). Of a still image none is."""
    draw = torch.Generator().manual_seed(seed)
    ends = list(accumulate(rule.weight for rule in rules))
    place = float(torch.rand((), generator=draw)) * ends[-1]
    mode = next((rule.mode for rule, end in zip(rules, ends, strict=True) if place < end), rules[-1].mode)
    if count == 1:
        return torch.zeros(1, dtype=torch.bool)
    some = int(torch.randint(1, count, (), generator=draw))  # at least one is given, and one is made
    return given_mask(mode, count, some, torch.randperm(count, generator=draw))


def given_mask(mode: FrameMode, count: int, some: int = 1, order: Tensor | None = None) -> Tensor:
    """bool (count,) for a mode; before, after and random give `some` latent frames, random the first of `order`."""
    mask = torch.zeros(count, dtype=torch.bool)
    if mode in (FrameMode.first, FrameMode.first_last):
        mask[0] = True
    if mode in (FrameMode.last, FrameMode.first_last):
        mask[-1] = True
    if mode is FrameMode.before:
        mask[:some] = True
    if mode is FrameMode.after:
        mask[count - some :] = True
    if mode is FrameMode.random and order is not None:
        mask[order[:some]] = True
    return mask


def runs(given: Tensor) -> list[tuple[int, int]]:
    """(first, last) of each run of True in bool (t,)."""
    places = [i for i, one in enumerate(given.tolist()) if one]
    firsts = [i for i in places if i - 1 not in places]
    return list(zip(firsts, (i for i in places if i + 1 not in places), strict=True))


@torch.no_grad()
def encode_given(vae: CausalVAE, video: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """(frames, frame_mask) of `Conditions`: B C t h w, zero where not given, and B 1 t 1 1.

    video: float B 3 T H W in [-1, 1]; only given frames are looked at. given: bool B t.
    """
    shape = vae.latent_shape(video.shape[2], video.shape[3], video.shape[4])
    frames = torch.zeros(len(video), *shape, device=video.device)
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for clip, row in enumerate(given):
        for first, last in runs(row):
            by_length[last - first].append((clip, first))
    factor = vae.time_factor
    for length, places in by_length.items():  # one call of the VAE for each length
        pieces = [video[clip, :, factor * first : factor * (first + length) + 1] for clip, first in places]
        latents = vae.normalize(vae.encode(torch.stack(pieces)).mean)
        for (clip, first), latent in zip(places, latents, strict=True):
            frames[clip, :, first : first + length + 1] = latent
    return frames, given.to(frames)[:, None, :, None, None]


@torch.no_grad()
def decode_with_given(vae: CausalVAE, latents: Tensor, frames: Tensor, given: Tensor) -> Tensor:
    """Pixels B 3 T H W of generated latents, in which the given frames are what the VAE makes of them alone.

    latents, frames: B C t h w, normalised. given: bool B t.
    """
    whole = latents.clone()
    for clip, row in enumerate(given):
        for first, last in runs(row):
            if first == 0:  # for the frames after them the decoder looks back at these
                whole[clip, :, : last + 1] = frames[clip, :, : last + 1]
    video = vae.decode(vae.denormalize(whole))
    factor = vae.time_factor
    for clip, row in enumerate(given):
        for first, last in runs(row):
            alone = vae.decode(vae.denormalize(frames[clip : clip + 1, :, first : last + 1]))[0]
            video[clip, :, factor * first : factor * last + 1] = alone
    return video
