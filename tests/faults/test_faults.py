"""What goes wrong while a run trains: signals, bad numbers, ranks that hang, memory that rots. Real ranks and runs."""

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import Ranks
from tiny_inputs import Tiny

from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.training.attempt import describe_attempt
from sora_lite.training.lease import Lease

pytestmark = pytest.mark.dist

STEPS = 12


def settings(tiny: Tiny, folder: Path, *more: str) -> list[str]:
    return [
        "train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={folder}",
        "run.name=run", f"run.steps={STEPS}", "run.save_every=8", "run.validate_every=0", "logging.peak_tflops=1",
        "parallel.threads=1", *more,
    ]  # fmt: skip


def events(folder: Path) -> list[dict]:
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "run/events.jsonl").read_text().splitlines()
    ]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_record(folder / "run" / RECORD)}


# ------------------------------------------------------------------------------------------- faults that tests plant


def at_step(step: int, fault: object) -> None:
    """Call fault(objective) before the loss of every step from `step` on (the step of the data)."""
    from sora_lite.training.objective_dit import DiTObjective

    loss = DiTObjective.loss

    def with_fault(self, engine, batch):  # type: ignore[no-untyped-def]
        result = loss(self, engine, batch)
        if batch.step >= step:
            result = fault(self, engine, batch, result) or result
        return result

    DiTObjective.loss = with_fault  # type: ignore[method-assign]


def spoil_loss(rank: int, odd: int, step: int, factor: float) -> None:
    """The loss of one rank is multiplied at one step, which may make it NaN."""

    def spoil(objective, engine, batch, result):  # type: ignore[no-untyped-def]
        if batch.step == step:
            result.loss = result.loss * factor
        return result

    if rank == odd:
        at_step(step, spoil)


def flip_bit(rank: int, odd: int, step: int, what: str) -> None:
    """A bit of one rank's memory flips: in a weight that is trained, or in its copy of the VAE."""

    def flip(objective, engine, batch, result):  # type: ignore[no-untyped-def]
        if batch.step == step:
            module = engine.module if what == "weights" else objective.vae
            next(module.parameters()).data.view(torch.int32).flatten()[7] ^= 1 << 12

    if rank == odd:
        at_step(step, flip)


def stop_at(rank: int, odd: int, step: int, how: str) -> None:
    """One rank stops: the process, its main thread, or the whole interpreter."""

    def stop(objective, engine, batch, result):  # type: ignore[no-untyped-def]
        if how == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "sleep":
            time.sleep(1000)
        else:  # a regular expression that backtracks for ever never lets the GIL go
            import re

            re.match(r"(a*)*b", "a" * 40)

    if rank == odd:
        at_step(step, stop)


def fail_at(rank: int, odd: int, step: int) -> None:
    def fail(objective, engine, batch, result):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("planted")

    if rank == odd:
        at_step(step, fail)


# ------------------------------------------------------------------------------------------------------------ tests


def test_signals_save_once_and_ask_for_another_attempt(tmp_path: Path, tiny: Tiny) -> None:
    argv = settings(tiny, tmp_path / "stopped", "run.steps=400", "run.save_every=400")
    ranks = Ranks(tmp_path / "ranks", 2, argv)
    ranks.wait_for(tmp_path / "stopped/run" / RECORD, '"step": 3')
    ranks.signal(1, signal.SIGUSR1).signal(1, signal.SIGTERM).signal(0, signal.SIGUSR1)
    assert ranks.end() == [os.EX_TEMPFAIL] * 2, ranks.log
    (saved,) = [path.name for path in (tmp_path / "stopped/run/checkpoints").glob("step_*")]
    step = int(saved.removeprefix("step_"))
    assert f"saved at step {step}; the same command goes on" in ranks.log
    assert ranks.log.count("the same command goes on") == 1
    argv = [f"run.steps={step + 2}" if one == "run.steps=400" else one for one in argv]
    assert Ranks(tmp_path / "ranks", 2, argv).end() == [0, 0]
    assert list(losses(tmp_path / "stopped")) == list(range(1, step + 3))


