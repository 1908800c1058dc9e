"""Signals that ask a run to stop: in training they only raise a flag, which the ranks agree on at a step's border."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from sora_lite.errors import Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""SIGTERM: preemption, cancellation. SIGINT: Ctrl-C. SIGUSR1, SIGUSR2: what Slurm sends before a time limit."""


class StopFlag:
    """Within it the signals that stop a run do nothing but set `received`, however often they come.

    with StopFlag() as stop:
        while not stop.received: ...
    """

    def __init__(self) -> None:
        self.received = ""
        """Name of the first signal, "" for none."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {one: signal.signal(one, self._raise) for one in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


@contextlib.contextmanager
def nothing_to_save() -> Iterator[None]:
    """Within it, outside of a `StopFlag`, the signals of a cluster raise Interrupted: before training begins, and after
    it has ended, there is nothing to wait for. Ctrl-C is a KeyboardInterrupt, as ever."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"asked to stop by {signal.Signals(number).name}, with nothing to save")

    before = {one: signal.signal(one, leave) for one in STOPPING if one is not signal.SIGINT}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
