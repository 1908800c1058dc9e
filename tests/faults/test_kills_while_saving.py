"""A kill at each write, fsync, rename and pointer border of each rank: the pointer names a complete checkpoint."""

from pathlib import Path

import dist_model as dm
import pytest
from dist_ranks import run_ranks
from saving_ranks import save, save_twice, saver_of

from sora_lite.parallel.env import Rank
from sora_lite.training import restore, store

pytestmark = pytest.mark.dist


def go_on(rank: Rank, folder: str) -> list:
    """What the next attempt finds, and whether it can save."""
    from saving_ranks import make

    engine, ema = make(rank)
    saver = saver_of(engine, ema, Path(folder))
    state = restore.restore(saver, check=lambda path, state: None, fall_back=False)
    assert state is not None
    digest = dm.digest(engine.full_state()), dm.digest(engine.full_state(ema))
    save(engine, ema, Path(folder), 3)
    return [state["step"], *digest]


def undisturbed(rank: Rank) -> list:
    """Digests of weights and average after one and after two steps."""
    from saving_ranks import make

    engine, ema = make(rank)
    found = []
    for step in range(2):
        dm.train_step(engine, step, ema)
        found.append([step + 1, dm.digest(engine.full_state()), dm.digest(engine.full_state(ema))])
    return found


def trial(tmp_path: Path, world: int, victim: int, n: int, background: bool, wanted: list) -> None:
    folder = tmp_path / f"{victim}-{n}"
    with pytest.raises(AssertionError, match="died"):
        run_ranks(world, save_twice, tmp_path / "results", str(folder), victim, n, background)
    named = store.latest(folder)
    assert named is not None
    store.verify(named)
    assert named.name in ("step_00000001", "step_00000002")
    for _, _, path in store.complete(folder):
        store.verify(path)
    found = run_ranks(world, go_on, tmp_path / "results", str(folder))
    assert found[0] == wanted[int(named.name[-1]) - 1], "not the state that was saved"
    assert [path.name for _, _, path in store.complete(folder)][-1] == "step_00000003"
    assert not list(folder.glob("*tmp*"))


def borders(tmp_path: Path, world: int, victim: int, background: bool) -> int:
    """How often a rank touches files in the second save. In the background it writes from one piece of memory."""
    folder = str(tmp_path / f"count-{victim}-{background}")
    return run_ranks(world, save_twice, tmp_path / "results", folder, victim, 0, background)[victim]


def test_some_borders_of_two_ranks(tmp_path: Path) -> None:
    wanted = run_ranks(2, undisturbed, tmp_path / "results")[0]
    last = borders(tmp_path, 2, 0, True)
    assert last > 20
    # The end is where the directory gets its name and the pointer moves.
    for n in (last - 6, last - 1):
        trial(tmp_path, 2, 0, n, True, wanted)
    trial(tmp_path, 2, 1, 2, True, wanted)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("victim", range(4))
def test_every_border_of_four_ranks(victim: int, background: bool, tmp_path: Path) -> None:
    wanted = run_ranks(4, undisturbed, tmp_path / "results")[0]
    for n in range(1, borders(tmp_path, 4, victim, background) + 1):
        trial(tmp_path, 4, victim, n, background, wanted)
