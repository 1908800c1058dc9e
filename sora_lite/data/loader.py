"""Batches of clips in the exact order, decoded by worker processes.

A worker is given (step, pass) pairs and returns whole micro-batches, so what a batch holds depends on neither the
number of workers nor which one made it.

Shapes: B samples of a rank's micro-batch, T frames, H W pixels.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_lite.data.buckets import Row, spare_frames
from sora_lite.data.compiled import open_buckets
from sora_lite.data.index import Index
from sora_lite.data.joined import (
    CaptionFeatures,
    CaptionReader,
    Joined,
    Latent,
    LatentReader,
    Members,
    stack_features,
)
from sora_lite.data.order import MicroStep, Order, check_parts, hash_seed, rank_positions
from sora_lite.data.prefetch import Prefetcher
from sora_lite.data.remote import ReadCounts
from sora_lite.data.shard_cache import RemoteShard, default_cache
from sora_lite.data.shards import DamagedSample
from sora_lite.data.transforms import cover_box, mirror, resize_crop
from sora_lite.data.video import BadVideo, decode_clip
from sora_lite.data.workers import Workers
from sora_lite.errors import UserError

MAX_REPLACEMENTS = 16


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

    video: uint8 V 3 T H W in [0, 255]. mean, logvar: float32 B-V C t h w, unnormalised posteriors; None where V is B.
    is_latent: bool B, which of the samples are not in `video`. keys: of the samples. captions: one per sample, "" for
    none. labels: int64 B, -1 for none. positions: int64 B, places in the global step's batch. step: the global step.
    views: one per sample. samples: int64 B, their numbers in the index. bucket: number of the bucket. bad: samples
    replaced. seconds: that making the batch took its worker. reads: what it read meanwhile.

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

    def pin_memory(self) -> "ClipBatch":
        """The same in memory that a device copies from."""
        heavy = {name: getattr(self, name) for name in ("video", "mean", "logvar", "text", "text_mask", "pooled")}
        return replace(self, **{name: one.pin_memory() for name, one in heavy.items() if one is not None})


@dataclass(kw_only=True, slots=True, frozen=True)
class Clip:
    """A sample, decoded or as a latent, the part of its own frames that is (`View.crop`), and what is known of it.

    pixels: uint8 T H W 3, None of a latent. text: of its captions, where it was made beforehand. label: -1 for none.
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
        return self.pixels

    def said(self, number: int) -> str:
        """A caption; "" where there is none."""
        return self.captions[number % len(self.captions)] if self.captions else ""


def collate(clips: Sequence[Clip], shape: tuple[int, int, int], *, said: Sequence[int], **rest: Any) -> ClipBatch:
    """Clips of one (T, H, W) as a batch, with the fields of `ClipBatch` that the clips do not say.

    said: which of a clip's captions counts, as any number, of which the remainder is taken.
    """
    text = [clip.text and clip.text.caption(number % len(clip.text)) for clip, number in zip(clips, said, strict=True)]
    rest |= {name: torch.from_numpy(array) for name, array in stack_features(text).items()}
    frames = [clip.pixels for clip in clips if clip.pixels is not None]
    latents = [clip.latent for clip in clips if clip.latent is not None]
    video = np.stack(frames) if frames else np.empty((0, *shape, 3), np.uint8)
    return ClipBatch(
        video=torch.from_numpy(video).permute(0, 4, 1, 2, 3),
        mean=torch.from_numpy(np.stack([latent.mean for latent in latents])) if latents else None,
        logvar=torch.from_numpy(np.stack([latent.logvar for latent in latents])) if latents else None,
        is_latent=torch.tensor([clip.latent is not None for clip in clips]),
        labels=torch.tensor([clip.label for clip in clips]),
        captions=[clip.said(number) for clip, number in zip(clips, said, strict=True)],
        **rest,
    )


