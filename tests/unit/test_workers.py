"""Workers that are killed, hang or fail: the sequence of answers is the one of a single process, or a clear error."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from sora_lite.data.batch import Allocate
from sora_lite.data.workers import AHEAD, Workers
from sora_lite.errors import UserError


@dataclass
class Parcel:
    number: int
    clip: Tensor
    more: list[Tensor]
    nothing: Tensor


def make(number: int, allocate: Allocate = np.empty) -> Parcel:
    clip = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4) + number
    return Parcel(
        number, clip.permute(2, 0, 1), [torch.tensor(float(number)), torch.full((3,), number)], torch.empty(0, 3)
    )


def check(parcel: Parcel, number: int) -> None:
    expected = make(number)
    assert parcel.number == number and parcel.clip.equal(expected.clip) and parcel.nothing.shape == (0, 3)
    assert [one.tolist() for one in parcel.more] == [one.tolist() for one in expected.more]
    parcel.clip += 1  # it is ours to write


def fill(number: int, allocate: Allocate) -> list[Tensor]:
    """Two tensors of 1 MiB in the shared memory, of which one is a part of what was asked for, and one elsewhere."""
    size = 2**20 * (1 + number % 3)
    first, second = allocate((size,), np.uint8), allocate((2, 2**19), np.uint16)
    first[:], second[:] = number, number
    return [torch.from_numpy(first[: 2**20]), torch.from_numpy(second[:1]).T, torch.full((5,), number)]


@pytest.mark.parametrize("count", [0, 2])
def test_memory_is_used_again_and_never_while_it_is_in_use(count: int) -> None:
    kept, pieces = [], 0
    workers = Workers(fill, count, timeout=20)
    for number, tensors in enumerate(workers.answers(range(100))):
        if number % 10 == 0:
            kept.append((number, tensors[number % 3]))  # any of them keeps the memory of all
        held = [(number, one) for one in tensors] + kept
        assert all((one == value).all() for value, one in held)
        for process in workers.processes:
            found = set()
            for one in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    if "memfd:answer" in os.readlink(one):
                        found.add(one.stat().st_ino)
            pieces = max(pieces, len(found))
        del tensors, held
    assert number == 99 and len(kept) == 10
    assert pieces <= 10 + AHEAD + 2  # kept, made ahead, and in the loop's hands


@pytest.fixture
def left() -> Callable[[], set[psutil.Process]]:
    """Children of this process that were not there before the test."""
    before = set(psutil.Process().children())
    return lambda: set(psutil.Process().children()) - before


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_come_in_order(count: int, left: Callable[[], set[psutil.Process]]) -> None:
    workers = Workers(make, count, timeout=20)
    for number, parcel in enumerate(workers.answers(range(50))):
        check(parcel, number)
    assert number == 49 and workers.restarts == 0 and not left()


def test_kill_9_again_and_again() -> None:
    said: list[str] = []
    workers = Workers(make, 2, timeout=20, say=said.append)
    for number, parcel in enumerate(workers.answers(range(60))):
        check(parcel, number)
        if number in range(5, 50, 9):  # not at the end, when both may have sent all that they owe
            os.kill(workers.processes[number % 2], signal.SIGKILL)
            time.sleep(0.05)
    assert number == 59 and workers.restarts == len(said) == 5
    assert all("died (SIGKILL) and was started anew" in one for one in said)


def test_one_that_hangs(tmp_path: Path) -> None:
    def hang_once(number: int, _: Allocate) -> Parcel:
        if number == 7 and not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return make(number)

    workers = Workers(hang_once, 2, timeout=0.5, say=lambda _: None)
    for number, parcel in enumerate(workers.answers(range(20))):
        check(parcel, number)
    assert number == 19 and workers.restarts == 1


def fail(how: Callable[[], object]) -> Callable[[int, Allocate], Parcel]:
    def work(number: int, _: Allocate) -> Parcel:
        if number == 5:
            how()
        return make(number)

    return work


def raise_user_error() -> None:
    raise UserError("the shard is missing")


def test_errors_come_where_they_belong(left: Callable[[], set[psutil.Process]]) -> None:
    for how, kind, pattern in (
        (raise_user_error, UserError, "^the shard is missing$"),
        (lambda: 1 / 0, RuntimeError, "in a worker:\n.*ZeroDivisionError"),
        (lambda: os._exit(3), UserError, r"data\.workers: a worker died \(exit code 3\) 4 times at 5"),
    ):
        answers = Workers(fail(how), 2, timeout=20, say=lambda _: None).answers(range(9))
        for number in range(5):
            check(next(answers), number)
        with pytest.raises(kind, match=f"(?s){pattern}"):
            next(answers)
        assert not left()


def test_no_worker_outlives_its_parent() -> None:
    script = textwrap.dedent("""
        import os, signal, torch
        from sora_lite.data.workers import Workers
        workers = Workers(lambda n, allocate: torch.zeros(1000), 3, timeout=20)
        answers = workers.answers(range(1000))
        next(answers)
        print(*workers.processes, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    processes = [int(one) for one in ran.stdout.split()]
    assert len(processes) == 3
    until = time.monotonic() + 15
    while alive := [one for one in processes if psutil.pid_exists(one) and psutil.Process(one).status() != "zombie"]:
        assert time.monotonic() < until, f"{alive} live on"
        time.sleep(0.1)


def test_no_worker_keeps_its_parent_from_exiting() -> None:
    """Within a run, whose signals the workers inherit, and where an error holds on to whoever would end them."""
    script = textwrap.dedent("""
        import torch
        from sora_lite.data.workers import Workers
        from sora_lite.training.signals import StopFlag
        answers = Workers(lambda n, allocate: torch.zeros(1000), 2, timeout=20).answers(range(1000))
        with StopFlag():
            next(answers)
            raise RuntimeError("as ever")
    """)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    assert ran.returncode == 1 and ran.stderr.endswith("RuntimeError: as ever\n")
