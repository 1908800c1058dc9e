"""Real training runs of several ranks, forked from a server that has imported everything: one costs seconds."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

os.environ["DS_ACCELERATOR"] = "cpu"  # read when the server imports DeepSpeed
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["sora_lite.cli.train", "sora_lite.cli.compose", "deepspeed", "torch._dynamo", "torch._inductor.compile_fx"]
)

Before = Callable[..., None]
"""before(rank, *args), called in a rank before it trains: where a test plants its fault."""


class Ranks:
    """`sora-lite ARGV` on `world` ranks. Their output goes to FOLDER/log_RANK.txt, in time to `log`."""

    def __init__(self, folder: Path, world: int, argv: list[str], before: Before | None = None, *args: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._log = folder / "log.txt"
        self._log.write_text("")
        self.processes = [
            _context.Process(target=_rank_main, args=(rank, world, port, argv, self._log, before, args))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    @property
    def log(self) -> str:
        """What all ranks have printed so far."""
        return self._log.read_text()

    def pid(self, rank: int) -> int:
        """Process of a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def wait_for(self, path: Path, text: str = "", seconds: float = 60) -> Self:
        """Until a file is there and holds a text."""
        end = time.monotonic() + seconds
        while not (path.exists() and text in path.read_text()):
            assert time.monotonic() < end and any(p.is_alive() for p in self.processes), f"no {path}\n{self.log}"
            time.sleep(0.02)
        return self

    def signal(self, rank: int, number: signal.Signals) -> Self:
        """Send a signal to a rank."""
        os.kill(self.pid(rank), number)
        return self

    def end(self, seconds: float = 60, *, kill_rest: bool = False) -> list[int | None]:
        """Exit status of each rank, when all have ended. kill_rest: as a launcher, once the first has failed."""
        end = time.monotonic() + seconds
        while any(p.is_alive() for p in self.processes):
            if time.monotonic() > end or (kill_rest and any(p.exitcode for p in self.processes)):
                break
            time.sleep(0.02)
        if kill_rest:  # as torchrun and srun do, with patience for those that are about to end by themselves
            for process in self.processes:
                process.join(5)
        statuses = [p.exitcode for p in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        assert kill_rest or None not in statuses, f"not over after {seconds} s\n{self.log}"
        return statuses


def _rank_main(
    rank: int, world: int, port: int, argv: list[str], log: Path, before: Before | None, args: tuple
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from sora_lite.cli import main

    if before is not None:
        before(rank, *args)
    sys.exit(main(argv))
