"""Batches of clips in the exact order, decoded by worker processes.

A worker is given (step, pass) pairs and returns whole micro-batches, so what a batch holds depends on neither the
number of workers nor which one made it.

Shapes: B samples of a rank's micro-batch, T frames, H W pixels.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sora_lite.data.buckets import Row, spare_frames
from sora_lite.data.compiled import open_buckets
from sora_lite.data.index import Index
from sora_lite.data.joined import Joined, Latent, LatentReader, Members
from sora_lite.data.order import MicroStep, Order, check_parts, hash_seed, rank_positions
from sora_lite.data.shards import DamagedSample
from sora_lite.data.transforms import mirror, resize_crop
from sora_lite.data.video import BadVideo, decode_clip
from sora_lite.errors import UserError

MAX_REPLACEMENTS = 16


@dataclass(kw_only=True, slots=True, frozen=True)
class BadSample:
    """A sample that could not be read, and why. It was replaced."""

    key: str
    shard: str
    reason: str


@dataclass(kw_only=True, slots=True)
class ClipBatch:
    """One rank's micro-batch of B samples: V that were decoded, and B - V that come as latents.

    video: uint8 V 3 T H W in [0, 255]. mean, logvar: float32 B-V C t h w, unnormalised posteriors; None where V is B.
    is_latent: bool B, which of the samples are not in `video`. keys: of the samples. captions: one per sample, "" for
    none. labels: int64 B, -1 for none. positions: int64 B, places in the global step's batch. step: the global step.
    bad: samples replaced.
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
    bad: list[BadSample] = field(default_factory=list)

    def __post_init__(self) -> None:
        b = len(self.keys)
        latents = int(self.is_latent.sum())
        if self.video.dtype != torch.uint8 or self.video.ndim != 5 or self.video.shape[:2] != (b - latents, 3):
            raise ValueError(f"video is {self.video.dtype} {tuple(self.video.shape)}, not uint8 {b - latents} 3 T H W")
        for posterior in (self.mean, self.logvar):
            if (0 if posterior is None else len(posterior)) != latents:
                raise ValueError(f"there are {latents} latents by is_latent, and another number of means or logvars")
        if not len(self.captions) == len(self.labels) == len(self.positions) == len(self.is_latent) == b:
            raise ValueError("captions, labels, positions and is_latent differ in number from the keys")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, W) of the clips."""
        return self.video.shape[2], self.video.shape[3], self.video.shape[4]

    def pin_memory(self) -> "ClipBatch":
        """Called by torch's DataLoader."""
        mean, logvar = (one if one is None else one.pin_memory() for one in (self.mean, self.logvar))
        return replace(self, video=self.video.pin_memory(), mean=mean, logvar=logvar)


@dataclass(kw_only=True, slots=True, frozen=True)
class Clip:
    """A sample, decoded or as a latent, and what its JSON says of it. pixels: uint8 T H W 3, None of a latent."""

    pixels: np.ndarray | None = None
    latent: Latent | None = None
    captions: list[str]
    label: int

    def __post_init__(self) -> None:
        if (self.pixels is None) == (self.latent is None):
            raise ValueError("a clip has either pixels or a latent")

    @property
    def frames(self) -> np.ndarray:
        """uint8 T H W 3, of a clip that was decoded."""
        if self.pixels is None:
            raise ValueError("a latent has no frames")
        return self.pixels


def collate(clips: Sequence[Clip], shape: tuple[int, int, int], **rest: Any) -> ClipBatch:
    """Clips of one (T, H, W) as a batch, with the fields of `ClipBatch` that the clips do not say."""
    frames = [clip.pixels for clip in clips if clip.pixels is not None]
    latents = [clip.latent for clip in clips if clip.latent is not None]
    video = np.stack(frames) if frames else np.empty((0, *shape, 3), np.uint8)
    return ClipBatch(
        video=torch.from_numpy(video).permute(0, 4, 1, 2, 3),
        mean=torch.from_numpy(np.stack([latent.mean for latent in latents])) if latents else None,
        logvar=torch.from_numpy(np.stack([latent.logvar for latent in latents])) if latents else None,
        is_latent=torch.tensor([clip.latent is not None for clip in clips]),
        labels=torch.tensor([clip.label for clip in clips]),
        **rest,
    )


