"""A real job on two ranks is killed without warning and started again: nothing may tell that it happened."""

import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from dist_ranks import run_ranks
from records import what_was_trained
from safetensors.torch import load_file
from tiny_inputs import Tiny
from tiny_models import make_dit

from sora_lite.cli.compose import compose
from sora_lite.cli.export import export
from sora_lite.cli.train import train
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.parallel.env import Rank

pytestmark = pytest.mark.dist

STEPS, SAVE_EVERY = 12, 3
JOBS = {"train": "train", "train-vae": "train-vae", "lora": "train"}
"""What is trained, by which verb."""


def settings(job: str, tiny: Tiny, folder: Path) -> list[str]:
    common = [
        f"data.shards={tiny.shards}", f"run.root={folder}", f"run.name={job}", f"run.steps={STEPS}",
        f"run.save_every={SAVE_EVERY}", "run.validate_every=4", "logging.peak_tflops=1", "parallel.threads=1",
    ]  # fmt: skip
    if job == "train-vae":
        # Lines of the record that do not come where checkpoints do.
        return ["experiment=tiny_vae", "run.log_every=2", "optim.schedule=cosine", *common]
    own = [f"init_from={base_of(tiny)}", "lora.rank=2", "parallel=zero3"] if job == "lora" else []
    return ["experiment=tiny", f"vae_from={tiny.vae}", "data.workers=1", "optim.warmup_steps=5", *common, *own]


def base_of(tiny: Tiny) -> Path:
    """A DiT that adapters are trained on."""
    folder = tiny.vae.with_name("base")
    return folder if folder.exists() else make_dit(folder, tiny, seed=0)


def train_in_turn(rank: Rank, configs: list[Any]) -> None:
    for config in configs:
        train(config, rank)
        rank.barrier()


def uninterrupted(jobs: list[str], tiny: Tiny, folder: Path, extra: list[str]) -> None:
    """The runs that nothing happens to, one after another on the same two ranks (which may have no workers)."""
    configs = [
        compose(JOBS[job].replace("-", "_"), [*settings(job, tiny, folder), *extra, "data.workers=0"]) for job in jobs
    ]
    run_ranks(2, train_in_turn, folder / "ranks", configs)


def start(job: str, overrides: list[str], log: Path) -> subprocess.Popen:
    """The job as a user starts it."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with log.open("a") as file:
        return subprocess.Popen(
            [*argv, "-m", "sora_lite.cli", JOBS[job], *overrides], stdout=file, stderr=subprocess.STDOUT, cwd=log.parent
        )


def kill_at(job: subprocess.Popen, record: Path, step: int, log: Path) -> None:
    """SIGKILL for every process of the job as soon as the record has come to a step."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_record(record)):
        assert job.poll() is None, f"ended before step {step}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"not at step {step} after 120 s:\n{log.read_text()[-4000:]}"
        time.sleep(0.005)
    agent = psutil.Process(job.pid)
    processes = [agent, *agent.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
    psutil.wait_procs(processes, timeout=20)


def finish(job: subprocess.Popen, log: Path) -> None:
    assert job.wait(timeout=120) == 0, log.read_text()[-4000:]


def compare(job: str, one: Path, other: Path) -> None:
    """Record and weights of two runs, bit for bit."""
    lines, expected = what_was_trained(one / job / RECORD), what_was_trained(other / job / RECORD)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert lines == expected  # JSON holds every bit of a float
    for source in ("ema", "raw"):
        weights, wanted = (
            load_file(export(folder / job, folder / f"{job}-{source}", source) / "model.safetensors")
            for folder in (one, other)
        )
        assert weights.keys() == wanted.keys()
        assert all(weights[name].equal(wanted[name]) for name in wanted), source


@pytest.fixture(scope="module")
def reference(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    uninterrupted(list(JOBS), tiny, folder, [])
    for job in JOBS:
        losses = [line["loss"] for line in read_record(folder / job / RECORD) if "loss" in line]
        assert len(set(losses)) == len(losses) >= STEPS // 2
    return folder


@pytest.mark.parametrize(("job", "seed"), [("train", 0), ("train-vae", 1), ("lora", 5)])
def test_a_killed_run_goes_on_bit_for_bit(job: str, seed: int, tiny: Tiny, reference: Path, tmp_path: Path) -> None:
    step = random.Random(seed).randint(SAVE_EVERY + 1, STEPS - 3)
    log, overrides = tmp_path / "log.txt", settings(job, tiny, tmp_path)
    kill_at(start(job, overrides, log), tmp_path / job / RECORD, step, log)
    assert (tmp_path / job / "checkpoints/latest").read_text() != f"step_{STEPS:08d}\n", "came too late"
    finish(start(job, overrides, log), log)
    assert "goes on from step" in log.read_text()
    compare(job, tmp_path, reference)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("job", "stage"), [("train", 1), ("train", 3), ("train-vae", 0), ("train-vae", 2), ("lora", 2)])
def test_a_run_that_is_killed_again_and_again(job: str, stage: int, tiny: Tiny, tmp_path: Path) -> None:
    extra = [f"parallel=zero{stage}", "parallel.accumulation=2", "data.workers=2", "run.keep_last=1"]
    uninterrupted([job], tiny, tmp_path / "whole", extra)
    folder = tmp_path / "killed"
    folder.mkdir()
    log, overrides = folder / "log.txt", [*settings(job, tiny, folder), *extra]
    for step in sorted(random.Random(stage).sample(range(1, STEPS), 3)):
        kill_at(start(job, overrides, log), folder / job / RECORD, step, log)
    finish(start(job, overrides, log), log)
    compare(job, folder, tmp_path / "whole")
