"""Batches of clips in the exact order, decoded by worker processes.

A worker is given (step, pass) pairs and returns whole micro-batches, so what a batch holds depends on neither the
number of workers nor which one made it.

Shapes: T frames, H W pixels.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from sora_lite.data.batch import Allocate, BadSample, Clip, ClipBatch, Places, View
from sora_lite.data.buckets import Row, spare_frames
from sora_lite.data.compiled import open_buckets
from sora_lite.data.index import Index
from sora_lite.data.joined import CaptionReader, Joined, LatentReader, Members
from sora_lite.data.order import MicroStep, Order, check_parts, hash_seed, rank_positions
from sora_lite.data.prefetch import Prefetcher
from sora_lite.data.shard_cache import RemoteShard, default_cache
from sora_lite.data.shards import DamagedSample
from sora_lite.data.transforms import cover_box, mirror, resize_crop
from sora_lite.data.video import BadVideo, decode_planes
from sora_lite.data.workers import Workers
from sora_lite.errors import UserError

MAX_REPLACEMENTS = 16


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
        self.packed = decoder == "decord"
        """Whether frames are decoded into packed pixels."""
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

    def read(
        self,
        sample: int,
        shape: tuple[int, int, int],
        fps: float | None = None,
        start: int = 0,
        *,
        places: Places | None = None,
        flip: bool = False,
    ) -> Clip:
        """Sample number `sample` at (T, H, W) and a rate (None: its own): its latent, or decoded from frame `start` on.

        places: where it is written to; memory of its own by default. flip: mirrored left to right, unless a latent.
        Raises:
            DamagedSample, BadVideo: its bytes are not what the index says, or do not decode.
            UserError: the features of its captions are of others.
        """
        clip = self._seen(sample, shape, fps, start, places or Places(1, shape), flip)
        if self._text is None or (row := self._text.find(sample)) is None:
            return clip
        return replace(clip, text=self._text.read(row, clip.captions))

    def _seen(
        self, sample: int, shape: tuple[int, int, int], fps: float | None, start: int, places: Places, flip: bool
    ) -> Clip:
        """The sample without its text."""
        index, label = self.index, int(self.index.label[sample])
        if (found := self._latent(sample, shape, fps)) is not None:
            latents, row = found
            latent, captions = latents.read(row)
            crop = self._crop(sample, shape, (int(index.height[sample]), int(index.width[sample])))
            return Clip(latent=places.latent(latent), crop=crop, captions=captions, label=label)
        pixels = places.video()
        out = mirror(pixels) if flip else pixels
        key = (sample, shape, fps, start)
        if (cached := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            assert cached.pixels is not None
            out[:] = cached.pixels
            return replace(cached, pixels=pixels)
        captions = self.captions(sample)
        crop = self._decode(sample, fps, start, out)
        clip = Clip(pixels=pixels, crop=crop, captions=captions, label=label)
        if pixels.nbytes <= self._cache_bytes:
            self._remember(key, replace(clip, pixels=out.copy("K")))
        return clip

    def _decode(self, sample: int, fps: float | None, start: int, out: np.ndarray) -> tuple[float, float, float, float]:
        """Write a sample's frames to uint8 3 T H W -> the part of them that is shown."""
        frames = decode_planes(
            self._members.media(sample),
            frames=out.shape[1],
            fps=fps,
            own_fps=float(self.index.fps[sample]),
            start_frame_offset=start,
            decoder=self._decoder,
        )
        crop = (0.0, 0.0, 0.0, 0.0)
        for number, planes in enumerate(frames):
            if number == 0:
                crop = self._crop(sample, out.shape[1:], planes[0].shape)
            resize_crop(planes, out[:, number], crop)
        return crop

    def _remember(self, key: tuple[int, tuple[int, int, int], float | None, int], clip: Clip) -> None:
        self._cache[key] = clip
        self._cached += clip.frames.nbytes
        while self._cached > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached -= oldest.frames.nbytes

    def _crop(self, sample: int, shape: tuple[int, ...], stored: tuple[int, ...]) -> tuple[float, float, float, float]:
        """The centred part of decoded frames of a size (height, width) that a clip shows.

        It has the clip's aspect ratio as people see the sample, whose pixels need not be square.
        """
        shown = int(self.index.height[sample]), int(self.index.width[sample])
        left, top, right, bottom = cover_box(shown, (shape[1], shape[2]))
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

    def __call__(self, item: tuple[int, int], allocate: Allocate) -> ClipBatch:
        start = time.perf_counter()
        batch = self._batch(*item, allocate)
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

    def _batch(self, step: int, one_pass: int, allocate: Allocate) -> ClipBatch:
        (micro,) = self.order.step(step)
        positions = rank_positions(
            len(micro.samples), rank=self.rank, world_size=self.world_size, accumulation=self.accumulation
        )[one_pass]
        places = Places(len(positions), micro.shape, allocate, packed=self.reader.packed)
        bad: list[BadSample] = []
        samples, views, keys = [], [], []
        for position in positions.tolist():
            flip = self.flip and hash_seed(self.seed, step, position, "flip") % 2 == 1
            sample, start, clip = self._read(micro, step, position, flip, places, bad)
            places.keep(clip, said=hash_seed(self.seed, step, position, "caption"))
            samples.append(sample)
            decoded = clip.latent is None
            views.append(View(start=start if decoded else 0, crop=clip.crop, flip=flip and decoded))
            keys.append(self.reader.index.key(sample))
        return places.batch(
            keys=keys,
            positions=torch.from_numpy(positions),
            step=step,
            views=views,
            samples=torch.tensor(samples),
            bucket=micro.bucket,
            bad=bad,
        )

    def _read(
        self, micro: MicroStep, step: int, position: int, flip: bool, places: Places, bad: list[BadSample]
    ) -> tuple[int, int, Clip]:
        """(sample, its own frame that the clip begins with, clip) at a position, or a stand-in where it is damaged."""
        index, first, fps = self.reader.index, int(micro.samples[position]), self.order.buckets[micro.bucket].fps
        sample, damaged = first, []
        for attempt in range(MAX_REPLACEMENTS):
            try:
                spare = self.reader.spare(sample, micro.shape[0], fps)
                start = hash_seed(self.seed, step, position, "start") % (spare + 1)
                clip = self.reader.read(sample, micro.shape, fps, start, places=places, flip=flip)
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
        self.workers = Workers(self._dataset, workers, timeout=worker_timeout, together=accumulation, say=say)
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

    def ready(self) -> bool:
        """Whether the next of `steps` need not be waited for, as far as the workers have shown."""
        return self.workers.ready(self.accumulation)

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
