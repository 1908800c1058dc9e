"""What the order of a very large data set costs: opening, memory, looking a step up, resuming. Of synthetic indexes.

python -m benchmarks.order --samples 100000000     # some 20 GB of disk, in --folder
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from sora_lite.data.buckets import Row
from sora_lite.data.compiled import open_buckets, open_index
from sora_lite.data.manifest import Manifest, ShardEntry
from sora_lite.data.order import Order
from sora_lite.data.shards import INDEX_SCHEMA

PER_SHARD = 1000
"""Samples in a shard: 256 MB to 1 GB of clips."""
SIZES = ((360, 640), (480, 480), (640, 360))
ROWS = [
    Row(shape=(frames, height, width), keep=keep, batch=batch)
    for frames, keep, batch in ((49, 0.5, 64), (17, 1.0, 192), (1, 1.0, 1024))
    for height, width in SIZES
]
WEIGHTS = [3.0, 1.0]
STEPS = 300
"""Steps that are looked up one after another."""


def write_set(folder: Path, samples: int, seed: int) -> None:
    """A data set with real index files and manifest; its tars have their size, and nothing in them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    sizes = np.array(SIZES, dtype=np.int32)
    manifest = Manifest(config_hash="")
    for number, start in enumerate(range(0, samples, PER_SHARD)):
        n = min(PER_SHARD, samples - start)
        sources = [f"{one:016x}" for one in rng.integers(0, 2**63, n)]
        pts = rng.integers(0, 10**6, n).tolist()
        media_size = rng.integers(200_000, 800_000, n)
        size = sizes[rng.integers(0, len(sizes), n)]
        ends = np.cumsum(media_size + 4096)
        columns = {
            "key": [f"{source}_{one}_{one + 9000}" for source, one in zip(sources, pts, strict=True)],
            "ext": ["mp4"] * n,
            "media_offset": ends - media_size - 4096,
            "media_size": media_size,
            "crc32c": rng.integers(0, 2**32, n, dtype=np.uint32),
            "json_offset": ends - 3000,
            "json_size": np.full(n, 900),
            "json_crc32c": rng.integers(0, 2**32, n, dtype=np.uint32),
            "text_offset": np.zeros(n, dtype=np.int64),
            "text_size": np.zeros(n, dtype=np.int64),
            "text_crc32c": np.zeros(n, dtype=np.uint32),
            "label": np.full(n, -1, dtype=np.int32),
            "frames": rng.choice(np.array([1, 20, 60, 120], dtype=np.int32), n),
            "height": size[:, 0],
            "width": size[:, 1],
            "fps": np.full(n, 16.0),
            "source": sources,
        }
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        name = f"train-{number:06d}"
        (folder / f"{name}.idx.parquet").write_bytes(content)
        with (folder / f"{name}.tar").open("wb") as tar:
            tar.truncate(int(ends[-1]))
        entry = ShardEntry(
            path=f"{name}.tar",
            bytes=int(ends[-1]),
            sha256=hashlib.sha256(content).hexdigest(),
            samples=n,
            split="train",
            index=f"{name}.idx.parquet",
            index_sha256=hashlib.sha256(content).hexdigest(),
        )
        manifest.shards.append(entry)
    manifest.save(folder)


def measure(folder: Path, first: int) -> dict[str, float]:
    """Seconds and bytes of one process that starts at a step, as a rank does."""
    before = time.perf_counter()
    index = open_index([folder / "a", folder / "b"], "train")
    opened = time.perf_counter()
    buckets = open_buckets(index, ROWS)
    order = Order(buckets, seed=0, block_shards=8, set_shards=index.set_shards, weights=WEIGHTS, image_ratio=0.2)
    order.fingerprint()
    ready = time.perf_counter()
    order.step(first)
    found = time.perf_counter()
    seconds, cpu = [], []
    for step in range(first + 1, first + STEPS):
        start, start_cpu = time.perf_counter(), time.process_time()
        order.step(step)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {
        "index": opened - before,
        "buckets and order": ready - opened,
        "first step": found - ready,
        "median step": float(np.median(seconds)),
        "99 of 100 steps": float(np.percentile(seconds, 99)),
        "slowest step": max(seconds),
        "slowest step, CPU time": max(cpu),
        "resident": psutil.Process().memory_info().rss,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_apart(folder: Path, first: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.order", "--measure", str(folder), "--step", str(first)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(samples: int = 10**6, folder: Path | None = None) -> None:
    """Print the table. folder: where the synthetic data sets go, and stay; by default a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        if not (place / "b" / "manifest.json").is_file():
            write_set(place / "a", samples - samples // 10, seed=0)
            write_set(place / "b", samples // 10, seed=1)
        compiled = measure_apart(place, 0)
        print(f"order of {samples:,} samples in 2 data sets, {samples // PER_SHARD:,} shards and {len(ROWS)} buckets")
        for what in ("index", "buckets and order"):
            print(f"  {f'compiling once: {what}':<44}{compiled[what]:>10.2f} s")
        print(f"  {'memory while compiling, at most':<44}{compiled['peak'] / 2**20:>10.0f} MiB")
        for first in (0, 10**6):
            figures = measure_apart(place, first)
            opening = figures["index"] + figures["buckets and order"]
            print(f"  starting at step {first:,}")
            print(f"  {'  opening index, buckets and order':<44}{opening:>10.2f} s")
            for what in ("first step", "median step", "99 of 100 steps", "slowest step", "slowest step, CPU time"):
                print(f"  {f'  {what} looked up':<44}{figures[what] * 1000:>10.2f} ms")
            print(f"  {'  resident memory after it':<44}{figures['resident'] / 2**20:>10.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="cost of the order of a synthetic index")
    parser.add_argument("--samples", type=int, default=10**6)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.step)))
    else:
        main(arguments.samples, arguments.folder)
