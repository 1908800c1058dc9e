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

from sora_lite.cli.compose import compose
from sora_lite.cli.export import export
from sora_lite.cli.train import train
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.parallel.env import Rank

pytestmark = pytest.mark.dist

STEPS, SAVE_EVERY = 12, 3
ROOTS = {"train": "train", "train-vae": "train_vae"}


def settings(verb: str, tiny: Tiny, folder: Path) -> list[str]:
    common = [
        f"data.shards={tiny.shards}", f"run.root={folder}", f"run.name={verb}", f"run.steps={STEPS}",
        f"run.save_every={SAVE_EVERY}", "run.validate_every=4", "logging.peak_tflops=1", "parallel.threads=1",
    ]  # fmt: skip
    if verb == "train-vae":
        # Lines of the record that do not come where checkpoints do.
        return ["experiment=tiny_vae", "run.log_every=2", "optim.schedule=cosine", *common]
    return ["experiment=tiny", f"vae_from={tiny.vae}", "data.workers=1", "optim.warmup_steps=5", *common]


def train_in_turn(rank: Rank, configs: list[Any]) -> None:
    for config in configs:
        train(config, rank)
        rank.barrier()


def uninterrupted(verbs: list[str], tiny: Tiny, folder: Path, extra: list[str]) -> None:
    """The runs that nothing happens to, one after another on the same two ranks (which may have no workers)."""
    configs = [compose(ROOTS[verb], [*settings(verb, tiny, folder), *extra, "data.workers=0"]) for verb in verbs]
    run_ranks(2, train_in_turn, folder / "ranks", configs)


def start(verb: str, overrides: list[str], log: Path) -> subprocess.Popen:
    """The job as a user starts it."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with log.open("a") as file:
        return subprocess.Popen(
            [*argv, "-m", "sora_lite.cli", verb, *overrides], stdout=file, stderr=subprocess.STDOUT, cwd=log.parent
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


def compare(verb: str, one: Path, other: Path) -> None:
    """Record and weights of two runs, bit for bit."""
    lines, expected = what_was_trained(one / verb / RECORD), what_was_trained(other / verb / RECORD)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert lines == expected  # JSON holds every bit of a float
    for source in ("ema", "raw"):
        weights, wanted = (
            load_file(export(folder / verb, folder / f"{verb}-{source}", source) / "model.safetensors")
            for folder in (one, other)
        )
        assert weights.keys() == wanted.keys()
        assert all(weights[name].equal(wanted[name]) for name in wanted), source


@pytest.fixture(scope="module")
def reference(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    uninterrupted(list(ROOTS), tiny, folder, [])
    for verb in ROOTS:
        losses = [line["loss"] for line in read_record(folder / verb / RECORD) if "loss" in line]
        assert len(set(losses)) == len(losses) >= STEPS // 2
    return folder


@pytest.mark.parametrize(("verb", "seed"), [("train", 0), ("train-vae", 1)])
def test_a_killed_run_goes_on_bit_for_bit(verb: str, seed: int, tiny: Tiny, reference: Path, tmp_path: Path) -> None:
    step = random.Random(seed).randint(SAVE_EVERY + 1, STEPS - 3)
    log, overrides = tmp_path / "log.txt", settings(verb, tiny, tmp_path)
    kill_at(start(verb, overrides, log), tmp_path / verb / RECORD, step, log)
    assert (tmp_path / verb / "checkpoints/latest").read_text() != f"step_{STEPS:08d}\n", "came too late"
    finish(start(verb, overrides, log), log)
    assert "goes on from step" in log.read_text()
    compare(verb, tmp_path, reference)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("verb", "stage"), [("train", 1), ("train", 3), ("train-vae", 0), ("train-vae", 2)])
def test_a_run_that_is_killed_again_and_again(verb: str, stage: int, tiny: Tiny, tmp_path: Path) -> None:
    extra = [f"parallel=zero{stage}", "parallel.accumulation=2", "data.workers=2", "run.keep_last=1"]
    uninterrupted([verb], tiny, tmp_path / "whole", extra)
    folder = tmp_path / "killed"
    folder.mkdir()
    log, overrides = folder / "log.txt", [*settings(verb, tiny, folder), *extra]
    for step in sorted(random.Random(stage).sample(range(1, STEPS), 3)):
        kill_at(start(verb, overrides, log), folder / verb / RECORD, step, log)
    finish(start(verb, overrides, log), log)
    compare(verb, folder, tmp_path / "whole")
