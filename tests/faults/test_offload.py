"""The optimizer's state in the host's memory: what it needs is compiled in spite of kills, and it trains the same."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import dist_model as dm
import psutil
import pytest
import torch
from dist_ranks import run_ranks
from saving_ranks import save
from test_bad_numbers import check_spoilt, spoil_gradients

from sora_lite.config import Offload, ParallelConfig
from sora_lite.errors import UserError
from sora_lite.parallel.apply import apply_parallel
from sora_lite.parallel.env import Rank
from sora_lite.training import restore, store
from sora_lite.training.ema import EMA
from sora_lite.training.engine import Engine

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(3600)]

BUILD_SECONDS = 1500.0
"""The compiler needs two minutes of a core."""

START = """
import os, sys
os.environ.update(DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=sys.argv[1])
sys.path[:0] = sys.argv[2:]
import dist_model as dm
from sora_lite.parallel.env import init_rank
dm.make_engine(init_rank("cpu", threads=1), 2, offload="cpu")
"""


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def train(rank: Rank, folder: str) -> list[float]:
    """Some steps with offload, as the first of all starts."""
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    engine = dm.make_engine(rank, 2, offload="cpu")
    return [dm.train_step(engine, step)[0] for step in range(dm.STEPS)]


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of extensions in which a first build was killed without warning, and a second start succeeded."""
    folder = tmp_path_factory.mktemp("extensions")
    words = [sys.executable, "-c", START, str(folder), *sys.path]
    killed = subprocess.Popen(words)
    compilers: list[psutil.Process] = []
    try:
        end = time.monotonic() + 120
        while not any(name_of(one) == "cc1plus" for one in compilers):
            assert time.monotonic() < end and killed.poll() is None, "it never compiled"
            time.sleep(0.05)
            compilers = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
        killed.wait()
        assert (folder / "cpu_adam/lock").exists(), "what torch would wait for, for ever"
        plain, _, _ = dm.train_plainly()
        for losses in run_ranks(2, train, folder / "results", str(folder), timeout=BUILD_SECONDS):
            assert losses == pytest.approx(plain, abs=1e-5)
    finally:
        killed.kill()
        for one in compilers:  # where they still run
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    assert not (folder / "cpu_adam/lock").exists()
    assert list((folder / "cpu_adam").glob("*.so"))
    return folder