def test_an_attempt_that_was_taken_for_dead_ends_at_its_next_step(tmp_path: Path, tiny: Tiny) -> None:
    ranks = Ranks(tmp_path / "ranks", 2, settings(tiny, tmp_path, "run.steps=4000", "run.save_every=4000"))
    ranks.wait_for(tmp_path / "run" / RECORD, '"step": 3')
    newer = Lease(tmp_path / "run", take_over=True)
    assert ranks.end(30) == [2, 2], ranks.log
    assert "was taken over by attempt 2" in ranks.log and "attempt 1 stops here" in ranks.log
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [], "it saves nothing"
    newer.check()
    newer.release()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_no_number(tmp_path: Path, tiny: Tiny, stage: int) -> None:
    argv = settings(tiny, tmp_path, f"parallel.zero_stage={stage}")
    ranks = Ranks(tmp_path / "ranks", 2, argv, spoil_loss, 1, 5, math.nan)
    assert ranks.end() == [0, 0], ranks.log
    (event,) = events(tmp_path)
    assert event["step"] == 5 and "loss is nan" in event["left_out"]
    assert [len(one["keys"][0]) for one in event["ranks"]] == [4, 4]
    assert "step 5: update left out, the loss is nan on rank 1" in ranks.log
    record = read_record(tmp_path / "run" / RECORD)
    assert [line["left_out"] for line in record] == [0] * 5 + [1] * (STEPS - 5)
    assert all(math.isfinite(line["loss"]) for line in record)


def test_too_many_bad_updates_stop_the_run(tmp_path: Path, tiny: Tiny) -> None:
    poison = settings(tiny, tmp_path, "guard.max_skips=1")
    ranks = Ranks(tmp_path / "ranks", 2, poison, spoil_all)
    assert ranks.end() == [2, 2], ranks.log
    assert "guard.max_skips: more than 1 updates were left out" in ranks.log
    assert [event["step"] for event in events(tmp_path)] == [3, 4]


def spoil_all(rank: int) -> None:
    def spoil(objective, engine, batch, result):  # type: ignore[no-untyped-def]
        result.loss = result.loss * math.inf

    at_step(3, spoil)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_spike(tmp_path: Path, tiny: Tiny, action: str) -> None:
    guard = ["guard.window=4", "guard.sigma=30", f"guard.spikes={action}"]
    ranks = Ranks(tmp_path / "ranks", 2, settings(tiny, tmp_path, *guard), spoil_loss, 0, 6, 1e4)
    assert ranks.end() == [0, 0], ranks.log
    (event,) = events(tmp_path)
    assert event["data_step"] == 6 and "is a spike above" in event["left_out"]
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))
    if action == "rollback":
        assert "rolled back to step 4; goes on with the data of step 7" in ranks.log
        state = json.loads((tmp_path / "run/checkpoints/step_00000012/state.json").read_text())["extra"]["guard"]
        assert (state["rollbacks"], state["jump"]) == (1, 3)
        # Another order begins at its own first samples, though the one before it had passed some over.
        change = ["data.buckets=[{resolution: [32, 32], frames: 13, batch: 24}]", "run.accept=[data.buckets]"]
        ranks = Ranks(tmp_path / "changed", 2, settings(tiny, tmp_path, *guard, *change, f"run.steps={STEPS + 1}"))
        assert ranks.end() == [0, 0], ranks.log
        last = json.loads((tmp_path / f"run/checkpoints/step_{STEPS + 1:08d}/state.json").read_text())["extra"]["guard"]
        assert (last["rollbacks"], last["jump"]) == (1, 0)


@pytest.mark.parametrize("what", ["weights", "VAE"])
def test_a_flipped_bit(tmp_path: Path, tiny: Tiny, what: str) -> None:
    argv = settings(tiny, tmp_path, "parallel.zero_stage=0", "run.check_every=1")
    ranks = Ranks(tmp_path / "ranks", 3, [*argv, "data.buckets=[{resolution: [32, 32], frames: 17, batch: 24}]"],
                  flip_bit, 1, 5, "weights" if what == "weights" else "vae")  # fmt: skip
    assert ranks.end() == [2, 2, 2], ranks.log
    assert f"rank 1 ({os.uname().nodename}, process {ranks.pid(1)})" in ranks.log
    assert ("differs from the other ranks in: trained weights" if what == "weights" else "frozen weights") in ranks.log
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000004\n"


