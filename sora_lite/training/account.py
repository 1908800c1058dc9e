"""What is done between two lines of a run's record: losses, work and time."""

import time
from collections.abc import Sequence

import torch

from sora_lite.data.batch import ClipBatch
from sora_lite.data.loader import ClipLoader
from sora_lite.parallel.env import Rank
from sora_lite.training.metrics import Means
from sora_lite.training.objective import Loss, Objective


class Account:
    """Losses and work of the steps since the last line of the record, and the FLOPs of the whole run.

    Work is that of all ranks, whose batches have the same size.
    """

    def __init__(self, objective: Objective, loader: ClipLoader, rank: Rank) -> None:
        self._objective, self._loader, self._rank = objective, loader, rank
        self._forward_flops: dict[tuple[int, ...], int] = {}
        self.flops = 0
        """Floating-point operations since the run began, of all its attempts."""
        self.begin()

    def begin(self) -> None:
        """Forget the losses and work so far, as at a start or a rollback."""
        self._means = Means(self._rank)
        self.restart()

    def restart(self) -> None:
        """Leave out the time and work so far: what follows is training again."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._flops = self._clips = self._tokens = 0

    def add_wait(self, seconds: float) -> None:
        """Count time in which there was no data."""
        self._waited += seconds

    def count(self, losses: Sequence[Loss], batches: Sequence[ClipBatch]) -> None:
        """Count a step of this rank in: one loss for each batch."""
        for loss, batch in zip(losses, batches, strict=True):
            self._count_loss(loss, batch)
            self._count_made(batch)
            clips = len(batch.keys) * self._rank.world_size
            flops = 3 * clips * self._flops_of(batch.shape)  # the backward pass costs two forward passes
            self._clips += clips
            self._tokens += clips * self._objective.tokens(*batch.shape)
            self._flops += flops
            self.flops += flops

    def line(self, peak: float) -> dict[str, float]:
        """Mean losses, speed and waiting, to be followed by `restart`. A collective.

        peak: FLOP/s that one device can do.
        """
        values = self._means.read()
        seconds = max(time.perf_counter() - self._start, 1e-9)
        speed = self._flops / seconds / self._rank.world_size
        return values | {
            "clips_per_s": self._clips / seconds,
            "tokens_per_s": self._tokens / seconds,
            "tflops_per_device": speed / 1e12,
            "mfu": speed / peak,
            "data_wait": max(self._rank.gather(self._waited)) / seconds,  # the others wait for that rank
            "flops": self.flops,
        }

    def _count_loss(self, loss: Loss, batch: ClipBatch) -> None:
        """The loss, its parts, and where there are several, its mean over each bucket and each data set."""
        value = loss.loss.detach()
        counts = value.isfinite().double()  # what is not finite has left the update out, and must not hide the others
        self._means.add("loss", value, counts)
        for name, (part, weight) in loss.parts.items():
            self._means.add(name, part, torch.as_tensor(weight, dtype=torch.float64, device=value.device) * counts)
        if len(self._loader.order.buckets) > 1:
            self._means.add("loss_{}x{}x{}".format(*batch.shape), value, counts)
        if len(self._loader.index.set_shards) > 1:
            sets = self._loader.index.set_of(batch.samples.numpy())
            for number in range(len(self._loader.index.set_shards)):
                inside = torch.from_numpy(sets == number).to(value.device)
                mean = loss.each.double().where(inside, 0.0).sum() / inside.sum()
                self._means.add(f"loss_set_{number}", mean, inside.sum() * counts)

    def _count_made(self, batch: ClipBatch) -> None:
        """How many samples came with what was made of them beforehand."""
        if self._loader.latents is not None:
            self._means.add("from_latents", batch.is_latent.double().mean(), len(batch.keys))
        if self._loader.text is not None:
            made = batch.text_mask.any(1).double().mean() if batch.text_mask is not None else 0.0
            self._means.add("from_text_features", made, len(batch.keys))

    def _flops_of(self, shape: tuple[int, ...]) -> int:
        """FLOPs of the forward pass of one clip; counting them takes a run on the meta device."""
        if shape not in self._forward_flops:
            self._forward_flops[shape] = self._objective.flops(*shape)
        return self._forward_flops[shape]
