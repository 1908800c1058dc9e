"""The lease on a run folder, between real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sora_lite.errors import UserError
from sora_lite.training import lease, store
from sora_lite.training.lease import Lease

HOLDER = """
import sys, time
from pathlib import Path
from sora_lite.training.lease import Lease
lease = Lease(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def move_to_another_host(run: Path) -> None:
    """Let the first attempt look as if it ran elsewhere."""
    path = run / "attempts/000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boot": "another", "host": "node7", "job": "991"}))


def test_a_second_job_is_refused_while_the_first_lives(tmp_path: Path, holder: subprocess.Popen) -> None:
    with pytest.raises(UserError, match=rf"attempt 1 \(host .*, process {holder.pid}, since 20.*run.take_over=true"):
        Lease(tmp_path)
    holder.send_signal(signal.SIGSTOP)  # stopped is not dead
    with pytest.raises(UserError, match="is in use"):
        Lease(tmp_path)
    holder.kill()
    holder.wait()
    second = Lease(tmp_path)  # at once: its process is gone
    assert second.number == 2
    second.release()
    third = Lease(tmp_path)  # at once: it said that it ended
    third.check()
    third.release()


def test_of_another_host_only_the_beat_is_seen(
    tmp_path: Path, holder: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_to_another_host(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(lease, "PATIENCE", 2 * lease.BEAT)
    with pytest.raises(UserError, match=r"attempt 1 \(host node7, .*Slurm job 991"):
        Lease(tmp_path, say=said.append)
    assert "sign of life" in said[0]
    holder.kill()
    monkeypatch.setattr(lease, "PATIENCE", 1.0)
    begun = time.monotonic()
    Lease(tmp_path, say=said.append).release()
    assert time.monotonic() - begun >= 1.0


def test_a_requeued_job_need_not_wait(
    tmp_path: Path, holder: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_to_another_host(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "991")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Lease(tmp_path).release()


def test_what_was_taken_over_is_fenced(tmp_path: Path) -> None:
    first = Lease(tmp_path)
    first.check()
    assert not first.is_taken_over()
    second = Lease(tmp_path, take_over=True)
    assert not first.is_taken_over(), "it has just looked"
    time.sleep(lease.LOOK)
    assert first.is_taken_over()
    with pytest.raises(UserError, match=r"taken over by attempt 2 .*attempt 1 stops"):
        first.check()
    second.check()
    assert not second.is_taken_over()
    second.release()
    first.release()


def test_only_one_of_many_gets_it(tmp_path: Path) -> None:
    code = HOLDER.replace("time.sleep(60)", "sys.stdin.read()")
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while sum(job.poll() is None for job in jobs) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    told = [job.communicate() for job in jobs]
    assert sorted(out for out, _ in told) == ["", "", "held\n"]
    assert all("UserError" in error for out, error in told if not out)


@pytest.mark.parametrize("moment", ["before the directory's rename", "before the pointer's rename"])
def test_an_orphan_cannot_complete_a_checkpoint_in_between(tmp_path: Path, moment: str) -> None:
    """Another attempt takes over right after the orphan has looked: the rename that it then comes to fails."""
    orphan = Lease(tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    store.open_folder(folder)
    looks = 0

    def look() -> None:
        nonlocal looks
        orphan.check()
        looks += 1
        if looks == (1 if "directory" in moment else 2):
            Lease(tmp_path / "run", take_over=True).release()
            store.open_folder(folder)

    name, temporary = store.prepare(folder, 5, orphan.token, 10, 1)
    with pytest.raises(FileNotFoundError):
        store.commit(folder / temporary, name, {"step": 5}, {}, look)
    assert not (folder / "latest").exists()
    assert len(store.complete(folder)) == (0 if "directory" in moment else 1)
    with pytest.raises(UserError, match="taken over"):
        orphan.check()
    orphan.release()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Lease(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"]