def test_a_start_after_a_kill_while_compiling(extensions: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    run_ranks(2, train, tmp_path, str(extensions))
    assert time.monotonic() - began < 60, "nothing is compiled again"


def train_everywhere(rank: Rank, folder: str) -> dict[str, dict]:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    found = {}
    layouts = itertools.product((1, 2, 3), (1, 2), ("fp32", "bf16"))
    for stage, accumulation, precision in layouts:
        engine = dm.make_engine(rank, stage, accumulation, precision, "cpu")
        assert type(engine._adamw).__name__ == "DeepSpeedCPUAdam"
        ema = EMA(engine, dm.OPTIM.ema_decay)
        steps = [dm.train_step(engine, step, ema) for step in range(dm.STEPS)]
        tokens = dm.batch(0)[0]
        with engine.swapped(ema):
            inside = engine(tokens)
        plain = dm.make_model()
        assert plain.load_state_dict(engine.full_state(ema), strict=False).missing_keys == list(engine.frozen())
        found[f"{stage} {accumulation} {precision}"] = {
            "losses": [loss for loss, _ in steps],
            "norms": [norm for _, norm in steps],
            "state": {name: tensor.tolist() for name, tensor in engine.full_state().items()},
            "swap_error": float((inside.float() - plain(tokens).detach()).abs().max()),
            "steps": engine.step_count,
        }
        engine.destroy()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_it_trains_as_plain_torch_does(extensions: Path, tmp_path: Path, world: int) -> None:
    losses, norms, model = dm.train_plainly()
    for layout, here in run_ranks(world, train_everywhere, tmp_path, str(extensions))[0].items():
        exact = "fp32" in layout
        assert here["losses"] == pytest.approx(losses, abs=1e-5 if exact else 0.1, rel=1e-5 if exact else 0.03), layout
        assert here["norms"] == pytest.approx(norms, rel=1e-4 if exact else 0.1), layout
        assert here["swap_error"] < (1e-6 if exact else 0.02), layout
        assert here["steps"] == dm.STEPS
        if exact:
            state = {name: torch.tensor(values) for name, values in here["state"].items()}
            assert dm.difference(state, dm.trained_state(model)) < 1e-5, layout


def train_compiled(rank: Rank, folder: str) -> list[list[float]]:
    """Losses at ZeRO 1, 2 and 3."""
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    found = []
    for stage in (1, 2, 3):
        parallel = ParallelConfig(zero_stage=stage, offload=Offload.cpu, compile=True)
        model = dm.make_model()
        apply_parallel(model, parallel)
        engine = Engine(model, optim=dm.OPTIM, parallel=parallel, rank=rank, global_batch=dm.BATCH)
        found.append([dm.train_step(engine, step)[0] for step in range(dm.STEPS)])
        engine.destroy()
    return found


def test_compiled_blocks_train_the_same_with_it(extensions: Path, tmp_path: Path) -> None:
    losses = dm.train_plainly()[0]
    for found in run_ranks(1, train_compiled, tmp_path, str(extensions), timeout=600)[0]:
        assert found == pytest.approx(losses, rel=1e-5, abs=1e-5)


def spoil(rank: Rank, folder: str) -> list[list]:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    found = spoil_gradients(rank, [[stage, 2, "fp32"] for stage in (1, 2, 3)], "cpu")
    for stage in (1, 2, 3):
        engine = dm.make_engine(rank, stage, offload="cpu")
        before = dm.digest(engine.full_state())
        engine.backward(engine(dm.batch(0)[0][: engine.micro_batch]).square().mean())
        assert engine.step(0.1, limit=1e-6) > 1e-6
        assert dm.digest(engine.full_state()) == before and engine.step_count == 0, "an update above the limit was made"
        engine.destroy()
    return found


def test_bad_numbers_change_nothing(extensions: Path, tmp_path: Path) -> None:
    check_spoilt(run_ranks(2, spoil, tmp_path, str(extensions))[0])


LEGS = [(2, 1, "cpu"), (1, 3, "none"), (2, 2, "cpu"), (2, 0, "none"), (2, 3, "cpu")]
"""Ranks, ZeRO stage and offload."""


def train_leg(rank: Rank, folder: str, extensions: str, leg: int) -> float:
    """Go on from the checkpoint of the leg before, a step further; what was loaded is what lies there, bit for bit."""
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    _, stage, offload = LEGS[leg]
    engine = dm.make_engine(rank, stage, offload=offload)
    ema = EMA(engine, dm.OPTIM.ema_decay)
    if leg:
        path = store.latest(Path(folder))
        assert path is not None
        saved = dm.contents(path)
        assert restore.load(path, {"model": engine}, {"model": ema})["step"] == leg
        for kind, tensors in (("fp32", engine.full_state()), ("ema", engine.full_state(ema))):
            assert all(tensors[name].equal(saved[f"model|{name}|{kind}"]) for name in engine.shapes)
        for fragment in engine.fragments():
            for kind in ("exp_avg", "exp_avg_sq"):
                whole = saved[f"model|{fragment.name}|{kind}"].flatten()
                assert whole[fragment.offset :][: len(fragment.master)].equal(getattr(fragment, kind).cpu())
        assert engine.step_count == leg
    loss, _ = dm.train_step(engine, leg, ema)
    save(engine, ema, Path(folder), leg + 1)
    return loss


def test_a_run_goes_on_with_and_without_it(extensions: Path, tmp_path: Path) -> None:
    plain, _, model = dm.train_plainly(len(LEGS))
    folder = tmp_path / "run"
    for leg, (world, _, _) in enumerate(LEGS):
        losses = run_ranks(world, train_leg, tmp_path / "results", str(folder), str(extensions), leg)
        assert losses == pytest.approx([plain[leg]] * world, abs=1e-5)
    state, _ = restore.read_full(folder / f"step_{len(LEGS):08d}", "raw")
    assert dm.difference(state, dm.trained_state(model)) < 1e-5


def refuse(rank: Rank, folder: str) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    with pytest.raises(UserError, match=r"parallel\.offload=cpu takes what ZeRO shards: set parallel\.zero_stage"):
        dm.make_engine(rank, 0, offload="cpu")
    os.environ["CXX"] = "/bin/false"
    with pytest.raises(UserError, match=r"parallel\.offload=cpu: DeepSpeed's CPUAdam could not be compiled .* g\+\+"):
        dm.make_engine(rank, 1, offload="cpu")


def test_what_cannot_be(tmp_path: Path) -> None:
    run_ranks(1, refuse, tmp_path / "results", str(tmp_path / "empty"))
