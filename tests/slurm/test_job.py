"""A real training job: `sora-lite submit` on two nodes with two tasks each, against the same run under torchrun."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

STEPS = 6
SIZES = ["slurm=local", "slurm.nodes=2", "slurm.tasks_per_node=2"]


@dataclass(kw_only=True)
class Inputs:
    """What training needs: a folder of shards and the run folder of a trained VAE."""

    shards: Path
    vae: Path


def tool(name: str) -> str:
    """Path of one of the commands that are installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def call(folder: Path, name: str, *argv: str) -> None:
    """Run a command in a folder, outside the cluster."""
    words = [tool(name), *argv]
    done = subprocess.run(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180)
    assert done.returncode == 0, f"{words} failed with {done.returncode}:\n{done.stdout[-4000:]}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    call(folder, "sora-data", "digits", "videos", "clips=100")
    call(folder, "sora-data", "run", "videos", "shards", "split.detector=none", "dedupe.near=false")
    call(folder, "sora-lite", "train-vae", "experiment=tiny_vae", "data.shards=shards", "run.name=vae", "run.steps=4")
    call(folder, "sora-lite", "export", "run=runs/vae")
    return Inputs(shards=folder / "shards", vae=folder / "runs/vae")


def settings(inputs: Inputs, name: str) -> list[str]:
    return [
        "experiment=tiny", f"data.shards={inputs.shards}", f"vae_from={inputs.vae}",
        f"run.name={name}", "run.root=runs", f"run.steps={STEPS}", "run.log_every=1",
    ]  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, from the run's record."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def submit(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    """`sora-lite submit train` on the login node; wait until the job has completed."""
    argv = [tool("sora-lite"), "submit", "train", *SIZES, *overrides]
    said = cluster.run(argv, cwd=folder)
    match = re.search(r"submitted job (\d+).*\nlog: (.*)\n", said)
    assert match, said
    cluster.wait(match.group(1), Path(match.group(2)), seconds=120)


def test_a_job_trains_as_under_torchrun(cluster: Cluster, inputs: Inputs, tmp_path: Path) -> None:
    submit(cluster, tmp_path, settings(inputs, "slurm"))
    call(
        tmp_path, "torchrun", "--standalone", "--nproc-per-node=4",
        "-m", "sora_lite.cli", "train", *settings(inputs, "torchrun"),
    )  # fmt: skip
    under_slurm, under_torchrun = losses(tmp_path / "runs/slurm"), losses(tmp_path / "runs/torchrun")
    assert len(under_slurm) == STEPS
    assert under_slurm == under_torchrun

    pointer = tmp_path / "runs/slurm/checkpoints/latest"
    assert (pointer.parent / pointer.read_text().strip() / "manifest.json").is_file()

    # Submitted again, the job finds its own run and has nothing left to do.
    submit(cluster, tmp_path, settings(inputs, "slurm"))
    assert losses(tmp_path / "runs/slurm") == under_slurm


def test_a_wrong_setting_never_reaches_the_queue(cluster: Cluster, inputs: Inputs, tmp_path: Path) -> None:
    argv = [tool("sora-lite"), "submit", "train", *SIZES, *settings(inputs, "no")]
    cluster.run([*argv, "run.stepz=3"], cwd=tmp_path, check=False)
    cluster.run([*argv, "slurm.partition=nowhere"], cwd=tmp_path, check=False)
    assert "no" not in cluster.run(["squeue", "--noheader", "--states=all", "--format=%j"], cwd=tmp_path).split()
