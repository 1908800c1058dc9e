"""Saving and restoring a checkpoint of one rank, hashes included, against raw writing, copying and reading.

Wall-clock time, since disks and threads are what is measured: candidates take turns, and the median speaks.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.measure import take_turns
from sora_lite.config import OptimConfig, ParallelConfig
from sora_lite.parallel.env import init_rank, shutdown
from sora_lite.training import restore
from sora_lite.training.checkpoint import Saver
from sora_lite.training.ema import EMA
from sora_lite.training.engine import Engine

WIDTH, DEPTH, ROUNDS, STALLS = 2048, 8, 9, 15


def write_raw(path: Path, data: np.ndarray) -> None:
    """The plain way: one write of everything, and one fsync. As with checkpoints, the file before it goes only then."""
    new = path.with_suffix(".new")
    with new.open("wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
    new.replace(path)


def read_raw(path: Path) -> None:
    """The plain way: into new memory, as a start has to."""
    data = memoryview(np.empty(path.stat().st_size, dtype=np.uint8))
    with path.open("rb", buffering=0) as file:
        while data and (count := file.readinto(data)):
            data = data[count:]


def main(*, width: int = WIDTH, rounds: int = ROUNDS) -> None:
    """Print the table."""
    rank = init_rank("cpu", threads=1)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(DEPTH)])
    engine = Engine(model, optim=OptimConfig(), parallel=ParallelConfig(zero_stage=2), rank=rank, global_batch=1)
    ema = EMA(engine, 0.999)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        waiting = Saver(root / "waiting", {"m": engine}, {"m": ema}, rank, keep_last=1, background=False)
        behind = Saver(root / "behind", {"m": engine}, {"m": ema}, rank, keep_last=1)
        waiting.save(0, {})
        assert waiting.newest is not None
        size = sum(file.stat().st_size for file in waiting.newest.iterdir())
        data, copy = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)
        write_raw(root / "raw", data)

        def save() -> None:
            waiting.save(1, {})

        def restore_all() -> None:
            assert waiting.newest is not None
            restore.load(waiting.newest, {"m": engine}, {"m": ema})

        found = take_turns(
            {
                "raw write and fsync": lambda: write_raw(root / "raw", data),
                "save, with hashes and fsync": save,
                "raw warm read": lambda: read_raw(root / "raw"),
                "restore, verified": restore_all,
            },
            rounds=rounds,
            clock=time.perf_counter,
        )
        found |= stalls(behind, data, copy)
    print(f"checkpoint of {size / 2**20:.0f} MiB on one rank, {torch.get_num_threads()} thread for torch, wall clock")
    for name, seconds in found.items():
        print(f"  {name:<44}{size / seconds / 1e9:>8.2f} GB/s")
    first, second, third, fourth, fifth, sixth = found.values()
    print(f"  saving: {first / second:.2f} of raw; restoring: {third / fourth:.2f} of raw", end="; ")
    print(f"stall of saving behind: {sixth / fifth:.2f} copies")
    engine.destroy()
    shutdown()


def stalls(saver: Saver, data: np.ndarray, copy: np.ndarray) -> dict[str, float]:
    """One copy in memory, and how long training waits for a save that is written behind it."""
    seconds: dict[str, list[float]] = {"copy in memory": [], "stall of a save in the background": []}
    for turn in range(STALLS + 1):
        start = time.perf_counter()
        np.copyto(copy, data)
        middle = time.perf_counter()
        saver.save(turn, {})
        end = time.perf_counter()
        saver.finish()
        if turn > 0:
            seconds["copy in memory"].append(middle - start)
            seconds["stall of a save in the background"].append(end - middle)
    return {name: statistics.median(values) for name, values in seconds.items()}
