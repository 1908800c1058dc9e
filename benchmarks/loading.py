"""Clips per CPU second through the whole loader, worker processes included: against the bare decoder at the same number
of processes, and against stock webdataset with decord in torch's DataLoader. And what memory does over many samples.
Pipelines are measured once they have got going, so neither their start nor memory that is touched first counts; ours
also as a run that begins and ends.

All read the same shards and give the same frames. The bare decoder has the clips' bytes at hand and keeps nothing; the
stock pipeline neither checks a checksum nor knows which sample comes in which step.
"""

import io
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.packing import footage
from sora_lite.data.buckets import Row
from sora_lite.data.index import Index
from sora_lite.data.joined import Joined
from sora_lite.data.loader import ClipLoader
from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import Sample, ShardReader, ShardWriter
from sora_lite.data.video import encode_mp4

FPS, SIZE, FRAMES, STRIDE = 24, (256, 456), 17, 4
BATCH, SHARDS, WORKERS, ROUNDS, CLIPS = 8, 4, 2, 3, 64
STARTING = 8
"""Batches after which a pipeline has its processes and memory."""
BATCHES = {1: 24, STRIDE: 12}
"""That are measured then, by stride."""
LONG_RUN, TINY = 20_000, (5, 64, 64)


def write_shards(folder: Path, count: int, sample: Callable[[int], Sample], content: str = "clips") -> Index:
    """A data set of so many samples."""
    folder.mkdir()
    manifest = Manifest(config_hash="", content=content)
    for shard in range(SHARDS):
        with ShardWriter(folder / f"train-{shard:06d}.tar", split="train") as writer:
            for number in range(shard, count, SHARDS):
                writer.add(sample(number))
        manifest.shards.append(writer.entry)
    manifest.save(folder)
    return Index.load(folder, "train", content=content)


def write_clips(folder: Path, media: list[bytes], shape: tuple[int, int, int], count: int) -> Index:
    """A data set of so many clips, which repeat `media`."""

    def clip(number: int) -> Sample:
        return Sample(key=f"clip{number:06d}", ext="mp4", media=media[number % len(media)], meta=facts(number, shape))

    return write_shards(folder, count, clip)


