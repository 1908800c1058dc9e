"""Who may change a run: one attempt at a time, and the newest of them.

    attempts/
      000001.json       the first attempt: host, process, job, since when, what it ran with, and when it ended
      000001.beat       a number that it counts up while it lives
      000002.json       ...

An attempt is taken by making the file of the next number, which a file system lets only one succeed in; the number is
never used again. So "am I still the newest" is one look into the folder (`Lease.check`), and it needs no locks and no
clocks that agree, on one machine or on a shared file system.

A second job is refused while the attempt before it lives: it has not said that it ended, its process runs, and its beat
goes on. Of a process on another host only the beat can be seen, so it is watched for a while. An attempt that is taken
for dead and is not (a node that lost its network, a process that was stopped) finds the newer number at its next step
and ends. Wherever it is, it may neither complete a checkpoint nor move the pointer, and the record that it holds open
is no longer the run's, since the next attempt begins with a new file under that name (`training.tracking`).
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sora_lite.errors import UserError
from sora_lite.parallel.env import Rank
from sora_lite.training.store import explain

FOLDER = "attempts"
BEAT = 5.0
"""Seconds between two beats."""
PATIENCE = 30.0
"""Seconds without a beat after which an attempt on another host counts as dead."""
LOOK = 1.0
"""Seconds between two looks of `Lease.is_taken_over`, which is asked at every step."""


class Lease:
    """The right of one attempt to change a run, held by rank 0's process. Use `hold`.

    Raises:
        UserError: another attempt lives, or the run folder cannot be written to.
    """

    def __init__(self, run: Path, *, take_over: bool = False, say: Callable[[str], None] = print) -> None:
        self.run, self.folder = run, run / FOLDER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            newest = self._newest()
            if newest and not take_over:
                _require_dead(self.folder, newest, run, say)
            self.number = newest + 1
            self.token = f"{self.number:06d}{secrets.token_hex(4)}"
            self._path, self._beat_path = _paths(self.folder, self.number)
            self._facts = {"attempt": self.number, "token": self.token, **_this_process()}
            with self._path.open("x") as file:
                file.write(json.dumps(self._facts, indent=1))
            self._beat(0)
            self._next_look = 0.0
        except FileExistsError as error:
            raise UserError(f"{run}: another job began with it at this moment; let that one run") from error
        except OSError as error:
            raise explain(error, self.folder) from error
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if a newer attempt has taken the run over."""
        if (newest := self._newest()) > self.number:
            by = _describe(_read(_paths(self.folder, newest)[0]))
            raise UserError(f"{self.run}: was taken over by attempt {newest} ({by}); attempt {self.number} stops here")

    def is_taken_over(self) -> bool:
        """Whether `check` would raise, by one cheap look now and then; True may come up to LOOK seconds late."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + LOOK
        return _paths(self.folder, self.number + 1)[0].exists()

    def note(self, facts: Mapping[str, Any]) -> None:
        """Add to what the attempt's file says."""
        self._facts |= facts
        temporary = self._path.with_suffix(f".tmp-{self.token}")
        temporary.write_text(json.dumps(self._facts, indent=1) + "\n")
        temporary.replace(self._path)

    def release(self) -> None:
        """Say that this attempt ended, so that the next one need not wait."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the next attempt then looks for the process instead
            self.note({"ended": _now()})

    def _newest(self) -> int:
        return max((int(path.stem) for path in self.folder.glob("[0-9]*.json")), default=0)

    def _keep_beating(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT):
            beats += 1
            with contextlib.suppress(OSError):  # a beat that is missed is made up for by the next
                self._beat(beats)

    def _beat(self, count: int) -> None:
        # In place, so that it needs no room on a full disk; opened anew, so that other hosts see it.
        descriptor = os.open(self._beat_path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, f"{count:020d}".encode())
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def hold(run: Path, rank: Rank, *, take_over: bool, say: Callable[[str], None] = print) -> Iterator["Held"]:
    """Hold the lease of a run while the block lasts. A collective; the ranks get its token and its check.

    Args:
        run: the run folder; it is made.
        rank: this process; rank 0 holds the lease.
        take_over: take the run even from an attempt that lives; that one then stops.
        say: shows a line to people.

    Raises:
        UserError: on all ranks, if another attempt lives; it names host, process and job.
    """
    lease = rank.together(lambda: Lease(run, take_over=take_over, say=say) if rank.is_main else None)
    try:
        yield Held(rank.gather(lease.token if lease else None)[0], lease)
    finally:
        if lease:
            lease.release()


class Held:
    """A lease as each rank sees it: `token` is part of temporary names. Rank 0 holds it; elsewhere calls do nothing."""

    def __init__(self, token: str, lease: Lease | None) -> None:
        self.token, self._lease = token, lease

    def check(self) -> None:
        """Raise UserError if a newer attempt has taken the run over."""
        if self._lease:
            self._lease.check()

    def is_taken_over(self) -> bool:
        """Whether a newer attempt has taken the run over, as a cheap look tells."""
        return self._lease is not None and self._lease.is_taken_over()

    def note(self, facts: Mapping[str, Any]) -> None:
        """Add to what the attempt's file says."""
        if self._lease:
            self._lease.note(facts)


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:06d}.json", folder / f"{number:06d}.beat"


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except ValueError:
        facts = None
    return facts if isinstance(facts, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _this_process(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": environment.get("SLURM_JOB_ID"),
        "restart": int(environment.get("SLURM_RESTART_COUNT", "0")),
        "since": _now(),
    }


def _boot_id() -> str:
    """Which boot of which machine, and which process space in it: containers and Slurm's nodes share host names."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" if there is none. Numbers of processes are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _describe(facts: Mapping[str, Any]) -> str:
    job = f"Slurm job {facts.get('job')}, " if facts.get("job") else ""
    return f"host {facts.get('host')}, process {facts.get('pid')}, {job}since {facts.get('since')}"


def _require_dead(folder: Path, number: int, run: Path, say: Callable[[str], None]) -> None:
    """Raise UserError if an attempt lives, as far as can be seen from here."""
    path, beat = _paths(folder, number)
    facts, here = _read(path), _this_process()
    if "ended" in facts:
        return
    refusal = (
        f"{run}: is in use by attempt {number} ({_describe(facts)}): end that job first, or give this one another "
        "run.name; run.take_over=true takes the run from it, which then stops without saving"
    )
    if here["boot"] and here["boot"] == facts.get("boot"):
        if _start_time(int(facts.get("pid", 0))) == facts.get("started"):
            raise UserError(refusal)
        return
    if here["job"] and here["job"] == facts.get("job") and here["restart"] > facts.get("restart", 0):
        return  # Slurm started this job anew: it holds the attempt before for dead
    say(
        f"{run}: attempt {number} ({_describe(facts)}) has not said that it ended; "
        f"looking for a sign of life for {PATIENCE:.0f} s"
    )
    first, end = _read_beat(beat), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(BEAT / 5)
        if _read_beat(beat) != first:
            raise UserError(refusal)


def _read_beat(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
