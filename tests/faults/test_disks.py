"""Disks that are full, have no inodes left, or may not be written: a clear error, and the old checkpoint as it was."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import dist_model as dm
import pytest
from dist_ranks import run_ranks
from real_runs import Ranks
from saving_ranks import STOP, WARN, make, save, saver_of
from tiny_inputs import Tiny, call

from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.parallel.env import Rank
from sora_lite.training import restore, store

pytestmark = pytest.mark.dist


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB and 64 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=64", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def spoil(rank: Rank, root: Path, fault: str) -> None:
    """Plant a fault that needs no other user, on the rank that it is for."""
    write = store.write_hashed
    if fault == "full while writing":

        def fill_first(path: Path, parts: object) -> dict:
            with (root / f"filler{rank.rank}").open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        return write(path, parts)  # type: ignore[arg-type]

        if rank.rank == rank.world_size - 1:
            store.write_hashed = fill_first  # type: ignore[assignment]
    elif rank.is_main:
        if fault == "full":
            room = os.statvfs(root)
            (root / "filler0").write_bytes(bytes((room.f_bavail - 2) * room.f_frsize))
        elif fault == "no inodes":
            for number in range(os.statvfs(root).f_favail - 3):
                (root / f"filler{number}").touch()
        elif fault == "read-only":
            remount(root, "ro")


def spoil_and_save(rank: Rank, disk: str, fault: str) -> list[str]:
    """Save, spoil the disk, save again as an error and as a warning, mend it, save; what was said."""
    engine, ema = make(rank)
    dm.train_step(engine, 0, ema)
    root, folder = Path(disk), Path(disk) / "checkpoints"
    save(engine, ema, folder, 1)
    said: list[str] = []
    stopping = saver_of(engine, ema, folder, on_failure=STOP, background=True)
    warning = saver_of(engine, ema, folder, on_failure=WARN, background=True, say=said.append)
    dm.train_step(engine, 1, ema)
    write = store.write_hashed
    spoil(rank, root, fault)
    rank.barrier()
    if fault == "no permission":
        os.seteuid(65534)
    with pytest.raises(UserError) as stopped:
        stopping.save(2, {})
        stopping.finish()
    warning.save(2, {})
    while warning.failed == 0:
        warning.border()
    warning.settle()  # as before a rollback, which then goes back to the one before
    assert warning.newest is None or warning.newest.name == "step_00000001"
    dm.train_step(engine, 2, ema)  # training goes on
    with pytest.raises(UserError, match="could not be written"):
        warning.finish()  # but it does not end as if all were well
    if fault == "no permission":
        os.seteuid(0)
    named = store.latest(folder)
    assert named is not None and named.name == "step_00000001"
    restore.load(named, {"model": engine}, {"model": ema})
    rank.barrier()
    if rank.is_main:
        if fault == "read-only":
            remount(root, "rw")
        for file in root.glob("filler*"):
            file.unlink()
    store.write_hashed = write
    rank.barrier()
    if rank.rank == rank.world_size - 1:
        (root / f"filler{rank.rank}").unlink(missing_ok=True)
    rank.barrier()
    warning.save(3, {})
    warning.finish()
    assert warning.newest is not None and warning.newest.name == "step_00000003"
    store.verify(warning.newest)
    assert rank.gather(str(stopped.value)) == [str(stopped.value)] * rank.world_size or not rank.is_main
    return [str(stopped.value), *said]


FAULTS = {
    "full": r"a checkpoint has .* must be free for it, but .* are: make room",
    "full while writing": r"rank 1: .*No space left on device.*make room there",
    "no inodes": r"more files: remove some|No space left",
    "read-only": r"Read-only file system.*mount it for writing",
    "no permission": r"Permission denied.*owner allow it",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fails(fault: str, disk: Path, tmp_path: Path) -> None:
    disk.chmod(0o755)
    told = run_ranks(2, spoil_and_save, tmp_path / "results", str(disk), fault)[0]
    assert re.search(FAULTS[fault], told[0]), told
    assert "could not be written" in told[0]
    assert any("training goes on" in line for line in told[1:])


def test_a_run_goes_on_past_a_full_disk_and_loses_no_line(tiny: Tiny, disk: Path, tmp_path: Path) -> None:
    argv = ["train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={disk}"]
    argv += ["run.name=run", "run.steps=40", "run.save_every=4", "run.keep_last=1", "run.validate_every=20"]
    argv += ["run.on_failed_save=warn", "logging.peak_tflops=1", "parallel.threads=1"]
    ranks = Ranks(tmp_path / "ranks", 2, argv).wait_for(disk / "run/checkpoints/latest", "step_")
    filler = (disk / "filler").open("wb", buffering=0)
    end = time.monotonic() + 60
    while not ("its lines wait" in ranks.log and "training goes on" in ranks.log):
        with contextlib.suppress(OSError):
            filler.write(bytes(4096))
        assert time.monotonic() < end and None in [one.exitcode for one in ranks.processes], ranks.log
    os.unlink(filler.name)
    filler.close()
    assert ranks.end() == [0, 0], ranks.log
    lines = [line["step"] for line in read_record(disk / "run" / RECORD) if "loss" in line]
    assert lines == list(range(1, 41))
    assert store.latest(disk / "run/checkpoints") == disk / "run/checkpoints/step_00000040"


def test_a_run_that_cannot_begin_says_why(tiny: Tiny, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (disk / "tiny/attempts").mkdir(parents=True)
    (disk / "tiny/checkpoints").mkdir()
    filler = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes((filler.f_bavail - 3) * filler.f_frsize))  # enough for an attempt to begin
    given = [f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={disk}"]
    assert call("train", "experiment=tiny", *given) == 2
    assert re.search("^error: .*No space left on device.*make room", capsys.readouterr().err, re.MULTILINE)