def facts(number: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The JSON of a clip."""
    meta = {"frames": shape[0], "height": shape[1], "width": shape[2], "fps": float(FPS)}
    return meta | {"source": {"sha256": f"{number:064x}"}, "captions": ["a texture that drifts"]}


def loader(
    index: Index,
    shape: tuple[int, int, int],
    fps: float | None,
    decoder: str = "pyav",
    workers: int = WORKERS,
    latents: Joined | None = None,
) -> ClipLoader:
    """Ours, as training makes it."""
    return ClipLoader(
        index, [Row(shape=shape, keep=1.0, batch=BATCH, fps=fps)],
        seed=0, block_shards=2, flip=False, rank=0, world_size=1, accumulation=1, workers=workers,
        cache_bytes=0, pin=False, decoder=decoder, latents=latents,
    )  # fmt: skip


def cpu_seconds() -> float:
    """Of this process and its children so far, those that have ended included, to 10 ms."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [one.cpu_times() for one in family]
    return sum(one.user + one.system + one.children_user + one.children_system for one in times)


def steady(batches: Iterator[Any], count: int) -> float:
    """CPU seconds of so many batches of an endless iterator that has got going."""
    for _ in range(STARTING):
        next(batches)
    start = cpu_seconds()
    for _ in range(count):
        next(batches)
    return cpu_seconds() - start


def run_ours(index: Index, stride: int, decoder: str) -> float:
    """CPU seconds of `BATCHES`."""
    return steady(loader(index, (FRAMES, *SIZE), FPS / stride, decoder).steps(0, 10**6), BATCHES[stride])


def run_whole(index: Index, stride: int, decoder: str) -> float:
    """CPU seconds of a run of `BATCHES`, from before its processes are there until they are gone."""
    start = cpu_seconds()
    for _ in loader(index, (FRAMES, *SIZE), FPS / stride, decoder).steps(0, BATCHES[stride]):
        pass
    return cpu_seconds() - start


def by_pyav(data: bytes, stride: int) -> np.ndarray:
    """As PyAV's own examples do it -> uint8 T H W 3."""
    with av.open(io.BytesIO(data)) as file:
        frames = islice(file.decode(video=0), 0, (FRAMES - 1) * stride + 1, stride)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def by_decord(data: bytes, stride: int) -> np.ndarray:
    """As decord's own examples do it, with one thread -> uint8 T H W 3."""
    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return reader.get_batch(range(0, (FRAMES - 1) * stride + 1, stride)).asnumpy()


BARE = {"pyav": by_pyav, "decord": by_decord}


def run_bare(media: list[bytes], stride: int, decoder: str) -> float:
    """CPU seconds of the decoder alone for as many clips, in as many processes."""

    def decode(one: int) -> None:
        for number in range(one, BATCHES[stride] * BATCH, WORKERS):
            BARE[decoder](media[number % len(media)], stride)

    return in_processes(decode)


def in_processes(work: Callable[[int], None]) -> float:
    """CPU seconds of work(0), work(1), ..., each in a process of its own."""
    fork = multiprocessing.get_context("fork")
    seconds = fork.SimpleQueue()

    def measured(one: int) -> None:
        start = time.process_time()
        work(one)
        seconds.put(time.process_time() - start)

    workers = [fork.Process(target=measured, args=(one,)) for one in range(WORKERS)]  # type: ignore[attr-defined]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(seconds.get() for _ in workers)


def run_stock(paths: list[str], stride: int) -> float:
    """CPU seconds of `BATCHES` of what people write with webdataset."""

    def prepare(row: dict[str, Any]) -> tuple[torch.Tensor, bytes]:
        return torch.from_numpy(by_decord(row["mp4"], stride)).permute(3, 0, 1, 2), row["json"]

    dataset = webdataset.WebDataset(paths, shardshuffle=SHARDS).shuffle(32).map(prepare).repeat()
    return steady(iter(DataLoader(dataset.batched(BATCH), batch_size=None, num_workers=WORKERS)), BATCHES[stride])


def take_turns(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of the CPU seconds that each says, one after the other in every round."""
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            seconds[name].append(call())
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(folder: Path, stride: int, frames: Iterator[np.ndarray], rounds: int) -> None:
    """The table for 17 frames out of clips that are just so long."""
    length = (FRAMES - 1) * stride + 1
    media = [encode_mp4([next(frames) for _ in range(length)], FPS, 20) for _ in range(4)]
    index = write_clips(folder / f"stride{stride}", media, (length, *SIZE), CLIPS)
    paths = [str(path) for path in index.shard_paths]
    with ShardReader(index.shard_paths[0]) as shard:
        assert shard.read(int(index.media_offset[0]), int(index.media_size[0]), int(index.crc32c[0])) == media[0]
    seconds = take_turns(
        {
            "PyAV alone": lambda: run_bare(media, stride, "pyav"),
            "sora_lite, decoder=pyav": lambda: run_ours(index, stride, "pyav"),
            "  with its start and end": lambda: run_whole(index, stride, "pyav"),
            "decord alone": lambda: run_bare(media, stride, "decord"),
            "sora_lite, decoder=decord": lambda: run_ours(index, stride, "decord"),
            "  with its start and end, decord": lambda: run_whole(index, stride, "decord"),
            "webdataset, decord, DataLoader": lambda: run_stock(paths, stride),
        },
        rounds,
    )
    alone = [seconds["PyAV alone"], seconds["decord alone"]]
    stock = seconds["webdataset, decord, DataLoader"]
    print(f"loading {FRAMES} frames of {SIZE[0]} x {SIZE[1]} at stride {stride}, {WORKERS} processes")
    print(f"  {'':<34}{'clips/s':>9}{'of bare':>10}{'of stock':>10}")
    for name, value in seconds.items():
        bare = alone["decord" in name] / value
        print(f"  {name:<34}{BATCHES[stride] * BATCH / value:>9.1f}{bare:>9.2f}x{stock / value:>9.2f}x")


def watch_memory(folder: Path, samples: int) -> None:
    """Resident memory of this process and of its workers while many small clips go by."""
    rng = np.random.default_rng(0)
    media = [encode_mp4(list(rng.integers(0, 256, (TINY[0], *TINY[1:], 3), np.uint8)), FPS, 30) for _ in range(8)]
    clips = loader(write_clips(folder / "tiny", media, TINY, 4000), TINY, None)
    steps, seen, resident = samples // BATCH, [], []
    for step, _ in enumerate(clips.steps(0, steps)):
        if step % (steps // 40) == 0:
            seen.append(step * BATCH)
            resident.append([resident_kib(process) for process in (os.getpid(), *clips.workers.processes)])
    settled = len(seen) // 4  # the first samples fill buffers
    slopes = np.polyfit(seen[settled:], resident[settled:], 1)[0] * 1000
    print(f"memory over {samples:,} samples {'after a quarter':>26}{'at the end':>13}{'KiB per 1,000 samples':>24}")
    for number, slope in enumerate(slopes):
        start, end = (resident[moment][number] / 1024 for moment in (settled, -1))
        name = f"worker {number}" if number else "the process that trains"
        print(f"  {name:<34}{start:>13.1f} MiB{end:>9.1f} MiB{slope:>24.1f}")


def resident_kib(process: int) -> float:
    """Memory of a process that no file lies behind, in KiB: with what it shares with its parent until one writes there,
    so that writing does not count as growth."""
    status = Path(f"/proc/{process}/status").read_text()
    return sum(float(size) for size in re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", status))


def main(*, samples: int = LONG_RUN, rounds: int = ROUNDS, strides: Sequence[int] = tuple(BATCHES)) -> None:
    """Print the tables."""
    small = (np.asarray(Image.fromarray(frame).resize(SIZE[::-1], Image.Resampling.BICUBIC)) for frame in footage(400))
    with tempfile.TemporaryDirectory() as folder:
        for stride in strides:
            compare(Path(folder), stride, small, rounds)
        watch_memory(Path(folder), samples)
