"""Processes that do a sequence of work, in order; one that dies or hangs is started anew at the place where it was.

torch's DataLoader ends with the first of its workers that is killed, raises that error wherever the training loop
happens to be, and waits for ever for one that hangs. Here every worker has a pipe of its own, so that no lock and no
queue is shared with a process that may vanish, and what it owes is asked of its successor: the sequence is unchanged.

The tensors of an answer travel in shared memory, which has no name, so nothing is left behind. Its descriptor goes
through the same pipe: torch's own way asks the worker for it once more, which one that hangs would not answer.
"""

import contextlib
import ctypes
import math
import mmap
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from sora_lite.errors import UserError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

AHEAD = 4
"""Items that each worker is asked for at a time."""
MAX_RESTARTS = 3
"""How often a worker may be started anew for one item."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_FORK = multiprocessing.get_context("fork")


class Workers(Generic[Item, Answer]):
    """`count` processes that call `make`.

    Args:
        make: item -> answer. A UserError that it raises is raised to whoever waits for the answer.
        count: 0 does all of it in this process.
        timeout: seconds that an answer is waited for before its worker counts as hanging.
        say: told of every restart.
    """

    def __init__(
        self, make: Callable[[Item], Answer], count: int, *, timeout: float, say: Callable[[str], None] = print
    ) -> None:
        self.make, self.count, self.timeout, self.say = make, count, timeout, say
        self.restarts = 0
        """Workers that were started anew."""
        self.processes: list[int] = []
        """Process ids of those that work now."""

    def answers(self, items: Iterable[Item]) -> Generator[Answer]:
        """The answer to every item, in order. Close the iterator to end the processes."""
        if self.count == 0:
            yield from map(self.make, items)
            return
        source, owed = iter(items), deque[_Worker]()
        workers = [_Worker(self, number) for number in range(self.count)]
        turn = 0
        try:
            while True:
                for item in islice(source, self.count * AHEAD - len(owed)):
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


class _Worker:
    """One process, and what it owes."""

    def __init__(self, crew: Workers, number: int) -> None:
        self._crew, self._number, self._owed = crew, number, deque[Any]()
        crew.processes.append(0)
        self._start()

    def _start(self) -> None:
        here, there = _FORK.Pipe()
        self._pipe: Connection = here
        # A daemon, so that it ends with this process where nobody closes the iterator.
        self._process = _FORK.Process(target=_work, args=(self._crew.make, there, here, os.getpid()), daemon=True)
        self._process.start()
        there.close()
        self._crew.processes[self._number] = self._process.pid or 0
        for item in self._owed:
            self._send(item)

    def ask(self, item: Any) -> None:
        self._owed.append(item)
        self._send(item)

    def _send(self, item: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead, as will be seen where its answer is waited for
            self._pipe.send(item)

    def answer(self) -> Any:
        """The answer to what was asked first. Raises UserError as `make` did; RuntimeError for any other failure."""
        for _ in range(MAX_RESTARTS + 1):
            try:
                if self._pipe.poll(self._crew.timeout):
                    failed, answer = _receive(self._pipe)
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
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _keep_memory() -> None:
    """Let the C library reuse what is freed, where it would give it back: a clip's megabytes would be mapped anew, and
    zeroed by the kernel, for every clip, which takes a fifth of a worker's time."""
    with contextlib.suppress(AttributeError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _work(make: Callable[[Any], Any], pipe: Connection, other_end: Connection, parent: int) -> None:
    """Answer what comes through the pipe until the parent is gone."""
    other_end.close()
    # What a terminal or Slurm sends to all processes of a job is for the parent to act on. SIGTERM stays as it was at
    # birth, since that is how a parent that exits ends its daemons.
    for one in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(one, signal.SIG_IGN)
    torch.set_num_threads(1)
    _keep_memory()
    while True:
        try:
            while not pipe.poll(5):
                if os.getppid() != parent:
                    return
            item = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = "", make(item)
        except UserError as error:
            answer = "user", str(error)
        except Exception:  # noqa: BLE001 - raised again in the parent
            answer = "bug", traceback.format_exc()
        try:
            _deliver(pipe, answer)
        except (BrokenPipeError, ConnectionResetError):
            return


# ------------------------------------------------------------------------------------------------------- transport


@dataclass(slots=True, frozen=True)
class _Placed:
    """A tensor that lies in the shared memory: byte at which it begins, shape there, and order of its axes."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class _Made:
    """A dataclass as it is made again."""

    kind: type
    fields: dict[str, Any]


def _deliver(pipe: Connection, answer: Any) -> None:
    """Send an answer; its tensors go through shared memory."""
    arrays: list[np.ndarray] = []
    rest, size = _take_out(answer, arrays, 0)
    descriptor = os.memfd_create("answer")
    try:
        os.ftruncate(descriptor, max(1, size))
        offset = 0
        for array in arrays:
            content, written = array.reshape(-1).view(np.uint8).data, 0
            while written < len(content):
                written += os.pwrite(descriptor, content[written:], offset + written)
            offset += _padded(array.nbytes)
        pipe.send((rest, max(1, size)))
        send_handle(pipe, descriptor, None)
    finally:
        os.close(descriptor)


def _receive(pipe: Connection) -> Any:
    rest, size = pipe.recv()
    descriptor = recv_handle(pipe)
    try:
        return _put_back(rest, mmap.mmap(descriptor, size))
    finally:
        os.close(descriptor)


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def _take_out(thing: Any, arrays: list[np.ndarray], offset: int) -> tuple[Any, int]:
    """(a thing with `_Placed` for tensors, from `offset` on; where they end). The arrays are collected."""
    if isinstance(thing, Tensor):
        # In the order in which they lie in memory, a permuted tensor's values are an array without gaps.
        axes = sorted(range(thing.ndim), key=thing.stride, reverse=True)
        array = thing.permute(axes).contiguous().numpy()
        arrays.append(array)
        back = tuple(np.argsort(axes).tolist())
        return _Placed(offset, tuple(array.shape), array.dtype, back), offset + _padded(array.nbytes)
    if is_dataclass(thing) and not isinstance(thing, type):
        made = {}
        for one in fields(thing):
            made[one.name], offset = _take_out(getattr(thing, one.name), arrays, offset)
        return _Made(type(thing), made), offset
    if isinstance(thing, list | tuple):
        parts = []
        for one in thing:
            part, offset = _take_out(one, arrays, offset)
            parts.append(part)
        return type(thing)(parts), offset
    return thing, offset


def _put_back(thing: Any, memory: mmap.mmap) -> Any:
    """The inverse of `_take_out`."""
    if isinstance(thing, _Placed):
        count = math.prod(thing.shape)
        if count == 0:
            return torch.from_numpy(np.empty(thing.shape, thing.dtype)).permute(thing.axes)
        array = np.frombuffer(memory, thing.dtype, count, thing.offset).reshape(thing.shape)
        return torch.from_numpy(array).permute(thing.axes)
    if isinstance(thing, _Made):
        return thing.kind(**{name: _put_back(value, memory) for name, value in thing.fields.items()})
    if isinstance(thing, list | tuple):
        return type(thing)([_put_back(one, memory) for one in thing])
    return thing