class ClipReader:
    """Reads samples of an index at a bucket's size, with a bounded memory of decoded clips.

    A sample that has a latent of this size in `latents` is not decoded.
    """

    def __init__(
        self,
        index: Index,
        *,
        fps: float | None,
        cache_bytes: int,
        decoder: str = "pyav",
        latents: Joined | None = None,
    ) -> None:
        self.index = index
        self.fps = fps
        self._members = Members(index)
        self._latents = LatentReader(latents) if latents is not None else None
        self._decoder = decoder
        self._cache_bytes = cache_bytes
        self._cached = 0
        self._cache: OrderedDict[tuple[int, tuple[int, int, int], int], Clip] = OrderedDict()
        self.shards = self._members.shards

    def spare(self, sample: int, frames: int) -> int:
        """Largest `start` at which the sample still has so many frames."""
        return spare_frames(int(self.index.frames[sample]), float(self.index.fps[sample]), self.fps, frames)

    def read(self, sample: int, shape: tuple[int, int, int], start: int = 0) -> Clip:
        """Sample number `sample` at (T, H, W): its latent, or decoded from its own frame number `start` on.

        Raises:
            DamagedSample, BadVideo: its bytes are not what the index says, or do not decode.
        """
        if self._latents is not None and (row := self._latents.find(sample, shape)) is not None:
            latent, meta = self._latents.read(row)
            captions, label = self._checked(sample, meta)
            return Clip(latent=latent, captions=captions, label=label)
        key = (sample, shape, start)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        captions, label = self.words(sample)
        media = self._members.media(sample)
        decoded = decode_clip(media, frames=shape[0], fps=self.fps, start_frame_offset=start, decoder=self._decoder)
        frames = resize_crop(decoded, shape[1:])
        clip = Clip(pixels=frames, captions=captions, label=label)
        if frames.nbytes <= self._cache_bytes:
            self._cache[key] = clip
            self._cached += frames.nbytes
            while self._cached > self._cache_bytes:
                _, oldest = self._cache.popitem(last=False)
                self._cached -= oldest.frames.nbytes
        return clip

    def meta(self, sample: int) -> dict:
        """The sample's JSON."""
        return self._members.meta(sample)

    def words(self, sample: int) -> tuple[list[str], int]:
        """Captions and label of a sample. Raises DamagedSample."""
        return self._checked(sample, self.meta(sample))

    def _checked(self, sample: int, meta: dict) -> tuple[list[str], int]:
        """Captions and label of a sample."""
        captions, label = meta.get("captions") or [], meta.get("label", -1)
        if type(label) is not int or not all(isinstance(caption, str) for caption in captions):
            raise DamagedSample(f"{self.index.keys[sample]}: captions are no list of texts, or its label is no number")
        return list(captions), label


class _MicroBatches(Dataset[ClipBatch | str]):
    """Item (step, pass) is this rank's micro-batch, or the message of the UserError that it ended in."""

    def __init__(self, reader: ClipReader, order: Order, seed: int, flip: bool, parts: tuple[int, int, int]) -> None:
        self.reader, self.order, self.seed, self.flip = reader, order, seed, flip
        self.rank, self.world_size, self.accumulation = parts

    def __getitem__(self, item: tuple[int, int]) -> ClipBatch | str:
        # Handed over as a value: of an error that a worker raises, torch makes the text of its traceback.
        try:
            return self._batch(*item)
        except UserError as error:
            return str(error)

    def _batch(self, step: int, one_pass: int) -> ClipBatch:
        (micro,) = self.order.step(step)
        positions = rank_positions(
            len(micro.samples), rank=self.rank, world_size=self.world_size, accumulation=self.accumulation
        )[one_pass]
        bad: list[BadSample] = []
        clips, keys, captions = [], [], []
        for position in positions:
            sample, clip = self._read(micro, step, int(position), bad)
            if self.flip and clip.pixels is not None and hash_seed(self.seed, step, position, "flip") % 2:
                clip = replace(clip, pixels=mirror(clip.pixels))
            clips.append(clip)
            keys.append(self.reader.index.key(sample))
            choices = clip.captions or [""]
            captions.append(choices[hash_seed(self.seed, step, position, "caption") % len(choices)])
        return collate(
            clips,
            micro.shape,
            keys=keys,
            captions=captions,
            positions=torch.from_numpy(positions),
            step=step,
            bad=bad,
        )

    def _read(self, micro: MicroStep, step: int, position: int, bad: list[BadSample]) -> tuple[int, Clip]:
        """The sample at a position, or its stand-in where it is damaged."""
        sample = int(micro.samples[position])
        for attempt in range(MAX_REPLACEMENTS):
            try:
                spare = self.reader.spare(sample, micro.shape[0])
                start = hash_seed(self.seed, step, position, "start") % (spare + 1)
                return sample, self.reader.read(sample, micro.shape, start)
            except (DamagedSample, BadVideo) as error:
                index = self.reader.index
                shard = index.shard_paths[int(index.shard[sample])].name
                bad.append(BadSample(key=index.key(sample), shard=shard, reason=str(error)))
                sample = self.order.replacement(micro.bucket, step, position, attempt)
        raise UserError(
            f"{bad[-1].shard}: {MAX_REPLACEMENTS} samples in a row are damaged (the last: {bad[-1].reason}); "
            "run `sora-data verify` on the shards"
        )


