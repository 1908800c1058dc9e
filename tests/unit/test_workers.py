"""Workers that are killed, hang or fail: the sequence of answers is the one of a single process, or a clear error."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from sora_lite.data.workers import Workers
from sora_lite.errors import UserError


@dataclass
class Parcel:
    number: int
    clip: Tensor
    more: list[Tensor]
    nothing: Tensor


def make(number: int) -> Parcel:
    clip = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4) + number
    return Parcel(
        number, clip.permute(2, 0, 1), [torch.tensor(float(number)), torch.full((3,), number)], torch.empty(0, 3)
    )


def check(parcel: Parcel, number: int) -> None:
    expected = make(number)
    assert parcel.number == number and parcel.clip.equal(expected.clip) and parcel.nothing.shape == (0, 3)
    assert [one.tolist() for one in parcel.more] == [one.tolist() for one in expected.more]
    parcel.clip += 1  # it is ours to write


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
    def hang_once(number: int) -> Parcel:
        if number == 7 and not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return make(number)

    workers = Workers(hang_once, 2, timeout=0.5, say=lambda _: None)
    for number, parcel in enumerate(workers.answers(range(20))):
        check(parcel, number)
    assert number == 19 and workers.restarts == 1


def fail(how: Callable[[], object]) -> Callable[[int], Parcel]:
    def work(number: int) -> Parcel:
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
        workers = Workers(lambda n: torch.zeros(1000), 3, timeout=20)
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
