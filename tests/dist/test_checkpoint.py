"""The portable checkpoint: any layout to any other, bit-for-bit resume, damage found, failures shared."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import dist_model as dm
import pytest
import torch
from dist_ranks import run_ranks

from sora_lite.errors import UserError
from sora_lite.parallel.env import Rank, init_rank, shutdown
from sora_lite.training import restore, store
from sora_lite.training.checkpoint import Saver
from sora_lite.training.ema import EMA
from sora_lite.training.engine import Engine

pytestmark = pytest.mark.dist

EXTRA = {"data": {"seed": 7, "global_step": 3}, "note": "ä"}


def saved(rank: Rank, engine: Engine, ema: EMA | None, folder: Path, step: int, keep_last: int = 9) -> Path:
    return save_all(rank, {"model": engine}, {"model": ema}, folder, step, keep_last)


def save_all(rank: Rank, engines: dict, emas: dict, folder: Path, step: int, keep_last: int = 9) -> Path:
    saver = Saver(folder, engines, emas, rank, keep_last=keep_last, background=step % 2 == 0)
    saver.save(step, EXTRA)
    saver.finish()
    assert saver.newest is not None
    return saver.newest


# ---------------------------------------------------------------------------------------------------- layouts


def write_layouts(rank: Rank, folder: str) -> None:
    """A checkpoint of each stage on this many ranks, after three steps."""
    for stage in (0, 1, 2, 3) if rank.world_size == 2 else (0, 3):
        engine = dm.make_engine(rank, stage)
        ema = EMA(engine, dm.OPTIM.ema_decay)
        for step in range(3):
            dm.train_step(engine, step, ema)
        saved(rank, engine, ema, Path(folder) / f"{rank.world_size}-{stage}", 3)
        engine.destroy()


def convert_layouts(rank: Rank, folder: str, pairs: list[list]) -> list[float]:
    """Load each source into another stage, save what came in beside it; losses of the step after."""
    losses = []
    for source, stage, precision in pairs:
        engine = dm.make_engine(rank, stage, precision=precision)
        ema = EMA(engine, dm.OPTIM.ema_decay)
        path = store.latest(Path(folder) / source)
        assert path is not None
        state = restore.load(path, {"model": engine}, {"model": ema})
        assert state["step"] == engine.step_count == 3
        assert state["extra"] == EXTRA
        again = saved(rank, engine, ema, Path(folder) / f"{source}-{rank.world_size}-{stage}-{precision}", 3)
        raw, _ = restore.read_full(again, "raw")
        plain = dm.make_model()
        plain.load_state_dict(raw, strict=False)
        tokens = dm.batch(0)[0]
        if precision == "bf16":
            shift = plain.shift.clone()
            plain.bfloat16()
            plain.shift = shift
        with torch.no_grad():
            assert torch.allclose(
                engine(tokens).float(), plain(tokens).float(), atol=1e-6 if precision == "fp32" else 0.02
            )
        losses.append(dm.train_step(engine, 3, ema)[0])
        engine.destroy()
    return losses


def test_any_layout_loads_what_any_other_wrote(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for world in (1, 2):
        run_ranks(world, write_layouts, tmp_path / "results", folder)
    jobs = {
        1: [[f"2-{stage}", 3 - stage, "fp32"] for stage in range(4)],
        2: [["1-0", 1, "fp32"], ["1-3", 2, "fp32"]]
        + [[f"2-{stage}", (stage + 2) % 4, "fp32"] for stage in range(4)]
        + [["2-0", 1, "bf16"], ["2-2", 3, "bf16"]],
    }
    for world, pairs in jobs.items():
        losses = run_ranks(world, convert_layouts, tmp_path / "results", folder, pairs)[0]
        for (source, stage, precision), loss in zip(pairs, losses, strict=True):
            before = dm.contents(tmp_path / source / "step_00000003")
            after = dm.contents(tmp_path / f"{source}-{world}-{stage}-{precision}" / "step_00000003")
            assert not any("|fixed." in name for name in before), "a frozen layer is in a checkpoint"
            assert dm.digest(before) == dm.digest(after), f"{source} changed on its way into stage {stage}"
            tolerance = 1e-5 if precision == "fp32" else 0.05
            assert loss == pytest.approx(dm.train_plainly(4)[0][3], abs=tolerance)


# ---------------------------------------------------------------------------------------------------- resume


def train_on(rank: Rank, folder: str, stage: int, steps: list[int], resume: bool) -> list:
    """Train the given steps in a fresh process, saving after step 3; losses, norms and a hash of everything."""
    engine = dm.make_engine(rank, stage, accumulation=2)
    ema = EMA(engine, dm.OPTIM.ema_decay)
    if resume:
        path = store.latest(Path(folder))
        assert path is not None
        restore.load(path, {"model": engine}, {"model": ema})
    curve = []
    for step in steps:
        curve.append(dm.train_step(engine, step, ema))
        if step == 2:
            saved(rank, engine, ema, Path(folder), 3)
    state, average = engine.full_state(), engine.full_state(ema)
    return [curve, dm.digest(state), dm.digest(average)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_for_bit(tmp_path: Path, stage: int) -> None:
    folder = str(tmp_path / "run")
    whole = run_ranks(2, train_on, tmp_path, folder, stage, list(range(6)), False)
    rest = run_ranks(2, train_on, tmp_path, folder, stage, [3, 4, 5], True)
    for undisturbed, resumed in zip(whole, rest, strict=True):
        assert undisturbed[0][3:] == resumed[0]
        assert undisturbed[1:] == resumed[1:]


# ---------------------------------------------------------------------------------------------------- failures


def fail_while_saving(rank: Rank, folder: str) -> None:
    """The disk of rank 1 fails: both ranks raise, the earlier checkpoint stays the latest, and the next save works."""
    engine = dm.make_engine(rank, 2)
    first = saved(rank, engine, None, Path(folder), 1)
    write = store.write_hashed

    def broken(*args: object) -> dict:
        if rank.rank == 1:
            raise OSError("no space left on device")
        return write(*args)

    store.write_hashed = broken
    with pytest.raises(UserError, match=r"step 2 could not be written: rank 1: .*no space left on device"):
        saved(rank, engine, None, Path(folder), 2)
    store.write_hashed = write
    assert store.latest(Path(folder)) == first
    saved(rank, engine, None, Path(folder), 2)
    if rank.is_main:
        assert sorted(p.name for p in Path(folder).iterdir()) == ["latest", "step_00000001", "step_00000002"]
        file = Path(folder) / "step_00000002" / "model-rank_00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    rank.barrier()
    before = dm.digest(engine.full_state())
    with pytest.raises(UserError, match=r"model-rank_00001\.safetensors is damaged"):
        restore.load(Path(folder) / "step_00000002", {"model": engine}, {})
    assert dm.digest(engine.full_state()) == before


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    run_ranks(2, fail_while_saving, tmp_path, str(tmp_path / "run"))


@pytest.fixture(scope="module")
def rank() -> Iterator[Rank]:
    yield init_rank("cpu")
    shutdown()


@pytest.fixture(scope="module")
def engine(rank: Rank) -> Iterator[Engine]:
    made = dm.make_engine(rank, 2)
    dm.train_step(made, 0)
    yield made
    made.destroy()


@pytest.fixture
def good(rank: Rank, engine: Engine, tmp_path: Path) -> Path:
    return saved(rank, engine, EMA(engine, 0.9), tmp_path / "run", 7)


def test_every_kind_of_damage_is_found(good: Path, engine: Engine) -> None:
    store.verify(good)
    for file in sorted(good.iterdir()):
        data = file.read_bytes()
        flips = {0, 1, 8, 9, len(data) // 3, len(data) // 2, len(data) - 1}
        damaged = [data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :] for i in sorted(flips)]
        for bad in [*damaged, data[: len(data) // 2], data + b"\0", b""]:
            file.write_bytes(bad)
            with pytest.raises(UserError, match=file.name):
                store.verify(good)
        file.unlink()
        with pytest.raises(UserError, match=file.name):
            restore.load(good, {"model": engine}, {})
        file.write_bytes(data)
    store.verify(good)


def test_a_manifest_cannot_lead_out_of_its_directory(good: Path) -> None:
    manifest = json.loads((good / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": "0"}
    manifest["sha256"] = store.manifest_hash(manifest)
    (good / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        store.verify(good)


def test_pointer(good: Path) -> None:
    folder = good.parent
    assert store.latest(folder) == good
    assert store.latest(folder / "nothing") is None
    for name in ("", "../run/step_00000007", "step_00000007.tmp-1234", "/etc", "\xff\xfe"):
        (folder / "latest").write_text(name)
        with pytest.raises(UserError, match="is damaged"):
            store.latest(folder)
    (folder / "latest").write_text("step_00000009\n")
    with pytest.raises(UserError, match="does not exist"):
        store.latest(folder)


def test_only_the_newest_are_kept(rank: Rank, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "step_00000001.tmp-abcd").mkdir()  # of an attempt that was killed
    (tmp_path / "latest.tmp-abcd").write_text("step_0")
    for step in (1, 2, 3):
        saved(rank, engine, None, tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    again = saved(rank, engine, None, tmp_path, 3, keep_last=2)  # a complete checkpoint is never written over
    assert again.name == "step_00000003-2"
    assert store.latest(tmp_path) == again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000003-2"]
    shutil.copytree(again, tmp_path / "step_00000009")  # complete, but its attempt died before it set the pointer
    saved(rank, engine, None, tmp_path, 4, keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000004", "step_00000009"]


def test_another_model_is_refused(good: Path, rank: Rank, engine: Engine, tmp_path: Path) -> None:
    other = dm.make_engine(rank, 1, width=9)
    with pytest.raises(UserError, match=r"embedding.weight is \(11, 13\) in it and \(11, 9\) here"):
        restore.load(good, {"model": other}, {})
    trained = dm.make_engine(rank, 1, frozen=False)
    with pytest.raises(UserError, match=r"parameter fixed\.weight is missing in it"):
        restore.load(good, {"model": trained}, {})
    bare = saved(rank, engine, None, tmp_path / "bare", 1)
    restore.load(good, {"model": engine}, {})
    with pytest.raises(UserError, match=r"holds no 'vae', only model"):
        restore.load(good, {"vae": engine}, {})
    with pytest.raises(UserError, match=r"optim.ema_decay=0"):
        restore.load(bare, {"model": engine}, {"model": EMA(engine, 0.9)})
    with pytest.raises(UserError, match="weights=raw"):
        restore.read_full(bare, "ema")
    with pytest.raises(UserError, match="unknown"):
        restore.read_full(bare, "best")
    state, _ = restore.read_full(bare, "raw")
    assert dm.digest(state) == dm.digest(engine.full_state())
    other.destroy()
    trained.destroy()


def test_several_engines_and_odd_names(rank: Rank, tmp_path: Path) -> None:
    odd = torch.nn.Module()
    odd.register_parameter('a|b ä"\\', torch.nn.Parameter(torch.arange(6.0).view(2, 3)))
    odd.register_parameter("__metadata__", torch.nn.Parameter(torch.ones(2)))
    odd.register_buffer("count", torch.tensor([1, 2], dtype=torch.int64))
    odd.register_buffer("mask", torch.tensor([True, False]))
    parallel = dm.ParallelConfig(zero_stage=1)
    one = Engine(odd, optim=dm.OPTIM, parallel=parallel, rank=rank, global_batch=1)
    two = dm.make_engine(rank, 0)
    path = save_all(rank, {"odd": one, "model": two}, {}, tmp_path, 5)
    state, facts = restore.read_full(path, "raw", "odd")
    assert dm.digest(state) == dm.digest(one.full_state())
    assert state["count"].tolist() == [1, 2]
    assert facts["step"] == 5
    with pytest.raises(ValueError, match="name one"):
        restore.read_full(path, "raw")
    odd.count.zero_()
    restore.load(path, {"odd": one, "model": two}, {})
    assert odd.count.tolist() == [1, 2]
    with pytest.raises(ValueError, match="engine name"):
        save_all(rank, {"../x": one}, {}, tmp_path, 6)
    one.destroy()
    two.destroy()