class ClipLoader:
    """This rank's view of a data set.

    Args:
        index: of one split.
        rows: bucket table with batches decided (`buckets.rows_from`).
        weights, image_ratio: how the index's data sets, stills and clips are mixed (`order.Order`).
        fps: target rate, None for each clip's own.
        seed, block_shards, flip: as configured.
        rank, world_size, accumulation: how each batch is divided.
        workers: decoding processes. cache_bytes: memory of decoded clips in each.
        pin: pinned memory, for a device that copies from it.
        decoder: as for `video.decode_clip`.
        latents: of the index's clips; those that have none are decoded.

    Raises:
        UserError: a batch cannot be divided so, or the rows do not fit the data.
    """

    def __init__(
        self,
        index: Index,
        rows: list[Row],
        *,
        fps: float | None,
        seed: int,
        block_shards: int,
        flip: bool,
        rank: int,
        world_size: int,
        accumulation: int,
        workers: int,
        cache_bytes: int,
        pin: bool,
        decoder: str = "pyav",
        weights: Sequence[float] | None = None,
        image_ratio: float | None = None,
        latents: Joined | None = None,
    ) -> None:
        buckets = open_buckets(index, rows, fps)
        check_parts([bucket.batch for bucket in buckets], world_size=world_size, accumulation=accumulation)
        self.index, self.latents = index, latents
        self.order = Order(
            buckets,
            seed=seed,
            block_shards=block_shards,
            set_shards=index.set_shards,
            weights=weights,
            image_ratio=image_ratio,
        )
        self.accumulation = accumulation
        self._workers, self._pin = workers, pin
        reader = ClipReader(index, fps=fps, cache_bytes=cache_bytes, decoder=decoder, latents=latents)
        self._dataset = _MicroBatches(reader, self.order, seed, flip, (rank, world_size, accumulation))

    def cached(self) -> tuple[int, int]:
        """(samples in buckets that have a latent of their bucket's size, samples in buckets)."""
        found = (
            0
            if self.latents is None
            else sum(self.latents.count(bucket.samples, bucket.shape) for bucket in self.order.buckets)
        )
        return found, sum(self.order.set_samples)

    def begin_order(self, step: int) -> None:
        """Let the order begin at a global step, before anything is read: data or shares have changed there."""
        self.order = self._dataset.order = self.order.beginning_at(step)

    def steps(self, start: int, stop: int) -> Iterator[list[ClipBatch]]:
        """Batches of the steps start, ..., stop - 1; each is a list with one micro-batch per accumulation pass."""
        pairs = ((step, one) for step in range(start, stop) for one in range(self.accumulation))
        batches = iter(
            DataLoader(
                self._dataset,
                batch_size=None,
                sampler=pairs,
                num_workers=self._workers,
                prefetch_factor=4 if self._workers else None,
                pin_memory=self._pin,
            )
        )
        try:
            for _ in range(start, stop):
                yield [_or_raise(next(batches)) for _ in range(self.accumulation)]
        finally:
            # The workers end when the last reference goes; an error's traceback would keep one until who knows when.
            del batches


def _or_raise(batch: ClipBatch | str) -> ClipBatch:
    if isinstance(batch, str):
        raise UserError(batch)
    return batch
