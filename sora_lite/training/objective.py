"""What is trained, as the trainer sees it: a module, a loss on a batch, and a few side jobs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sora_lite.data.batch import Clip, ClipBatch, Places, View
from sora_lite.data.buckets import frames_at
from sora_lite.data.index import Index
from sora_lite.data.joined import Joined
from sora_lite.data.loader import ClipReader
from sora_lite.data.shards import DamagedSample
from sora_lite.data.video import BadVideo
from sora_lite.parallel.env import Rank
from sora_lite.training.engine import Engine


@dataclass(kw_only=True, slots=True)
class Loss:
    """Result of a forward pass on one micro-batch.

    loss: scalar, the mean over the micro-batch. each: B, detached, the loss of each sample, by which the record tells
    sources apart. parts: named scalars for the record, each with its weight in the mean; they may stay on the device.
    """

    loss: Tensor
    each: Tensor
    parts: dict[str, tuple[Tensor, float | Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.loss.ndim:
            raise ValueError(f"loss has shape {tuple(self.loss.shape)}, not a scalar")
        if self.each.ndim != 1 or self.each.requires_grad:
            raise ValueError(f"each has shape {tuple(self.each.shape)}, or records gradients; it is B, detached")


class Objective(Protocol):
    """The two implementations are `objective_vae.VAEObjective` and `objective_dit.DiTObjective`.

    Whatever calls the engine is called by all ranks equally often, as ZeRO-3 needs.
    """

    name: str
    """Name of the engine: `vae` or `dit`."""
    module: nn.Module
    """What is trained, with the same weights on every rank."""

    def tokens(self, frames: int, height: int, width: int) -> int:
        """What the speed of a step is counted in, for a clip of so many frames and pixels."""
        ...

    def flops(self, frames: int, height: int, width: int) -> int:
        """FLOPs of a forward pass of the module on one clip. Run on the meta device."""
        ...

    def cost(self, frames: int, height: int, width: int) -> float:
        """FLOPs of training on one clip: the module's forward and backward pass, and all that runs before it."""
        ...

    def loss(self, engine: Engine, batch: ClipBatch) -> Loss:
        """Loss of this rank's micro-batch."""
        ...

    def validate(self, engine: Engine, held_out: "HeldOut") -> dict[str, float]:
        """Figures on held-out clips, the same on all ranks. Called with the averaged weights in place."""
        ...

    def sample(self, engine: Engine, held_out: "HeldOut", path: Path) -> None:
        """Draw a contact sheet to `path` (rank 0 writes). Called with the averaged weights in place."""
        ...

    def finish(self, engine: Engine, training: "HeldOut") -> None:
        """Called once before the last checkpoint, with the averaged weights in place and a few training clips."""
        ...

    def frozen(self) -> dict[str, Tensor]:
        """Tensors that every rank holds and that training never writes, by name."""
        ...

    def state(self) -> dict[str, Any]:
        """What an export needs to know beside the weights, as JSON."""
        ...

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what it is built on, by the name of the setting that leads to it."""
        ...


class HeldOut:
    """A fixed set of clips, divided over the ranks into equally many batches.

    Of the samples in `Index.by_key` that are long enough, the set is the first `count` (keys are hashes: a fair draw).
    Where ranks do not divide it, some clips come twice, the second time with weight 0.
    """

    def __init__(
        self,
        index: Index,
        *,
        count: int,
        shape: tuple[int, int, int],
        fps: float | None,
        rank: Rank,
        batch: int,
        latents: Joined | None = None,
        text: Joined | None = None,
    ) -> None:
        self._reader, self._fps = ClipReader(index, cache_bytes=0, latents=latents, text=text), fps
        first = index.by_key
        chosen = first[frames_at(index.frames[first], index.fps[first], fps) >= shape[0]][:count]
        self.count = len(chosen)
        self.shape = shape
        self._batch = batch
        per_rank = -(-self.count // rank.world_size) if self.count else 0
        places = np.arange(per_rank) * rank.world_size + rank.rank
        self._places = places
        self._samples = chosen[places % max(self.count, 1)]
        self._weights = (places < self.count).astype(np.float64)
        self._batches: list[tuple[ClipBatch, np.ndarray]] | None = None

    def batches(self) -> list[tuple[ClipBatch, np.ndarray]]:
        """(clips with their first captions and, as positions, their places in the whole set; weights B) per batch.

        Read once. A damaged clip is named, and a black one of weight 0 stands for it.
        """
        if self._batches is None:
            count = len(self._samples)
            parts = [slice(start, start + self._batch) for start in range(0, count, self._batch)]
            self._batches = [(self._read(part), self._weights[part]) for part in parts]
        return self._batches

    def _read(self, part: slice) -> ClipBatch:
        samples = self._samples[part]
        places, views = Places(len(samples), self.shape), []
        for place, sample in enumerate(samples.tolist(), part.start):
            try:
                clip = self._reader.read(sample, self.shape, self._fps, places=places)
            except (DamagedSample, BadVideo) as error:
                index = self._reader.index
                shard = index.shard_paths[int(index.shard[sample])].name
                tqdm.write(f"{shard}: sample {index.key(sample)} does not count in validation or statistics: {error}")
                self._weights[place] = 0
                black = places.video()
                black[:] = 0
                clip = Clip(pixels=black, crop=(0, 0, 0, 0), captions=[], label=-1)
            places.keep(clip)
            views.append(View(start=0, crop=clip.crop, flip=False))
        return places.batch(
            keys=[self._reader.index.key(int(sample)) for sample in samples],
            positions=torch.from_numpy(self._places[part]),
            step=0,
            views=views,
            samples=torch.from_numpy(samples),
            bucket=0,
        )
