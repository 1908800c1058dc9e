"""Processes that do a sequence of work, in order; one that dies or hangs is started anew at the place where it was.

torch's DataLoader ends with the first of its workers that is killed, raises that error wherever the training loop
happens to be, and waits for ever for one that hangs. Here every worker has a pipe of its own, so that no lock and no
queue is shared with a process that may vanish, and what it owes is asked of its successor: the sequence is unchanged.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from sora_lite.data.batch import Allocate
from sora_lite.data.transport import Receiver, Sender
from sora_lite.errors import UserError
from sora_lite.memory import keep_memory

Item = TypeVar("Item")
Answer = TypeVar("Answer")

AHEAD = 2
"""Items that each worker is asked for at a time, at least. So many answers of each worker may lie in memory, and three
more: the one that it makes, and those of the steps that training works on and goes on to."""
MAX_RESTARTS = 3
"""How often a worker may be started anew for one item."""
_FORK = multiprocessing.get_context("fork")


class Workers(Generic[Item, Answer]):
    """`count` processes that call `make`.

    Args:
        make: (item, allocate) -> answer. Tensors in arrays of `allocate` travel without a copy. A UserError that it
            raises is raised to whoever waits for the answer.
        count: 0 does all of it in this process.
        timeout: seconds that an answer is waited for before its worker counts as hanging.
        together: answers that are used at the same time. Those after them are made meanwhile, however few the workers.
        say: told of every restart.
    """

    def __init__(
        self,
        make: Callable[[Item, Allocate], Answer],
        count: int,
        *,
        timeout: float,
        together: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        self.make, self.count, self.timeout, self.say = make, count, timeout, say
        self._ahead = max(count * AHEAD, 2 * together)
        self.restarts = 0
        """Workers that were started anew."""
        self.processes: list[int] = []
        """Process ids of those that work now."""
        self._owed = deque[_Worker]()

    def answers(self, items: Iterable[Item]) -> Generator[Answer]:
        """The answer to every item, in order. Close the iterator to end the processes."""
        if self.count == 0:
            yield from (self.make(item, np.empty) for item in items)
            return
        source = iter(items)
        self._owed = owed = deque[_Worker]()
        workers = [_Worker(self, number) for number in range(self.count)]
        turn = 0
        try:
            while True:
                for item in islice(source, self._ahead - len(owed)):
                    worker = workers[turn % self.count]
                    worker.ask(item)
                    owed.append(worker)
                    turn += 1
                if not owed:
                    return
                yield owed.popleft().answer()
        finally:
            for worker in workers:
                worker.end()
            self.processes = []
            owed.clear()

    def ready(self, count: int = 1) -> bool:
        """Whether the next `count` answers, or the first of each worker that owes some of them, are there."""
        return len(self._owed) >= count and all(worker.has_answered() for worker in islice(self._owed, count))


class _Worker:
    """One process, and what it owes."""

    def __init__(self, crew: Workers, number: int) -> None:
        self._crew, self._number, self._owed = crew, number, deque[Any]()
        crew.processes.append(0)
        self._start()

    def _start(self) -> None:
        here, there = _FORK.Pipe()
        self._pipe, self._receiver = here, Receiver(here)
        self._process = begin(_work, self._crew.make, there, here, os.getpid())
        there.close()
        self._crew.processes[self._number] = self._process.pid or 0
        for item in self._owed:
            self._send(item)

    def ask(self, item: Any) -> None:
        self._owed.append(item)
        self._send(item)

    def _send(self, item: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead, as will be seen where its answer is waited for
            self._pipe.send((item, self._receiver.free()))

    def has_answered(self) -> bool:
        return self._pipe.poll()

    def answer(self) -> Any:
        """The answer to what was asked first. Raises UserError as `make` did; RuntimeError for any other failure."""
        for _ in range(MAX_RESTARTS + 1):
            try:
                if self._pipe.poll(self._crew.timeout):
                    failed, answer = self._receiver.receive()
                    self._owed.popleft()
                    if failed:
                        raise UserError(answer) if failed == "user" else RuntimeError(f"in a worker:\n{answer}")
                    return answer
                reason = f"was silent for {self._crew.timeout:g} seconds"
            except (EOFError, OSError):
                self._process.join(5)
                reason = f"died ({_ending(self._process.exitcode)})"
            self.end()
            self._crew.restarts += 1
            self._crew.say(f"a loader's worker {reason} and was started anew; it goes on at {self._owed[0]}")
            self._start()
        raise UserError(
            f"data.workers: a worker {reason} {MAX_RESTARTS + 1} times at {self._owed[0]}; if the memory is too small "
            "for so many, lower data.workers or data.cache_mb"
        )

    def end(self) -> None:
        """Kill the process."""
        end(self._process)
        self._receiver.close()
        self._pipe.close()


def begin(work: Callable[..., object], *args: Any) -> ForkProcess:
    """Start `work(*args)` in a process that only `end`, or the exit of this one, ends: what a terminal or Slurm sends
    to all processes of a job is for this one to act on."""

    def without_signals() -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(one, signal.SIG_IGN)
        work(*args)

    process = _FORK.Process(target=without_signals, daemon=True)
    process.start()
    # multiprocessing, whose turn at exit comes after this, sends SIGTERM to its daemons and waits for them for ever.
    atexit.register(process.kill)
    return process


def end(process: ForkProcess) -> None:
    """Kill what `begin` started."""
    process.kill()
    process.join()
    atexit.unregister(process.kill)


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _work(make: Callable[[Any, Allocate], Any], pipe: Connection, other_end: Connection, parent: int) -> None:
    """Answer what comes through the pipe until the parent is gone."""
    other_end.close()
    torch.set_num_threads(1)
    keep_memory()
    sender, asked = Sender(pipe), deque[Any]()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        while True:
            while pipe.poll(0 if asked else 5):  # all of it at once: what is free is known early
                item, free = pipe.recv()
                asked.append(item)
                sender.reuse(free)
            if asked:
                sender.send(*_answer(make, asked.popleft(), sender))
            elif os.getppid() != parent:
                return


def _answer(make: Callable[[Any, Allocate], Any], item: Any, sender: Sender) -> tuple[str, Any]:
    """("", answer), or what kind of error, and its message."""
    try:
        return "", make(item, sender.allocate)
    except UserError as error:
        failed = "user", str(error)
    except Exception:  # noqa: BLE001 - raised again in the parent
        failed = "bug", traceback.format_exc()
    sender.forget()
    return failed
