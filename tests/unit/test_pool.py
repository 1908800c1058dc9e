"""Workers die in every way, and each task still ends in its result or in the reason why it has none."""

import multiprocessing
import time

import pytest
from pool_tasks import work

from data_tools.pool import MOST_KILLS, Outcome, run_tasks
from sora_lite.errors import UserError


def run(*does: str, workers: int = 2, stall_seconds: float = 30.0, memory_mb: int = 512) -> dict[str, Outcome]:
    tasks = [(f"{i}", {"do": what, "n": i}) for i, what in enumerate(does)]
    found = list(run_tasks(work, tasks, workers=workers, stall_seconds=stall_seconds, memory_mb=memory_mb))
    assert sorted(one.unit for one in found) == sorted(unit for unit, _ in tasks), "a task was lost or came twice"
    return {one.unit: one for one in found}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_task_gives_its_rows(workers: int) -> None:
    found = run(*["square"] * 50, workers=workers)
    assert [found[f"{i}"].rows[0]["n"] for i in range(50)] == [i * i for i in range(50)]
    assert len({one.rows[0]["pid"] for one in found.values()}) == max(1, workers)


def test_what_ends_workers_ends_only_its_own_task() -> None:
    found = run("square", "crash", "square", "exit", "raise", "eat", *["square"] * 20)
    assert found["1"].reason == "ends the worker that decodes it (SIGSEGV)"
    assert found["3"].reason == "ends the worker that decodes it (exit status 3)"
    assert found["4"].reason.startswith("ValueError at pool_tasks.py:") and found["4"].reason.endswith(": of this kind")
    assert "memory_mb" in found["5"].reason
    assert all(one.rows and not one.reason for unit, one in found.items() if unit not in "1345")


def test_silence_is_ended_and_slow_progress_is_not() -> None:
    begin = time.monotonic()
    found = run("hang", "slowly", "square", stall_seconds=2.0)
    assert "no progress for 2 seconds" in found["0"].reason
    assert found["1"].rows == [{"n": -1}] and found["2"].rows[0]["n"] == 4
    assert time.monotonic() - begin < 20


def test_wrong_settings_stop_everything() -> None:
    with pytest.raises(UserError, match="key: wrong"):
        run("square", "wrong", "square")
    assert not multiprocessing.active_children()


def test_kills_by_others_cost_no_task_its_result() -> None:
    tasks = [(f"{i}", {"do": "wait"}) for i in range(8)]
    outcomes = run_tasks(work, tasks, workers=2, stall_seconds=30, memory_mb=512)
    found = []
    for outcome in outcomes:
        found.append(outcome)
        for child in multiprocessing.active_children()[: len(found) % 3]:
            child.kill()
    assert sorted(one.unit for one in found) == sorted(unit for unit, _ in tasks)
    assert all(one.rows for one in found)


def test_a_task_whose_workers_are_always_killed_is_given_up() -> None:
    outcomes = run_tasks(work, [("a", {"do": "kill"})], workers=1, stall_seconds=30, memory_mb=512)
    (found,) = outcomes
    assert f"killed {MOST_KILLS} times" in found.reason
