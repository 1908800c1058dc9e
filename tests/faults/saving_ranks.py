"""Ranks that save the tiny model of `tests/dist`, and what tests plant at their border to the file system."""

import builtins
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dist_model as dm

from sora_lite.config import OnFailedSave
from sora_lite.parallel.env import Rank
from sora_lite.training.checkpoint import Saver
from sora_lite.training.ema import EMA
from sora_lite.training.engine import Engine

STAGE = 2


def make(rank: Rank, stage: int = STAGE) -> tuple[Engine, EMA]:
    engine = dm.make_engine(rank, stage)
    return engine, EMA(engine, dm.OPTIM.ema_decay)


def saver_of(engine: Engine, ema: EMA, folder: Path, **options: Any) -> Saver:
    options = {"keep_last": 2, "background": False, "say": lambda line: None} | options
    return Saver(folder, {"model": engine}, {"model": ema}, engine.rank, **options)


def save(engine: Engine, ema: EMA, folder: Path, step: int, **options: Any) -> Saver:
    saver = saver_of(engine, ema, folder, **options)
    saver.save(step, {})
    saver.finish()
    return saver


class Counted:
    """Counts what is done to the files under a folder: open for writing, write, fsync, rename, mkdir, unlink, rmdir.

    `at(n)` is called before the n-th, counted from 1. No option of the product leads here: it wraps what the
    interpreter offers, in this process alone.
    """

    def __init__(self, folder: Path, at: Callable[[int], None]) -> None:
        self.folder, self.at, self.count = str(folder), at, 0
        self.ours: set[int] = set()
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._wrapped(getattr(os, name)))
        fsync, opened, rmtree = os.fsync, io.open, shutil.rmtree
        counted = self

        def counted_fsync(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(counted.folder):
                counted._tick()
            fsync(descriptor)

        class File(io.BufferedWriter):
            def write(self, data: Any) -> int:
                counted._tick()
                return super().write(data)

            def flush(self) -> None:
                counted._tick()
                super().flush()

        def counted_open(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if "x" in mode and "b" in mode and str(path).startswith(counted.folder):
                counted._tick()
                return File(io.FileIO(path, mode.replace("b", "")))
            return opened(path, mode, *args, **options)

        os.fsync = counted_fsync
        io.open = builtins.open = counted_open
        shutil.rmtree = lambda path, *args, **options: (counted._tick(), rmtree(path, *args, **options))[1]

    def _wrapped(self, call: Callable) -> Callable:
        def wrapper(path: Any, *args: Any, **options: Any) -> Any:
            if str(path).startswith(self.folder):
                self._tick()
            return call(path, *args, **options)

        return wrapper

    def _tick(self) -> None:
        self.count += 1
        self.at(self.count)


def kill_at(n: int) -> Callable[[int], None]:
    return lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == n else None


def save_twice(rank: Rank, folder: str, victim: int, n: int, background: bool) -> int:
    """Save step 1, train, and save step 2, in which the victim dies at its n-th touch of a file. Its count of them."""
    engine, ema = make(rank)
    dm.train_step(engine, 0, ema)
    save(engine, ema, Path(folder), 1)
    dm.train_step(engine, 1, ema)
    counted = Counted(Path(folder), kill_at(n)) if rank.rank == victim else None
    save(engine, ema, Path(folder), 2, keep_last=1, background=background)
    return counted.count if counted else 0


STOP, WARN = OnFailedSave.stop, OnFailedSave.warn
