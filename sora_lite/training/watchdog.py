"""A watchdog for each rank: when training makes no progress it says where every rank stands, and ends the job.

RUN/watchdog/
  beat_00003.json       sign of life of rank 3: its thread's, and the last progress of its training
  stacks_00003.txt      the Python stacks of rank 3 at the time that its watchdog ended it

Two clocks watch a rank. A thread of Python writes signs of life, and after `seconds` without progress it reads those of
all ranks, names who has stopped, dumps the stacks and ends the process. If the thread cannot run, because another one
holds the GIL for ever, C code (`faulthandler`) dumps the stacks and ends the process half as long after that. A rank
that is stopped from outside (SIGSTOP, a hung node) can do neither: the others miss its signs of life and name it, and
the launcher ends it with the job.
"""

import contextlib
import faulthandler
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

EXIT_STUCK = 70
"""Exit status of a rank that its watchdog ended (EX_SOFTWARE)."""
SHOWN = 8
"""Most waiting ranks that a report lists."""


class Watchdog:
    """Within it, `beat` must be called at least every `seconds`.

    Args:
        folder: RUN/watchdog, seen by all ranks.
        rank, world_size: this process.
        seconds: longest time without progress. It should be far shorter than the time-out of a collective.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, seconds: float) -> None:
        self._folder, self._rank, self._world_size, self._seconds = folder, rank, world_size, seconds
        self._period = seconds / 10
        self._done = threading.Event()
        self._progress = ("start", time.time(), time.monotonic())
        self._armed = -1e9
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: IO[str]

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = (self._folder / f"stacks_{self._rank:05d}.txt").open("w")
        self._write_sign()
        self.beat("start")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._stacks.close()
        if os.path.getsize(self._stacks.name) == 0:
            os.unlink(self._stacks.name)
        self._sign_path(self._rank).unlink(missing_ok=True)

    def beat(self, what: str) -> None:
        """Training makes progress; `what` it does now is shown where it stops there. Cheap: call it at will."""
        now = time.monotonic()
        self._progress = (what, time.time(), now)
        if now - self._armed > self._period:  # setting the C clock starts a thread
            faulthandler.dump_traceback_later(1.5 * self._seconds, exit=True, file=self._stacks)
            self._armed = now

    def go_on(self) -> None:
        """Training makes progress in what it does."""
        self.beat(self._progress[0])

    # ------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        while not self._done.wait(self._period):
            self._write_sign()
            if self._waited() > self._seconds:
                self._end()

    def _waited(self) -> float:
        """Seconds without progress, whatever is done to the clock on the wall meanwhile."""
        return time.monotonic() - self._progress[2]

    def _write_sign(self) -> None:
        what, since, _ = self._progress
        sign = {"host": platform.node(), "pid": os.getpid(), "alive": time.time(), "what": what, "since": since}
        temporary = self._sign_path(self._rank).with_suffix(".tmp")
        with contextlib.suppress(OSError):  # on a full disk this rank looks silent, and its training is watched still
            temporary.write_text(json.dumps(sign))
            temporary.replace(self._sign_path(self._rank))

    def _end(self) -> None:
        time.sleep(2 * self._period)  # so that the others, who wait for the same rank, have told where they stand
        report = self.report()
        print(report, file=sys.stderr, flush=True)
        try:
            self._stacks.write(report + "\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        finally:
            os._exit(EXIT_STUCK)

    def report(self) -> str:
        """Who has stopped, as far as the signs of life of all ranks tell, and where the others wait."""
        now = time.time()
        stopped, waiting = [], []
        for rank in range(self._world_size):
            sign = self._read_sign(rank)
            if sign is None:
                stopped.append(f"  rank {rank} has left no sign of life")
                continue
            where = f"rank {rank} ({sign['host']}, process {sign['pid']})"
            at = f"at {sign['what']!r} for {now - sign['since']:.0f} s"
            if (silent := now - sign["alive"]) > self._seconds / 2:
                stopped.append(
                    f"  {where} STOPPED: no sign of life for {silent:.0f} s, last {at}; the process is stopped, its "
                    "node hangs, or a thread holds the GIL"
                )
            else:
                waiting.append((sign["since"], f"  {where} waits {at}"))
        shown = [line for _, line in sorted(waiting)[:SHOWN]]
        if stopped == [] and shown:
            shown[0] += "  <- first to stop"
        more = [f"  and {len(waiting) - SHOWN} ranks that stopped later"] if len(waiting) > SHOWN else []
        head = f"watchdog of rank {self._rank}: no progress for {self._waited():.0f} s; stacks in {self._folder}"
        return "\n".join([head, *stopped, *shown, *more])

    def _read_sign(self, rank: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._sign_path(rank).read_text())
        except (OSError, ValueError):
            return None

    def _sign_path(self, rank: int) -> Path:
        return self._folder / f"beat_{rank:05d}.json"
