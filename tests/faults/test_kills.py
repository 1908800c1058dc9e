"""Ranks are killed without warning, again and again, while they train and while they save: nothing may tell of it."""

import os
import random
import signal
import threading
from pathlib import Path

import pytest
from real_runs import Ranks
from records import what_was_trained
from safetensors.torch import load_file
from tiny_inputs import Tiny

from sora_lite.evaluation.record import RECORD, read_record

pytestmark = pytest.mark.dist

WORLD, STEPS, SAVE_EVERY = 4, 20, 2


def settings(tiny: Tiny, root: Path, background: bool) -> list[str]:
    return [
        "train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={root}",
        "run.name=run", f"run.steps={STEPS}", f"run.save_every={SAVE_EVERY}", "run.validate_every=0",
        "logging.peak_tflops=1", "parallel.threads=1", f"run.save_in_background={str(background).lower()}",
    ]  # fmt: skip


def kill_after(rank: int, victim: int, seconds: float) -> None:
    if rank == victim:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()


def kill_at_flush(rank: int, victim: int, number: int) -> None:
    """Die in the middle of a save: instead of the `number`-th flush to the disk."""
    flush, left = os.fsync, [number]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if rank == victim and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = fsync


def content(run: Path) -> tuple[list[dict], dict[str, bytes]]:
    """The record without timings, and every tensor of the last checkpoint, bit for bit."""
    record = what_was_trained(run / RECORD)
    last = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    files = sorted(last.glob("*.safetensors"))
    assert len(files) == WORLD
    return record, {
        f"{file.name} {name}": tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()
    }


def saved_step(run: Path) -> int:
    pointer = run / "checkpoints/latest"
    return int(pointer.read_text().split("-")[0].removeprefix("step_")) if pointer.exists() else 0


def kill_many(tiny: Tiny, folder: Path, kills: int, seed: int, background: bool) -> None:
    assert Ranks(folder / "log", WORLD, settings(tiny, folder / "calm", background)).end(120) == [0] * WORLD
    calm = content(folder / "calm/run")
    draw, done, number = random.Random(seed), 0, 0
    while done < kills:
        root, number = folder / f"killed_{number}", number + 1
        run, finished = root / "run", False
        while not finished:
            before, victim = saved_step(run), draw.randrange(WORLD)
            fault = (kill_at_flush, draw.randint(1, 12)) if done % 3 == 0 else (kill_after, draw.uniform(0.3, 6))
            if done >= kills:
                fault = (kill_after, 1e6)  # the last attempt of the last run is let alone
            ranks = Ranks(folder / f"log_{done}", WORLD, settings(tiny, root, background), fault[0], victim, fault[1])
            statuses = ranks.end(120, kill_rest=True)
            finished = statuses == [0] * WORLD
            hit = statuses[victim] == -signal.SIGKILL
            done += hit
            assert finished or hit, f"an attempt ended by itself: {statuses}\n{ranks.log}"
            lines = [line["step"] for line in read_record(run / RECORD)] if (run / RECORD).exists() else [0]
            assert saved_step(run) >= before, "the pointer went back"
            assert max(lines, default=0) - saved_step(run) <= SAVE_EVERY, "more was lost than may be"
        record, tensors = content(run)
        assert record == calm[0]
        assert tensors == calm[1]


@pytest.mark.parametrize("background", [False, True])
def test_five_kills(background: bool, tmp_path: Path, tiny: Tiny) -> None:
    kill_many(tiny, tmp_path, kills=5, seed=1, background=background)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("background", [False, True])
def test_a_hundred_kills(background: bool, tmp_path: Path, tiny: Tiny) -> None:
    kill_many(tiny, tmp_path, kills=100, seed=2, background=background)