class ClipReader:
    """Reads samples of an index at a bucket's size, with a bounded memory of decoded clips.

    A sample that has a latent of this size and rate in `latents` is not decoded; features of its captions that are in
    `text` come along.
    """

    def __init__(
        self,
        index: Index,
        *,
        cache_bytes: int,
        decoder: str = "pyav",
        latents: Joined | None = None,
        text: Joined | None = None,
    ) -> None:
        self.index = index
        self._decoder = decoder
        self._cache_bytes = cache_bytes
        self._cached = 0
        self._cache: OrderedDict[tuple[int, tuple[int, int, int], float | None, int], Clip] = OrderedDict()
        self._members = Members(index)
        self.shards = self._members.shards
        self._latents = LatentReader(latents, self.shards.counts) if latents is not None else None
        self._text = CaptionReader(text, self.shards.counts) if text is not None else None

    def spare(self, sample: int, frames: int, fps: float | None) -> int:
        """Largest `start` at which the sample still has so many frames at a rate."""
        return spare_frames(int(self.index.frames[sample]), float(self.index.fps[sample]), fps, frames)

    def read(self, sample: int, shape: tuple[int, int, int], fps: float | None = None, start: int = 0) -> Clip:
        """Sample number `sample` at (T, H, W) and a rate (None: its own): its latent, or decoded from frame `start` on.

        Raises:
            DamagedSample, BadVideo: its bytes are not what the index says, or do not decode.
            UserError: the features of its captions are of others.
        """
        clip = self._seen(sample, shape, fps, start)
        if self._text is None or (row := self._text.find(sample)) is None:
            return clip
        return replace(clip, text=self._text.read(row, clip.captions))

    def _seen(self, sample: int, shape: tuple[int, int, int], fps: float | None, start: int) -> Clip:
        """The sample without its text."""
        label = int(self.index.label[sample])
        if (found := self._latent(sample, shape, fps)) is not None:
            latents, row = found
            latent, captions = latents.read(row)
            shown = int(self.index.height[sample]), int(self.index.width[sample])
            return Clip(latent=latent, crop=self._crop(sample, shape, shown), captions=captions, label=label)
        key = (sample, shape, fps, start)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        index, captions = self.index, self.captions(sample)
        media = self._members.media(sample)
        decoded = decode_clip(
            media,
            frames=shape[0],
            fps=fps,
            own_fps=float(index.fps[sample]),
            start_frame_offset=start,
            decoder=self._decoder,
        )
        box = self._crop(sample, shape, (decoded.shape[1], decoded.shape[2]))
        frames = resize_crop(decoded, shape[1:], box)
        clip = Clip(pixels=frames, crop=box, captions=captions, label=label)
        if frames.nbytes <= self._cache_bytes:
            self._cache[key] = clip
            self._cached += frames.nbytes
            while self._cached > self._cache_bytes:
                _, oldest = self._cache.popitem(last=False)
                self._cached -= oldest.frames.nbytes
        return clip

    def _crop(
        self, sample: int, shape: tuple[int, int, int], stored: tuple[int, int]
    ) -> tuple[float, float, float, float]:
        """The centred part of decoded frames of a size (height, width) that a clip shows.

        It has the clip's aspect ratio as people see the sample, whose pixels need not be square.
        """
        shown = int(self.index.height[sample]), int(self.index.width[sample])
        left, top, right, bottom = cover_box(shown, shape[1:])
        tall, wide = stored[0] / shown[0], stored[1] / shown[1]
        return left * wide, top * tall, right * wide, bottom * tall

    def captions(self, sample: int) -> list[str]:
        """The sample's captions, as `shards.captions_of`."""
        return self._members.captions(sample)

    def meta(self, sample: int) -> dict:
        """The sample's JSON, {} for none."""
        return self._members.meta(sample)

    def is_remote(self) -> bool:
        """Whether any shard lies behind a URL."""
        made = [one.index for one in (self._latents, self._text) if one is not None]
        return any(index.is_remote() for index in [self.index, *made])

    def remote_shards(self, sample: int, shape: tuple[int, int, int], fps: float | None) -> list[RemoteShard]:
        """The shards that `read` opens for a sample, as far as they lie behind URLs."""
        rows = [self._source(sample, shape, fps)]
        if self._text is not None and (row := self._text.find(sample)) is not None:
            rows.append((self._text.index, row))
        shards = (index.remote_shard(int(index.shard[row])) for index, row in rows)
        return [shard for shard in shards if shard is not None]

    def shard_name(self, sample: int, shape: tuple[int, int, int], fps: float | None) -> str:
        """Name of the shard that a sample, or its latent where that is read, lies in."""
        index, row = self._source(sample, shape, fps)
        return index.shard_paths[int(index.shard[row])].name

    def _source(self, sample: int, shape: tuple[int, int, int], fps: float | None) -> tuple[Index, int]:
        """The index, and the number there, of the clip or latent that a sample is read from."""
        found = self._latent(sample, shape, fps)
        return (self.index, sample) if found is None else (found[0].index, found[1])

    def _latent(self, sample: int, shape: tuple[int, int, int], fps: float | None) -> tuple[LatentReader, int] | None:
        """The latent of a sample at (T, H, W) and a rate, by its reader and number, if there is one."""
        if self._latents is None:
            return None
        row = self._latents.find(sample, shape, float(self.index.fps[sample]) if fps is None else fps)
        return None if row is None else (self._latents, row)


