"""`sora-data` with Slurm's job arrays: the same bytes as on one machine, whatever happens to tasks and nodes."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from testbed import Cluster
from text_folders import save_t5
from tiny_inputs import Tiny

from sora_lite.data.video import encode_mp4

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

VIDEOS, MANY = 10, 120
SETTINGS = ["split.clip_frames=32", "split.detector=none", "validation_fraction=0.3", "pack.shard_mb=1"]
ARRAY = ["executor=slurm", "slurm.tasks=2", "slurm.cpus_per_task=1", "slurm.time=0:10:00"]


def sora_data(*words: object) -> list[str]:
    return [sys.executable, "-m", "data_tools", *map(str, words)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Textures that drift; each takes about a second to encode."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(VIDEOS):
        texture = np.random.default_rng(i).integers(0, 255, (240, 320, 3), dtype=np.uint8)
        frames = np.stack([np.roll(texture, (step, 2 * step), axis=(0, 1)) for step in range(64)])
        (folder / f"{i:02}.mp4").write_bytes(encode_mp4(frames, 24, 30))
    return folder


@pytest.fixture(scope="module")
def local(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that processes of this machine made."""
    shards = tmp_path_factory.mktemp("local") / "shards"
    subprocess.run(sora_data("run", videos, shards, *SETTINGS, "workers=2"), check=True, capture_output=True)
    assert len(list(shards.glob("*.tar"))) >= 3
    return shards


@pytest.fixture
def many(videos: Path, tmp_path: Path) -> Path:
    """The same under many names, which are not UTF-8: to look at them takes some seconds."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(MANY):
        (folder / f"{i:03}\udcff.mp4").hardlink_to(videos / f"{i % VIDEOS:02}.mp4")
    return folder


def content(shards: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file() and path.name != ".lock"}


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def keys_of(stage: Path) -> list[str]:
    """Keys of all rows of a stage; more than once if they were written more than once."""
    tables = [pq.read_table(path, columns=["key"]) for path in stage.glob("*/*.parquet")]
    return [key for table in tables for key in table["key"].to_pylist()]


def test_an_array_makes_the_same_shards(cluster: Cluster, videos: Path, local: Path, tmp_path: Path) -> None:
    cluster.run(sora_data("run", videos, "shards", *SETTINGS, *ARRAY), cwd=tmp_path)
    assert content(tmp_path / "shards") == content(local)


@pytest.mark.parametrize("what", ["latents", "text"])
def test_an_array_encodes_the_same(cluster: Cluster, local: Path, tiny: Tiny, tmp_path: Path, what: str) -> None:
    here, there, clips = tmp_path / "here", tmp_path / "there", local
    words = [f"vae_from={tiny.vae}", "buckets=[{resolution: [32, 32], frames: 17}, {resolution: [32, 48], frames: 9}]"]
    if what == "text":
        clips, words = tiny.shards, [f"text_from={save_t5(tmp_path / 't5')}", "max_tokens=16"]
    subprocess.run(sora_data("encode", clips, here, *words, "workers=2"), check=True, capture_output=True)
    array = sora_data("encode", clips, there, *words, *ARRAY)
    for _ in range(2):  # the second time nothing is left to do, and nothing is submitted
        cluster.run(array, cwd=tmp_path)
        assert content(there) == content(here) and len(list(there.glob("*.tar"))) >= 2
        assert len(list(there.glob(".work/*/*/logs/*.log"))) == 2


def test_a_lost_node_changes_no_byte(own_cluster: Cluster, videos: Path, local: Path, tmp_path: Path) -> None:
    log, parts = tmp_path / "log", local / ".work" / "encode"
    # all that other stages found is taken from the local run, so this is the encoding alone
    words = ["run", videos, "shards", f"work={local / '.work'}", *SETTINGS, *ARRAY, "slurm.cpus_per_task=3"]
    run = own_cluster.start(sora_data(*words), cwd=tmp_path, log=log)
    wait_for(lambda: len(list(parts.glob("*/parts/*.tar"))) >= 2)
    nodes = own_cluster.run(["squeue", "--noheader", "--states=R", "--format=%N"], cwd=tmp_path).split()
    assert sorted(nodes) == ["node1", "node2"]
    own_cluster.power_off("node2")
    assert run.wait(timeout=120) == 0, log.read_text()
    assert content(tmp_path / "shards") == content(local)
    (job,) = re.findall(r"submitted job (\d+)", log.read_text())
    attempts = [(parts / path).read_text().count(" attempt ") for path in parts.glob(f"*/logs/{job}_*.log")]
    assert sorted(attempts) == [1, 2]


def test_a_task_that_is_stopped_loses_nothing(cluster: Cluster, many: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the waiting alone. SIGTERM ends a task, which comes back. The next call waits for the same array."""
    log, rows = tmp_path / "log", tmp_path / "shards/.work/probe"
    words = sora_data("probe", many, "shards", *SETTINGS, *ARRAY)
    run = cluster.start(words, cwd=tmp_path, log=log)
    wait_for(lambda: "RUNNING" in log.read_text())
    (job,) = re.findall(r"submitted job (\d+)", log.read_text())
    assert cluster.interrupt(run) == 130
    assert f"scancel {job}" in log.read_text()

    task = next(rows.glob("*/")) / "logs" / f"{job}_0.log"
    wait_for(lambda: "are missing" in task.read_text())
    cluster.run(["scancel", "--signal=TERM", f"{job}_0"], cwd=tmp_path)
    wait_for(lambda: "goes back into the queue" in task.read_text())
    assert "SIGTERM: no further unit is begun" in task.read_text()
    (done, left) = map(int, re.findall(r"(\d+) units done, (\d+) left", task.read_text())[0])
    assert done and left, "stopped too late or too early to show anything"

    assert cluster.start(words, cwd=tmp_path, log=log).wait(timeout=60) == 0, log.read_text()
    assert "submitted" not in log.read_text()
    assert f"{left} of {done + left} units are missing" in task.read_text()
    assert len(keys_of(rows)) == len(set(keys_of(rows))) == MANY


def test_what_fails_is_told_and_submitted_again(cluster: Cluster, many: Path, tmp_path: Path) -> None:
    words = sora_data("probe", many, "shards", *ARRAY)
    log = tmp_path / "log"
    run = cluster.start(words, cwd=tmp_path, log=log)
    wait_for(lambda: "RUNNING" in log.read_text())
    (job,) = re.findall(r"submitted job (\d+)", log.read_text())
    cluster.run(["scancel", job], cwd=tmp_path)
    assert run.wait(timeout=60) == 2
    error = log.read_text().splitlines()[-1]
    assert error.startswith("error: probe: job ") and "CANCELLED" in error and "logs" in error
    cluster.run(words, cwd=tmp_path)
    assert len(set(keys_of(tmp_path / "shards/.work/probe"))) == MANY
