"""Every file of a checkpoint truncated, deleted or with flipped bits: found before any state changes, and got over."""

import random
from pathlib import Path

import dist_model as dm
import pytest
from dist_ranks import run_ranks
from saving_ranks import make, save, saver_of

from sora_lite.cli import main
from sora_lite.errors import UserError
from sora_lite.parallel.env import Rank
from sora_lite.training import restore, store

pytestmark = pytest.mark.dist


def damages(data: bytes, flips: int, rng: random.Random) -> list[bytes | None]:
    """None is a deleted file. One bit is flipped at each of so many places."""
    found: list[bytes | None] = [None, b"", data[: len(data) // 2], data[:-1], data + b"\0"]
    for place in rng.sample(range(len(data)), min(flips, len(data))):
        found.append(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
    return found


def spoil(path: Path, data: bytes | None) -> None:
    path.unlink() if data is None else path.write_bytes(data)


def flip_and_load(rank: Rank, folder: str, flips: int) -> list[int]:
    """Damage each file in each way, and try to load; how many flips there were, and of how many kinds of files."""
    engine, ema = make(rank)
    path = store.latest(Path(folder))
    assert path is not None
    dm.train_step(engine, 1, ema)
    before = dm.digest(engine.full_state()), dm.digest(engine.full_state(ema)), engine.step_count
    rng, done = random.Random(0), 0
    files = sorted(path.iterdir())
    for file in files:
        data = file.read_bytes()
        for bad in damages(data, flips, rng):
            spoil(file, bad)
            with pytest.raises(UserError, match=file.name):
                restore.load(path, {"model": engine}, {"model": ema})
            done += 1
        file.write_bytes(data)
    assert (dm.digest(engine.full_state()), dm.digest(engine.full_state(ema)), engine.step_count) == before
    restore.load(path, {"model": engine}, {"model": ema})
    return [done, len(files)]


def test_each_damage_of_each_file_is_found_before_anything_changes(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    run_ranks(2, write_two, tmp_path / "results", folder)
    done, files = run_ranks(1, flip_and_load, tmp_path / "results", folder, 60)[0]
    assert files == 4
    assert done >= 200 + 5 * files


def damage_newest_two(folder: Path) -> None:
    """Flip a bit of checkpoints 3 and 2, in files that different ranks wrote."""
    for step, file in ((3, "model-rank_00001.safetensors"), (2, "state.json")):
        path = folder / f"step_{step:08d}" / file
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


def expect_warnings(said: list[str]) -> None:
    """What is damaged is named, and what becomes of it."""
    assert [line.split(":")[0] for line in said] == ["warning"] * len(said)
    for part in ("step_00000003/model-rank_00001", "step_00000002/state.json", "goes on from", "set aside"):
        assert any(part in line for line in said), part


def fall_back(rank: Rank, folder: str) -> None:
    """Damage the newest two of three checkpoints, then the pointer, then all."""
    engine, ema = make(rank)
    digests = []
    for step in (1, 2, 3):
        dm.train_step(engine, step - 1, ema)
        save(engine, ema, Path(folder), step, keep_last=3)
        digests.append(dm.digest(engine.full_state()))
    said: list[str] = []

    def attempt(fall_back: bool = True) -> int:
        said.clear()
        saver = saver_of(engine, ema, Path(folder), say=said.append)
        state = restore.restore(saver, check=lambda path, state: None, fall_back=fall_back)
        assert state is not None
        assert rank.gather(state["step"]) == [state["step"]] * rank.world_size
        assert dm.digest(engine.full_state()) == digests[state["step"] - 1]
        return state["step"]

    def names() -> list[str]:
        rank.barrier()
        return sorted(path.name.partition(".aside-")[0] for path in Path(folder).iterdir())

    assert attempt() == 3
    assert not said
    if rank.is_main:
        damage_newest_two(Path(folder))
    rank.barrier()
    dm.train_step(engine, 7)
    before = dm.digest(engine.full_state())
    with pytest.raises(UserError, match=r"rank_00001.*state\.json.*step_00000001 is good.*run\.on_damage=fall_back"):
        attempt(fall_back=False)
    assert dm.digest(engine.full_state()) == before
    assert (Path(folder) / "latest").read_text() == "step_00000003\n"
    assert attempt() == 1
    if rank.is_main:
        expect_warnings(said)
    assert names() == ["latest", "step_00000001", "step_00000002", "step_00000003"]
    assert [path.name for _, _, path in store.complete(Path(folder))] == ["step_00000001"]
    rank.barrier()
    if rank.is_main:
        (Path(folder) / "latest").unlink()
    rank.barrier()
    assert attempt() == 1  # a pointer that is lost does not begin the run anew
    assert store.latest(Path(folder)) == Path(folder) / "step_00000001"
    rank.barrier()
    for step in (2, 3, 4, 5):
        save(engine, ema, Path(folder), step, keep_last=2)
    assert names() == ["latest", "step_00000004", "step_00000005"]  # what lay aside goes with time
    if rank.is_main:
        for _, _, path in store.complete(Path(folder)):
            (path / "manifest.json").write_text("{}")
    rank.barrier()
    with pytest.raises(UserError, match=r"step_00000005.*step_00000004.*no checkpoint of this run is good"):
        attempt()


def test_all_ranks_fall_back_to_the_newest_good_one(tmp_path: Path) -> None:
    run_ranks(2, fall_back, tmp_path / "results", str(tmp_path / "run"))


def misread(rank: Rank, folder: str) -> None:
    """Rank 1 reads a file otherwise than it is: its node is named, and no checkpoint is given up."""
    engine, ema = make(rank)
    save(engine, ema, Path(folder), 1)
    save(engine, ema, Path(folder), 2)
    right = store._hash_range
    if rank.rank == 1:
        store._hash_range = lambda path, start: right(path, start)[::-1]
    with pytest.raises(UserError, match=r"rank 1 on .* finds: .* check the memory"):
        restore.restore(saver_of(engine, ema, Path(folder)), check=lambda path, state: None, fall_back=True)
    assert len(store.complete(Path(folder))) == 2


def test_a_node_that_reads_badly_is_named(tmp_path: Path) -> None:
    run_ranks(2, misread, tmp_path / "results", str(tmp_path / "run"))


def test_list_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert main(["checkpoint", "list", str(tmp_path)]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err
    run_ranks(1, write_two, tmp_path / "results", str(tmp_path / "checkpoints"))
    (tmp_path / "checkpoints/step_00000009.tmp-ab").mkdir()
    assert main(["checkpoint", "verify", str(tmp_path), "format=json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["state"], row["latest"]) for row in rows] == [
        (1, "complete", False), (2, "complete", True), (9, "unfinished", False),
    ]  # fmt: skip
    assert rows[0]["bytes"] > 1000
    file = tmp_path / "checkpoints/step_00000002/model-rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["checkpoint", "list", str(tmp_path)]) == 0  # sizes alone
    assert "-> step_00000002" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert "model-rank_00000.safetensors is damaged" in told.out
    assert "1 of 3 checkpoints are damaged" in told.err
    file.unlink()
    assert main(["checkpoint", "list", str(tmp_path)]) == 2
    assert "rank_00000.safetensors is missing" in capsys.readouterr().out
    for wrong in (["checkpoint"], ["checkpoint", "lst", str(tmp_path)], ["checkpoint", "list"]):
        assert main(wrong) == 2


def write_two(rank: Rank, folder: str) -> None:
    engine, ema = make(rank)
    for step in (1, 2):
        save(engine, ema, Path(folder), step)