class _MicroBatches:
    """Item (step, pass) gives this rank's micro-batch."""

    def __init__(self, reader: ClipReader, order: Order, seed: int, flip: bool, parts: tuple[int, int, int]) -> None:
        self.reader, self.order, self.seed, self.flip = reader, order, seed, flip
        self.rank, self.world_size, self.accumulation = parts

    def __call__(self, item: tuple[int, int]) -> ClipBatch:
        start = time.perf_counter()
        batch = self._batch(*item)
        return replace(batch, seconds=time.perf_counter() - start, reads=self.reader.shards.counts.take())

    def remote_shards(self, step: int) -> list[RemoteShard]:
        """The shards behind URLs that this rank reads in a step."""
        (micro,) = self.order.step(step)
        positions = np.concatenate(
            rank_positions(
                len(micro.samples), rank=self.rank, world_size=self.world_size, accumulation=self.accumulation
            )
        )
        fps = self.order.buckets[micro.bucket].fps
        samples = micro.samples[positions].tolist()
        shards = (self.reader.remote_shards(sample, micro.shape, fps) for sample in samples)
        return list(dict.fromkeys(itertools.chain.from_iterable(shards)))

    def _batch(self, step: int, one_pass: int) -> ClipBatch:
        (micro,) = self.order.step(step)
        positions = rank_positions(
            len(micro.samples), rank=self.rank, world_size=self.world_size, accumulation=self.accumulation
        )[one_pass]
        bad: list[BadSample] = []
        clips, samples, views, keys, said = [], [], [], [], []
        for position in positions:
            sample, start, clip = self._read(micro, step, int(position), bad)
            flip = self.flip and clip.latent is None and hash_seed(self.seed, step, position, "flip") % 2 == 1
            clips.append(replace(clip, pixels=mirror(clip.frames)) if flip else clip)
            samples.append(sample)
            views.append(View(start=0 if clip.latent is not None else start, crop=clip.crop, flip=flip))
            keys.append(self.reader.index.key(sample))
            said.append(hash_seed(self.seed, step, position, "caption"))
        return collate(
            clips,
            micro.shape,
            keys=keys,
            said=said,
            positions=torch.from_numpy(positions),
            step=step,
            views=views,
            samples=torch.tensor(samples),
            bucket=micro.bucket,
            bad=bad,
        )

    def _read(self, micro: MicroStep, step: int, position: int, bad: list[BadSample]) -> tuple[int, int, Clip]:
        """(sample, its own frame that the clip begins with, clip) at a position, or a stand-in where it is damaged."""
        index, first, fps = self.reader.index, int(micro.samples[position]), self.order.buckets[micro.bucket].fps
        sample, damaged = first, []
        for attempt in range(MAX_REPLACEMENTS):
            try:
                spare = self.reader.spare(sample, micro.shape[0], fps)
                start = hash_seed(self.seed, step, position, "start") % (spare + 1)
                clip = self.reader.read(sample, micro.shape, fps, start)
            except (DamagedSample, BadVideo) as error:
                damaged.append((sample, str(error)))
                sample = self.order.replacement(micro.bucket, first, step, position, attempt)
                continue
            bad += [
                BadSample(
                    key=index.key(one),
                    shard=self.reader.shard_name(one, micro.shape, fps),
                    reason=reason,
                    step=step,
                    position=position,
                    replaced_by=index.key(sample),
                )
                for one, reason in damaged
            ]
            return sample, start, clip
        one, reason = damaged[-1]
        raise UserError(
            f"{self.reader.shard_name(one, micro.shape, fps)}: {MAX_REPLACEMENTS} samples in a row are damaged "
            f"(the last: {reason}); run `sora-data verify` on the shards"
        )


