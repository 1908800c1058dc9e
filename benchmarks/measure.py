"""Fair clocks: candidates take turns, so that a busy machine slows all of them alike, and the median speaks."""

import statistics
import time
from collections.abc import Callable


def take_turns(
    candidates: dict[str, Callable[[], object]],
    *,
    rounds: int = 7,
    pick: Callable[[list[float]], float] = statistics.median,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Seconds of one call of each candidate, over `rounds` after a warm-up.

    clock: by default CPU seconds of all threads of this process. pick: which of the rounds speaks. `min` leaves out
    what other processes cost by emptying the caches, which they do to some candidates more than to others.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, call in candidates.items():
            start = clock()
            call()
            if turn > 0:
                seconds[name].append(clock() - start)
    return {name: pick(values) for name, values in seconds.items()}


def table(title: str, unit: str, seconds: dict[str, float], amount: int) -> str:
    """Rows of `amount` units per CPU second, and the factor against the first row, which is the plain way."""
    plain = next(iter(seconds.values()))
    rows = [f"  {name:<44}{amount / value:>10.1f} {unit}/s{plain / value:>8.2f}x" for name, value in seconds.items()]
    return "\n".join([title, *rows])
