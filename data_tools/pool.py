"""Worker processes that may die: each task runs in a process that can be killed without harm to anything else.

A worker that shows no progress for a while is killed; memory beyond its limit is refused by the kernel. A task that
cost two workers their lives is given up with the reason. A worker that somebody else kills (SIGKILL) is not held
against its task, unless that happens again and again.
"""

import contextlib
import multiprocessing
import os
import queue
import resource
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from sora_lite.data.video import BadVideo
from sora_lite.errors import UserError

Task = dict[str, Any]
Rows = list[dict[str, Any]]
Function = Callable[[Task], Rows]

MOST_DEATHS = 2
MOST_KILLS = 10
"""How often others may kill the workers of one task, before it counts as the task's fault (the kernel's killer of
processes that take too much memory is such another)."""
START_SECONDS = 120.0
"""How long a worker may take to start, on a machine that has much else to do; no task is to blame for that."""
MOST_REASON = 500
"""Characters of a reason."""
AHEAD = 2
"""Tasks that a worker has at hand, so that it never waits for its parent."""

_connection: Connection | None = None
_last_beat = 0.0


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of a task: rows, or the reason why there are none."""

    unit: str
    rows: Rows = field(default_factory=list)
    reason: str = ""


def beat() -> None:
    """Called by a task every few frames: it is alive. Costs nothing more than once a second."""
    global _last_beat
    now = time.monotonic()
    if _connection is not None and now - _last_beat > 1:
        _last_beat = now
        _connection.send(None)


def run_tasks(
    function: Function,
    tasks: Iterable[tuple[str, Task]],
    *,
    workers: int | None,
    stall_seconds: float,
    memory_mb: int,
) -> Iterator[Outcome]:
    """Yield what becomes of each (unit, task), as they finish.

    function: of a module's top level. workers: processes; 0 is this one, None one per core.
    Raises UserError if a task does: then the settings are wrong, not the file.
    """
    if workers == 0:
        for unit, task in tasks:
            yield _outcome(unit, _attempt(function, task))
        return
    pool = _Pool(function, workers or os.cpu_count() or 1, stall_seconds, memory_mb)
    try:
        yield from pool.run(iter(tasks))
    finally:
        pool.close()


class _Worker:
    """One process and the tasks that it has; the first of them is the one it is at."""

    def __init__(self, function: Function, memory_mb: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function, memory_mb), daemon=True)
        self.process.start()
        theirs.close()
        self.tasks: deque[tuple[str, Task]] = deque()
        self.alive_at = time.monotonic()
        self.stalled = self.ready = False

    def give(self, unit: str, task: Task) -> None:
        if not self.tasks:
            self.alive_at = time.monotonic()
        self.tasks.append((unit, task))
        # one that died is seen by whoever waits for it, and its tasks go to another
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(task)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Pool:
    """Hands tasks to workers, takes results, and replaces workers that died."""

    def __init__(self, function: Function, size: int, stall_seconds: float, memory_mb: int) -> None:
        self.function, self.size = function, size
        self.stall_seconds, self.memory_mb = stall_seconds, memory_mb
        self.workers: list[_Worker] = []
        self.again: deque[tuple[str, Task]] = deque()
        self.deaths: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()

    def run(self, tasks: Iterator[tuple[str, Task]]) -> Iterator[Outcome]:
        while True:
            self._feed(tasks)
            if not self.workers:
                return
            ready = wait([worker.connection for worker in self.workers], timeout=min(1.0, self.stall_seconds / 4))
            for worker in [worker for worker in self.workers if worker.connection in ready]:
                yield from self._hear(worker)
            self._kill_stalled()

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _feed(self, tasks: Iterator[tuple[str, Task]]) -> None:
        """Fill up all workers, start more, and let those go that have nothing left to do."""
        while True:
            free = min(self.workers, key=lambda worker: len(worker.tasks), default=None)
            if (free is None or free.tasks) and len(self.workers) < self.size:
                free = None  # start another
            elif free is None or len(free.tasks) >= AHEAD:
                return
            if (following := self.again.popleft() if self.again else next(tasks, None)) is None:
                break
            if free is None:
                free = _Worker(self.function, self.memory_mb)
                self.workers.append(free)
            free.give(*following)
        for worker in [worker for worker in self.workers if not worker.tasks]:
            self._drop(worker)

    def _hear(self, worker: _Worker) -> Iterator[Outcome]:
        """Take one message; the end of the connection is the worker's death."""
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            yield from self._bury(worker)
            return
        worker.alive_at, worker.ready = time.monotonic(), True
        if message is not None:
            unit, _ = worker.tasks.popleft()
            yield _outcome(unit, message)

    def _kill_stalled(self) -> None:
        for worker in self.workers:
            patience = self.stall_seconds if worker.ready else max(START_SECONDS, self.stall_seconds)
            if worker.tasks and time.monotonic() - worker.alive_at > patience:
                worker.stalled = True
                worker.process.kill()

    def _bury(self, worker: _Worker) -> Iterator[Outcome]:
        """Give the tasks of a dead worker to others; the one that it was at may be to blame."""
        worker.process.join()
        code = worker.process.exitcode
        left = worker.tasks
        self._drop(worker)
        if not worker.ready and worker.stalled:
            raise RuntimeError(f"a worker process did not start within {START_SECONDS:g} seconds")
        if not worker.ready and code != -signal.SIGKILL:
            raise RuntimeError(f"a worker process ended as it started ({_name(code)}); its message stands above")
        if not left:
            return
        unit, task = left.popleft()
        if code == -signal.SIGKILL and not worker.stalled:
            self.kills[unit] += 1
            how = f"its worker was killed {MOST_KILLS} times, perhaps by the system for want of memory"
        else:
            self.deaths[unit] += 1
            how = (
                f"shows no progress for {self.stall_seconds:g} seconds (stall_seconds)"
                if worker.stalled
                else f"ends the worker that decodes it ({_name(code)})"
            )
        if self.deaths[unit] >= MOST_DEATHS or self.kills[unit] >= MOST_KILLS:
            yield Outcome(unit=unit, reason=how)
        else:
            self.again.append((unit, task))
        self.again.extend(left)

    def _drop(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.stop()


def _outcome(unit: str, result: Rows | str | UserError) -> Outcome:
    if isinstance(result, UserError):
        raise result
    return Outcome(unit=unit, reason=_tame(result)) if isinstance(result, str) else Outcome(unit=unit, rows=result)


def _tame(reason: str) -> str:
    """Reasons may quote what stands in files: one line of it, and nothing that steers a terminal or cannot be kept."""
    text = " ".join(reason.split())[:MOST_REASON]
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _attempt(function: Function, task: Task) -> Rows | str | UserError:
    """The task's rows, or why there are none. What a decoder throws at a damaged file is not known beforehand."""
    try:
        return function(task)
    except UserError as error:
        return error
    except (BadVideo, OSError) as reason:
        return str(reason)
    except MemoryError:
        return "needs more memory than a worker may take (memory_mb)"
    except Exception as error:  # noqa: BLE001 - becomes the reason in the quarantine
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "" if trace is None else f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        return f"{type(error).__name__}{place}: {error}"


def _serve(connection: Connection, function: Function, memory_mb: int) -> None:
    """What a worker does until its parent goes away."""
    global _connection
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent says when to stop
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    _limit_memory(memory_mb)
    _connection = connection
    connection.send(None)
    while True:
        task = tasks.get()
        try:
            connection.send(None)
            connection.send(_attempt(function, task))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)


def _limit_memory(megabytes: int) -> None:
    """Let this process take so much more address space than it has now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limit = now + megabytes * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _listen(connection: Connection, tasks: "queue.SimpleQueue[Task]") -> None:
    """Take tasks at once, so that a parent never waits for its worker; end with the parent, even if that is killed."""
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def _name(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"
