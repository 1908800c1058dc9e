"""What a W&B server that takes connections and never answers costs training, against W&B switched off.

Two processes do the same steps, each with a line of the record, in turns. Wall-clock time of the steps is
what a user waits; CPU time of the whole process counts the thread that feeds W&B too.
"""

import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.step import loss_of, make_model
from sora_lite.config import LoggingConfig, WandbMode
from sora_lite.training.tracking import Tracker

TURNS, STEPS = 60, 2
"""Turns of each process, and steps in a turn."""
METRICS = 24
"""Numbers in a line of the record."""


def main() -> None:
    """Print the table."""
    with socket.socket() as server, tempfile.TemporaryDirectory() as folder:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken: list[socket.socket] = []
        threading.Thread(target=lambda: taken.append(server.accept()[0]), daemon=True).start()
        port = server.getsockname()[1]
        off, silent = (Side(mode, Path(folder) / mode.name, port) for mode in (WandbMode.disabled, WandbMode.online))
        for _ in range(TURNS):
            off.turn()
            silent.turn()
        for side in (off, silent):
            side.end()
    wall = statistics.median(two / one for one, two in zip(off.wall, silent.wall, strict=True))
    half = TURNS // 2
    started = sum(silent.cpu[half:]) / sum(off.cpu[half:])
    extra = sum(silent.cpu[:half]) - sum(off.cpu[:half])
    step = statistics.median(off.wall) / STEPS
    print(
        f"{TURNS * STEPS} steps of {step * 1e3:.0f} ms, each with a line of {METRICS} numbers; "
        f"the server was {'asked' if taken else 'NEVER asked'}"
    )
    print("  W&B whose server is silent, over W&B off")
    print(f"  wall clock of steps, median over the turns        {wall:.3f}")
    print(f"  CPU time of the process, second half of the turns {started:.3f}")
    print(f"  CPU time once, when W&B is imported and started   {extra:.1f} s")


class Side:
    """A process that does steps when told to."""

    def __init__(self, mode: WandbMode, folder: Path, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(mode, folder, port, other))
        self._process.start()
        self._pipe.recv()
        self.wall: list[float] = []
        """Wall-clock seconds of each turn."""
        self.cpu: list[float] = []
        """CPU seconds of the process from one turn's end to the next one's."""

    def turn(self) -> None:
        """Do a turn's steps, and wait for them."""
        self._pipe.send(True)
        wall, cpu = self._pipe.recv()
        self.wall.append(wall)
        self.cpu.append(cpu)

    def end(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join()


def _work(mode: WandbMode, folder: Path, port: int, pipe: Connection) -> None:
    os.environ.update(WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="0" * 40)
    torch.set_num_threads(1)
    model = make_model()
    loss_of(model).backward()
    folder.mkdir()
    cpu = time.process_time()
    tracker = Tracker(folder, LoggingConfig(wandb=mode), resume_step=0, wandb_id=None, config={})
    step = 0
    pipe.send(True)
    while pipe.recv():
        start = time.perf_counter()
        for _ in range(STEPS):
            loss_of(model).backward()
            step += 1
            tracker.log(step, {f"metric_{n}": float(n) for n in range(METRICS)})
        end, before, cpu = time.perf_counter(), cpu, time.process_time()
        pipe.send((end - start, cpu - before))
    tracker.finish()