class ClipLoader:
    """This rank's view of a data set.

    Args:
        index: of one split.
        rows: bucket table with batches decided (`buckets.rows_from`).
        weights, image_ratio: how the index's data sets, stills and clips are mixed (`order.Order`).
        seed, block_shards, flip: as configured.
        rank, world_size, accumulation: how each batch is divided.
        workers: decoding processes. cache_bytes: memory of decoded clips in each.
        worker_timeout: seconds after which a worker that makes no batch is started anew.
        say: told of such things.
        pin: pinned memory, for a device that copies from it.
        decoder: as for `video.decode_clip`.
        latents: of the index's clips; those that have none are decoded.
        text: features of the clips' captions, where they were made beforehand.

    Raises:
        UserError: a batch cannot be divided so, or the rows do not fit the data.
    """

    def __init__(
        self,
        index: Index,
        rows: list[Row],
        *,
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
        text: Joined | None = None,
        worker_timeout: float = 900.0,
        say: Callable[[str], None] = print,
    ) -> None:
        buckets = open_buckets(index, rows)
        check_parts([bucket.batch for bucket in buckets], world_size=world_size, accumulation=accumulation)
        self.index, self.latents, self.text = index, latents, text
        self.order = Order(
            buckets,
            seed=seed,
            block_shards=block_shards,
            set_shards=index.set_shards,
            weights=weights,
            image_ratio=image_ratio,
        )
        self.accumulation = accumulation
        self._pin, self._say = pin, say
        reader = ClipReader(index, cache_bytes=cache_bytes, decoder=decoder, latents=latents, text=text)
        self._dataset = _MicroBatches(reader, self.order, seed, flip, (rank, world_size, accumulation))
        self.workers = Workers(self._dataset, workers, timeout=worker_timeout, say=say)
        cache = index.shard_cache or default_cache()
        self._prefetcher = Prefetcher(cache, self._dataset.remote_shards) if reader.is_remote() else None

    def cached(self) -> tuple[int, int]:
        """(samples in buckets that have a latent of their bucket's size, samples in buckets)."""
        found = 0
        if self.latents is not None:
            for bucket in self.order.buckets:
                samples, fps = bucket.samples, bucket.fps
                rates = self.index.fps[samples] if fps is None else np.full(len(samples), fps)
                found += self.latents.count(samples, bucket.shape, rates)
        return found, sum(self.order.set_samples)

    def captioned(self) -> int:
        """Samples in buckets whose captions' features were made beforehand."""
        if self.text is None:
            return 0
        return sum(int((self.text.rows[bucket.samples] >= 0).sum()) for bucket in self.order.buckets)

    def begin_order(self, step: int) -> None:
        """Let the order begin at a global step, before anything is read: data or shares have changed there."""
        self.order = self._dataset.order = self.order.beginning_at(step)

    def steps(self, start: int, stop: int) -> Iterator[list[ClipBatch]]:
        """Batches of the steps start, ..., stop - 1; each is a list with one micro-batch per accumulation pass."""
        pairs = ((step, one) for step in range(start, stop) for one in range(self.accumulation))
        with ExitStack() as ending:
            if self._prefetcher is not None:
                ending.enter_context(self._prefetcher.running(start, stop))
            batches = self.workers.answers(pairs)
            ending.callback(batches.close)
            for step in range(start, stop):
                together = [next(batches) for _ in range(self.accumulation)]
                if self._prefetcher is not None:
                    if self._prefetcher.go_on(step):
                        self._say("the process that fetches shards ahead died and was started anew")
                        self.workers.restarts += 1
                    together[0].reads.add(self._prefetcher.take())
                yield [batch.pin_memory() for batch in together] if self._pin else together
