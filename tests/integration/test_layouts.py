"""However often a run is killed, with whatever ranks and workers it goes on: every step holds what the order says."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_inputs import Tiny

from sora_lite.data.buckets import Row
from sora_lite.data.compiled import open_index
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipLoader
from sora_lite.training.resume import Facts, go_on

BATCH, ACCEPT = 8, ["data.sets.weight"]
ROWS = [Row(shape=(1, 32, 32), keep=0.5, batch=BATCH), Row(shape=(17, 32, 32), keep=1.0, batch=2 * BATCH)]
_fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def index(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Two data sets."""
    folder = tmp_path_factory.mktemp("mixed")
    copy = Path(shutil.copytree(tiny.shards, folder / "copy", ignore=shutil.ignore_patterns(".cache")))
    return open_index([tiny.shards, copy], "train", cache=folder / "cache")


def make(index: Index, rank: int, world_size: int, workers: int, weights: tuple[float, float] = (3, 1)) -> ClipLoader:
    return ClipLoader(
        index, ROWS,
        seed=5, block_shards=2, flip=True, rank=rank, world_size=world_size, accumulation=1, workers=workers,
        cache_bytes=0, pin=False, weights=weights, image_ratio=0.5,
    )  # fmt: skip


def _rank(loader: ClipLoader, start: int, stop: int, log: Path) -> None:
    """A rank that writes down what it was given, and then waits to be killed."""
    os.setsid()  # so that its workers can be killed with it
    torch.set_num_threads(1)
    with log.open("ab", buffering=0) as file:
        for (batch,) in loader.steps(start, stop):
            line = {"step": batch.step, "rows": list(zip(batch.positions.tolist(), batch.keys, strict=True))}
            file.write(json.dumps(line).encode() + b"\n")
    signal.pause()


def _lines(log: Path) -> dict[int, list]:
    """What a rank has written whole, by step."""
    whole = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return {line["step"]: line["rows"] for line in map(json.loads, whole)}


def attempt(loaders: list[ClipLoader], start: int, steps: int, folder: Path) -> list[dict[int, list]]:
    """Ranks from a step on, all killed when each has done so many; what each was given, up to where all have come."""
    folder.mkdir()
    logs = [folder / f"{rank}.jsonl" for rank in range(len(loaders))]
    # On a busy machine one rank may be far behind: what the others write meanwhile must stay readable in no time.
    stop = start + steps + 50
    ranks = [_fork.Process(target=_rank, args=(one, start, stop, log)) for one, log in zip(loaders, logs, strict=True)]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + 60
    try:
        while min(len(_lines(log)) for log in logs) < steps:
            assert time.monotonic() < deadline and all(rank.is_alive() for rank in ranks)
            time.sleep(0.002)
    finally:  # a rank that outlived a failure would keep pytest from ending, for ever
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.kill()  # where it had not begun a session of its own
            rank.join()
    done = [_lines(log) for log in logs]
    stop = min(max(one) for one in done) + 1  # what a checkpoint can hold: steps that all ranks have done
    return [{step: rows for step, rows in one.items() if step < stop} for one in done]


def facts_of(loader: ClipLoader, weights: tuple[float, float]) -> Facts:
    sets = [{"shards": name, "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    config = {"run": {"seed": 5}, "data": {"shards": None, "sets": sets}}
    return Facts.of(config, "dit", {}, loader.index, loader.order)


def kill_and_resume(index: Index, kills: int, folder: Path, seed: int) -> None:
    """Each attempt has other ranks and workers; in the middle of the run the weights change by a declared change."""
    draw = random.Random(seed)
    given: dict[int, list] = {}
    state: dict[str, Any] | None = None
    changed_at = None
    for number in range(kills):
        weights = (3.0, 1.0) if number < kills // 2 else (1.0, 1.0)
        world_size, workers = draw.choice([1, 2, 4, 8]), draw.choice([0, 0, 1, 2])
        loaders = [make(index, rank, world_size, workers, weights) for rank in range(world_size)]
        facts = facts_of(loaders[0], weights)
        start = len(given)
        if state is not None:
            facts.data.changes = go_on(folder, start, state, facts, index, ACCEPT if number == kills // 2 else [])
            for loader in loaders:
                loader.begin_order(facts.data.first_step)
        changed_at = facts.data.first_step
        for rows in (done := attempt(loaders, start, draw.randint(1, 3), folder / f"attempt-{number}")):
            assert sorted(rows) == list(range(start, start + len(done[0])))
            for step, some in rows.items():
                given.setdefault(step, []).extend(some)
        state = json.loads(json.dumps(asdict(facts)))
    assert changed_at and [change["step"] for change in state["data"]["changes"]] == [changed_at]
    before = make(index, 0, 1, 0).order
    after = make(index, 0, 1, 0, (1.0, 1.0)).order.beginning_at(changed_at)
    for step in range(len(given)):
        (micro,) = (before if step < changed_at else after).step(step)
        wanted = [[position, index.key(sample)] for position, sample in enumerate(micro.samples)]
        assert sorted(given[step]) == wanted, f"step {step} repeats, loses or alters samples"


def test_killed_again_and_again_nothing_is_lost_or_repeated(index: Index, tmp_path: Path) -> None:
    kill_and_resume(index, 12, tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_two_hundred_times_nothing_is_lost_or_repeated(index: Index, tmp_path: Path) -> None:
    kill_and_resume(index, 200, tmp_path, seed=1)
