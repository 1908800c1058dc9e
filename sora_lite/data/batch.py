"""What a micro-batch is, and the memory that it is written to.

Shapes: B samples of a rank's micro-batch, T frames, H W pixels, C t h w latent channels, frames and cells.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_lite.data.joined import CaptionFeatures, Latent, stack_features
from sora_lite.data.remote import ReadCounts
from sora_lite.data.shards import DamagedSample

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]
"""Gives an array of a shape and dtype, of any content, as `numpy.empty` does."""


@dataclass(kw_only=True, slots=True, frozen=True)
class BadSample:
    """A sample that could not be read, and why; where in the order it was, and the key of what replaced it there."""

    key: str
    shard: str
    reason: str
    step: int
    position: int
    replaced_by: str


@dataclass(kw_only=True, slots=True, frozen=True)
class View:
    """What of a sample a clip shows.

    start: its own frame that the clip begins with. crop: left, top, right, bottom in pixels of its own frames.
    flip: mirrored left to right.
    """

    start: int
    crop: tuple[float, float, float, float]
    flip: bool


@dataclass(kw_only=True, slots=True)
class ClipBatch:
    """One rank's micro-batch of B samples: V that were decoded, and B - V that come as latents.

    video: uint8 V 3 T H W in [0, 255], whichever axis is the first in memory. mean, logvar: float32 B-V C t h w,
    unnormalised posteriors; None where V is B. is_latent: bool B, which of the samples are not in `video`. keys: of the
    samples. captions: one per sample, "" for none. labels: int64 B, -1 for none. positions: int64 B, places in the
    global step's batch. step: the global step. views: one per sample. samples: int64 B, their numbers in the index.
    bucket: number of the bucket. bad: samples replaced. seconds: that making the batch took its worker. reads: what it
    read meanwhile.

    Of captions whose features were made beforehand (all None where there are none): text: float32 B M C, zero at
    padding. text_mask: bool B M, True where a token is real; a row without one has no features yet. pooled: float32
    B P, of encoders that pool.
    """

    video: Tensor
    mean: Tensor | None = None
    logvar: Tensor | None = None
    is_latent: Tensor
    keys: list[str]
    captions: list[str]
    labels: Tensor
    positions: Tensor
    step: int
    views: list[View]
    samples: Tensor
    bucket: int
    bad: list[BadSample] = field(default_factory=list)
    seconds: float = 0.0
    reads: ReadCounts = field(default_factory=ReadCounts)
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        b = len(self.keys)
        latents = int(self.is_latent.sum())
        if self.video.dtype != torch.uint8 or self.video.ndim != 5 or self.video.shape[:2] != (b - latents, 3):
            raise ValueError(f"video is {self.video.dtype} {tuple(self.video.shape)}, not uint8 {b - latents} 3 T H W")
        for posterior in (self.mean, self.logvar):
            if (0 if posterior is None else len(posterior)) != latents:
                raise ValueError(f"there are {latents} latents by is_latent, and another number of means or logvars")
        columns = (self.captions, self.labels, self.positions, self.views, self.samples, self.is_latent)
        made = [one for one in (self.text, self.text_mask, self.pooled) if one is not None]
        if any(len(column) != b for column in columns) or any(len(one) != b for one in made):
            raise ValueError(
                "captions, text, labels, positions, views, samples or is_latent differ in number from keys"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, W) of the clips."""
        return self.video.shape[2], self.video.shape[3], self.video.shape[4]

    def heavy(self) -> dict[str, Tensor]:
        """Its large tensors by name: what a device works on."""
        names = ("video", "mean", "logvar", "text", "text_mask", "pooled")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def pin_memory(self) -> "ClipBatch":
        """The same in memory that a device copies from."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "ClipBatch":
        """The same with its large tensors on a device; out of pinned memory without waiting for it."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "ClipBatch":
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.heavy().items()}
        return replace(self, **changed)


@dataclass(kw_only=True, slots=True, frozen=True)
class Clip:
    """A sample, decoded or as a latent, the part of its own frames that is (`View.crop`), and what is known of it.

    pixels: uint8 3 T H W, None of a latent. text: of its captions, where it was made beforehand. label: -1 for none.
    """

    pixels: np.ndarray | None = None
    latent: Latent | None = None
    crop: tuple[float, float, float, float]
    captions: list[str]
    text: CaptionFeatures | None = None
    label: int

    def __post_init__(self) -> None:
        if (self.pixels is None) == (self.latent is None):
            raise ValueError("a clip has either pixels or a latent")

    @property
    def frames(self) -> np.ndarray:
        """uint8 T H W 3, of a clip that was decoded."""
        if self.pixels is None:
            raise ValueError("a latent has no frames")
        return self.pixels.transpose(1, 2, 3, 0)


class Places:
    """Memory of a micro-batch, to which each sample is written where it will stay.

    Ask for the next sample's place, fill it, then `keep` it. What turned out damaged is not kept, and written over.

    Args:
        count: samples, B. shape: (T, H, W).
        allocate: memory costs nothing before it is written to, so there is enough for any mixture of both kinds.
        packed: in memory, the colours of a pixel lie side by side, as the decoder gives them.
    """

    def __init__(
        self, count: int, shape: tuple[int, int, int], allocate: Allocate = np.empty, *, packed: bool = False
    ) -> None:
        self._count, self._allocate = count, allocate
        if packed:
            self._video = allocate((count, *shape, 3), np.uint8).transpose(0, 4, 1, 2, 3)
        else:
            self._video = allocate((count, 3, *shape), np.uint8)
        self._posteriors: list[np.ndarray] = []
        self._kept: list[Clip] = []
        self._said: list[str] = []
        self._text: list[CaptionFeatures | None] = []
        self._latents = 0

    def video(self) -> np.ndarray:
        """uint8 3 T H W, for a sample that is decoded."""
        return self._video[len(self._kept) - self._latents]

    def latent(self, latent: Latent) -> Latent:
        """The same latent, in its place."""
        shape = latent.mean.shape
        if self._latents == 0:
            self._posteriors = [self._allocate((self._count, *shape), np.float32) for _ in ("mean", "logvar")]
        places = [posterior[self._latents] for posterior in self._posteriors]
        if places[0].shape != shape:
            raise DamagedSample(f"a latent of shape {shape} among those of {places[0].shape}")
        places[0][:], places[1][:] = latent.mean, latent.logvar
        return Latent(mean=places[0], logvar=places[1])

    def keep(self, clip: Clip, said: int = 0) -> None:
        """What was written last is the batch's next sample.

        said: which of its captions counts, as any number, of which the remainder is taken.
        """
        self._kept.append(clip)
        self._said.append(clip.captions[said % len(clip.captions)] if clip.captions else "")
        self._text.append(clip.text and clip.text.caption(said % len(clip.text)))
        self._latents += clip.latent is not None

    def batch(self, **rest: Any) -> ClipBatch:
        """The samples that were kept, with the fields of `ClipBatch` that clips do not say."""
        posteriors = [torch.from_numpy(one[: self._latents]) for one in self._posteriors if self._latents]
        mean, logvar = posteriors or (None, None)
        rest |= {name: torch.from_numpy(array) for name, array in stack_features(self._text).items()}
        return ClipBatch(
            video=torch.from_numpy(self._video[: len(self._kept) - self._latents]),
            mean=mean,
            logvar=logvar,
            is_latent=torch.tensor([clip.latent is not None for clip in self._kept]),
            labels=torch.tensor([clip.label for clip in self._kept]),
            captions=self._said,
            **rest,
        )
