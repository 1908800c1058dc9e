"""Rank and rendezvous on a real Slurm, through the project's own batch script, two nodes and two tasks on each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from testbed import Cluster

from sora_lite.cli.compose import assets

pytestmark = pytest.mark.slurm

SIZES = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]


def submit(cluster: Cluster, folder: Path, command: list[str]) -> str:
    """Submit a command through train.sbatch; its log is `folder`/log."""
    script = str(assets("slurm") / "train.sbatch")
    return cluster.run(["sbatch", "--parsable", f"--output={folder}/log", *SIZES, script, *command], cwd=folder).strip()


def test_tasks_on_two_nodes_meet(cluster: Cluster, tmp_path: Path) -> None:
    script = Path(__file__).with_name("rendezvous.py")
    job = submit(cluster, tmp_path, [sys.executable, str(script), str(tmp_path)])
    cluster.wait(job, tmp_path / "log", seconds=90)
    tasks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [task["rank"] for task in tasks] == [0, 1, 2, 3]
    assert {task["world_size"] for task in tasks} == {4}
    assert {task["launcher"] for task in tasks} == {"slurm"}
    assert [(task["host"], task["local_rank"]) for task in tasks] == [
        ("node1", 0), ("node1", 1), ("node2", 0), ("node2", 1)
    ]  # fmt: skip
    assert {task["master"] for task in tasks} == {"node1"}
    assert {task["gpus"] for task in tasks} == {"0,1"}
    assert {task["threads"] for task in tasks} == {"1"}
    assert {task["total"] for task in tasks} == {15.0}


def test_one_failing_task_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, ["bash", "-c", '[ "$SLURM_PROCID" != 3 ] || exit 9; sleep 600'])
    with pytest.raises(AssertionError, match="is FAILED"):
        cluster.wait(job, tmp_path / "log", seconds=60)


def test_arguments_reach_the_tasks_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    words = ["a b", "'$HOME'", '"', "*", "x=[{resolution: [32, 32]}]", ""]
    program = "import json, os, sys; open(os.environ['SLURM_PROCID'], 'w').write(json.dumps(sys.argv[1:]))"
    job = submit(cluster, tmp_path, [sys.executable, "-c", program, *words])
    cluster.wait(job, tmp_path / "log", seconds=60)
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)] == [words] * 4


def test_a_requeued_job_keeps_its_log(cluster: Cluster, tmp_path: Path) -> None:
    first = '[ "$SLURM_RESTART_COUNT" ] || { [ "$SLURM_PROCID" != 0 ] || scontrol requeue $SLURM_JOB_ID; sleep 600; }'
    job = submit(cluster, tmp_path, ["bash", "-c", first])
    cluster.wait(job, tmp_path / "log", seconds=90)
    log = (tmp_path / "log").read_text()
    assert "attempt 0" in log and "attempt 1" in log


def test_testbeds_run_side_by_side_and_leave_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """A second cluster beside the first, whose user is killed: all of its processes are gone, the first works on."""
    mark = f"{tmp_path}/second"
    second = subprocess.Popen(
        [Path(__file__).with_name("testbed.sh"), "1", "bash", "-c", f"srun sleep 600 & : {mark}; echo up; wait"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert second.stdout and second.stdout.readline() == "up\n"
    assert "idle" in cluster.run(["sinfo", "--noheader", "--format=%t"], cwd=tmp_path)
    second.kill()
    second.stdout.read()  # ends when the last process that holds the pipe has ended
    second.wait()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [command for command in commands if mark.encode() in command]
    assert "idle" in cluster.run(["sinfo", "--noheader", "--format=%t"], cwd=tmp_path)
