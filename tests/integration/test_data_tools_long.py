"""`sora-data` for longer: a hundred kills, and fifty thousand clips."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from sora_lite.data.index import Index
from sora_lite.data.manifest import Manifest
from sora_lite.data.video import write_mp4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "data_tools", *map(str, words)]


def run(*words: object) -> float:
    """CPU seconds that a command takes, with its workers."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command(*words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_hundred_kills_do_not_change_a_byte(tmp_path: Path) -> None:
    """Of the whole tool, or of one worker that is at work; each at a random moment."""
    (tmp_path / "videos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        texture = rng.integers(0, 255, (150, 150, 3), dtype=np.uint8)
        frames = np.stack([texture[t : t + 96, t : t + 96] for t in range(51)])
        write_mp4(tmp_path / "videos" / f"{i}.mp4", np.ascontiguousarray(frames), 8, crf=10)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video")
    words = ("split.clip_frames=17", "pack.shard_mb=1", "validation_fraction=0.2", "workers=2", "pack.crf=10")
    run("run", tmp_path / "videos", tmp_path / "expected", *words)
    expected = files_of(tmp_path / "expected")
    assert len(Manifest.load(tmp_path / "expected").shards) >= 4

    kills, rounds = {"all": 0, "worker": 0}, 0
    while sum(kills.values()) < 100:
        job = subprocess.Popen(
            command("run", tmp_path / "videos", tmp_path / "s", *words),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + rng.uniform(0.5, 6.0)
        while time.monotonic() < end and job.poll() is None:
            time.sleep(rng.uniform(0.05, 0.8))
            children = psutil.Process(job.pid).children() if job.poll() is None else []
            workers = [child for child in children if "spawn_main" in " ".join(_words(child))]
            if workers and rng.random() < 0.5:
                workers[int(rng.integers(len(workers)))].kill()
                kills["worker"] += 1
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            kills["all"] += 1
        elif job.wait() == 0:
            assert files_of(tmp_path / "s") == expected
            shutil.rmtree(tmp_path / "s")
            rounds += 1
        else:
            pytest.fail(f"ended with {job.returncode} of itself")
    run("run", tmp_path / "videos", tmp_path / "s", *words)
    assert files_of(tmp_path / "s") == expected
    assert kills["all"] >= 10 and kills["worker"] >= 10, kills
    print(f"{kills} in {rounds + 1} data sets")


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


CLIPS, SOURCES, LENGTH = 50_000, 50, 2


def test_fifty_thousand_clips_cost_as_much_each_as_five_thousand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, sources in (("few", SOURCES // 10), ("many", SOURCES)):
        (tmp_path / name).mkdir()
        for i in range(sources):
            frames = rng.integers(0, 255, (CLIPS // SOURCES * LENGTH, 4, 4, 3), dtype=np.uint8)
            write_mp4(tmp_path / name / f"{i}.mp4", frames.repeat(4, axis=1).repeat(4, axis=2), 8, crf=30)
    words = (f"split.clip_frames={LENGTH}", f"split.min_frames={LENGTH}", "split.detector=none", "workers=2")
    words = (*words, "pack.crf=30", "pack.preset=ultrafast", "pack.shard_mb=16")
    few = run("run", tmp_path / "few", tmp_path / "few_shards", *words)
    many = run("run", tmp_path / "many", tmp_path / "many_shards", *words)
    manifest = Manifest.load(tmp_path / "many_shards")
    assert manifest.counts["clips_found"] == CLIPS
    print(f"{CLIPS // 10} clips: {few:.0f} CPU s; {CLIPS}: {many:.0f} CPU s; each {many / few / 10:.2f} times as much")
    assert many < 1.5 * 10 * few, "cost per clip grows"

    again = run("run", tmp_path / "many", tmp_path / "many_shards", *words)
    print(f"again, with nothing to do: {again:.1f} s")
    assert again < 60
    assert sum(len(Index.load(tmp_path / "many_shards", split)) for split in manifest.splits) == sum(
        manifest.splits.values()
    )