@pytest.mark.parametrize("how", ["SIGSTOP", "sleep", "GIL"])
def test_a_rank_that_hangs(tmp_path: Path, tiny: Tiny, how: str) -> None:
    timeout = 3
    argv = settings(tiny, tmp_path, f"run.watchdog_seconds={timeout}")
    ranks = Ranks(tmp_path / "ranks", 2, argv, stop_at, 1, 6, how)
    ranks.wait_for(tmp_path / "run" / RECORD, '"step": 6')
    start = time.monotonic()
    statuses = ranks.end(kill_rest=True)
    assert time.monotonic() - start < 2 * timeout + 5  # the launcher's patience
    assert statuses[0] == 70 and statuses[1] != 0
    folder = tmp_path / "run/watchdog"
    if how != "SIGSTOP":
        assert "in stop" in (folder / "stacks_00001.txt").read_text(), "the stack of the rank that hangs"
    if how != "sleep":
        assert "train_step" in (folder / "stacks_00000.txt").read_text()
        assert f"process {ranks.pid(1)}) STOPPED" in ranks.log


def slow_start(rank: int) -> None:
    from sora_lite.training.trainer import Trainer

    resume = Trainer.resume

    def slow(self: Trainer, lease: Any) -> None:
        resume(self, lease)
        (self.folder / "resumed").touch()
        time.sleep(60)

    Trainer.resume = slow  # type: ignore[method-assign]


def test_a_signal_before_training_asks_to_be_started_again(tmp_path: Path, tiny: Tiny) -> None:
    ranks = Ranks(tmp_path / "ranks", 2, settings(tiny, tmp_path), slow_start).wait_for(tmp_path / "run/resumed")
    time.sleep(0.5)  # for the other rank
    ranks.signal(0, signal.SIGUSR2).signal(1, signal.SIGUSR2)
    assert ranks.end(20) == [75, 75], ranks.log
    assert '"ended"' in (tmp_path / "run/attempts/000001.json").read_text()
    assert "asked to stop by SIGUSR2, with nothing to save; the same command goes on" in ranks.log


def slow_validation(rank: int) -> None:
    from sora_lite.models.dit import VideoDiT

    forward = VideoDiT.forward

    def slow(self: VideoDiT, *args: Any) -> Any:
        time.sleep(0.0 if self.training else 1.5)
        return forward(self, *args)

    VideoDiT.forward = slow  # type: ignore[method-assign]


def test_a_validation_may_take_longer_than_a_step(tmp_path: Path, tiny: Tiny) -> None:
    argv = settings(tiny, tmp_path, "run.steps=1", "run.validate_every=1", "run.watchdog_seconds=5")
    assert Ranks(tmp_path / "ranks", 1, argv, slow_validation).end() == [0]  # of five times t, 1.5 s each


def test_an_error_of_one_rank_ends_all_and_stands_first(tmp_path: Path, tiny: Tiny) -> None:
    ranks = Ranks(tmp_path / "ranks", 3, [*settings(tiny, tmp_path),
                  "data.buckets=[{resolution: [32, 32], frames: 17, batch: 24}]"], fail_at, 2, 3)  # fmt: skip
    assert all(ranks.end(30)), ranks.log
    first, *others = ranks.log.split("Traceback (most recent call last)")[1:]
    assert "ZeroDivisionError: planted" in first
    assert others
    logs = [(tmp_path / f"run/logs/rank_{rank:05d}.log").read_text() for rank in range(3)]
    assert ["ZeroDivisionError: planted" in log for log in logs] == [False, False, True]
    assert all("Traceback (most recent call last)" in log for log in logs)


def test_what_a_run_keeps_of_its_attempts(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages/broken-1.0.dist-info").mkdir(parents=True)  # as an installation that was cut off leaves it
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert describe_attempt(step=0, world_size=1)["packages"]["torch"]
    for steps in (2, 4):
        assert Ranks(tmp_path / "ranks", 1, settings(tiny, tmp_path, f"run.steps={steps}")).end() == [0]
    first, second = (json.loads(path.read_text()) for path in sorted((tmp_path / "run/attempts").glob("*.json")))
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert (first["from_step"], second["from_step"]) == (0, 2)
    assert first["since"] <= first["ended"] <= second["since"]
    assert first["packages"]["torch"] and first["code"] == second["code"]
    assert not list((tmp_path / "run/watchdog").iterdir())
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert [line[:3] for line in log.splitlines()].count("-- ") == 2
    assert (
        "run: trained to step 2\n" in log and "run: goes on from step 2\n" in log and "run: trained to step 4\n" in log
    )
    assert "step/s" not in log, "progress bars are for people who watch"
    assert threading.active_count() < 50
