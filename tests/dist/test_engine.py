"""The engine against plain torch: every ZeRO stage, 1 and 2 ranks, with and without accumulation."""

import itertools
import math
import time
from pathlib import Path

import dist_model as dm
import pytest
import torch
from dist_ranks import run_ranks

from sora_lite.config import OptimConfig, ParallelConfig, Precision
from sora_lite.errors import UserError
from sora_lite.parallel.apply import apply_activation_checkpointing
from sora_lite.parallel.env import Rank
from sora_lite.training.ema import EMA, decay
from sora_lite.training.engine import Engine

pytestmark = pytest.mark.dist

STAGES = (0, 1, 2, 3)
WORLDS = (1, 2)
ACCUMULATIONS = (1, 2)


def _refuse_to_compile(*args: object, **kwargs: object) -> None:
    raise AssertionError("DeepSpeed tried to compile something")


def train_everywhere(rank: Rank) -> dict[str, dict]:
    """Many engines, one after another in one process; what the tests below look at, by stage and accumulation.

    Nothing may be compiled on the way.
    """
    import torch.utils.cpp_extension as cpp

    cpp.load = cpp._jit_compile = _refuse_to_compile
    found = {}
    for stage, accumulation in itertools.product(STAGES, ACCUMULATIONS):
        engine = dm.make_engine(rank, stage, accumulation)
        names = [name for name, _ in engine.module.named_parameters()]
        if accumulation == 2:
            apply_activation_checkpointing(engine.module)
        ema = EMA(engine, dm.OPTIM.ema_decay)
        average = engine.full_state()
        losses, norms = [], []
        for step in range(dm.STEPS):
            loss, norm = dm.train_step(engine, step, ema)
            losses.append(loss)
            norms.append(norm)
            if accumulation == 1:
                for name, tensor in engine.full_state().items():
                    average[name].lerp_(tensor, 1 - decay(step, dm.OPTIM.ema_decay))
        state, averaged = engine.full_state(), engine.full_state(ema)
        tokens = dm.batch(0)[0]
        outputs = {}
        plain = dm.make_model()
        for name, source in (("ema", averaged), ("raw", state)):
            assert plain.load_state_dict(source, strict=False).missing_keys == list(engine.frozen())
            outputs[name] = plain(tokens).detach()
        with torch.no_grad():
            before = engine(tokens)
        with engine.swapped(ema):
            inside = engine(tokens)
            evaluating = not engine.module.training and not torch.is_grad_enabled()
        with torch.no_grad():
            after = engine(tokens)
        found[f"{stage} {accumulation}"] = {
            "losses": losses,
            "norms": norms,
            "state": {name: tensor.tolist() for name, tensor in state.items()},
            "ema_error": dm.difference(average, averaged) if accumulation == 1 else None,
            "swap_error": float((inside - outputs["ema"]).abs().max()),
            "raw_error": float((before - outputs["raw"]).abs().max()),
            "moved": float((inside - before).abs().max()),
            "restored": torch.equal(before, after) and dm.digest(state) == dm.digest(engine.full_state()),
            "evaluating": evaluating and engine.module.training,
            "same_names": names == [name for name, _ in engine.module.named_parameters()],
            "steps": engine.step_count,
        }
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    return {world: run_ranks(world, train_everywhere, tmp_path_factory.mktemp("trained")) for world in WORLDS}


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], list[float], dm.TinyModel]:
    return dm.train_plainly()


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
class TestAgainstPlainTorch:
    @pytest.fixture
    def here(self, trained: dict[int, list[dict]], world: int, stage: int, accumulation: int) -> dict:
        first, *others = (found[f"{stage} {accumulation}"] for found in trained[world])
        assert all(other["losses"] == first["losses"] and other["state"] == first["state"] for other in others)
        return first

    def test_losses_norms_and_weights(self, here: dict, plain: tuple) -> None:
        losses, norms, model = plain
        assert here["losses"] == pytest.approx(losses, abs=1e-5)
        assert here["norms"] == pytest.approx(norms, rel=1e-4)
        assert losses[-1] < 0.5 * losses[0]
        state = {name: torch.tensor(values) for name, values in here["state"].items()}
        assert dm.difference(state, dm.trained_state(model)) < 1e-5
        assert here["steps"] == dm.STEPS

    def test_average(self, here: dict, accumulation: int) -> None:
        if accumulation == 1:
            assert here["ema_error"] <= 1e-7

    def test_swapped(self, here: dict) -> None:
        assert here["swap_error"] < 1e-6
        assert here["raw_error"] < 1e-6
        assert here["moved"] > 1e-3
        assert here["restored"]
        assert here["evaluating"]

    def test_names(self, here: dict) -> None:
        assert here["same_names"]


def misuse(rank: Rank) -> None:
    """Calls in the wrong order, numbers that are not finite, and settings that do not go together."""
    tokens, targets = dm.batch(0)
    for stage in STAGES:
        engine = dm.make_engine(rank, stage, accumulation=2)
        with pytest.raises(RuntimeError, match="2 backward passes before it, not 0"):
            engine.step(0.1)
        before = dm.digest(engine.full_state())
        for _ in range(2):
            engine.backward(engine(tokens[: engine.micro_batch]).sum() * math.nan)
        with pytest.raises(RuntimeError, match="more than accumulation=2"):
            engine.backward(engine(tokens).sum())
        with pytest.raises(RuntimeError, match="between backward and step"), engine.swapped(None):
            pass
        assert not math.isfinite(engine.step(0.1))
        assert dm.digest(engine.full_state()) == before, f"a NaN reached the weights at stage {stage}"
        assert engine.step_count == 0
        for _ in range(2):
            engine.backward(engine(tokens[: engine.micro_batch]).square().mean())
        norm = engine.step(0.1, limit=1e-6)
        assert 1e-6 < norm < math.inf
        assert dm.digest(engine.full_state()) == before, f"an update above the limit was made at stage {stage}"
        assert engine.step_count == 0
        infinite = torch.tensor(math.inf)
        engine.backward(engine(tokens[: engine.micro_batch]).square().mean() + infinite)  # whose own gradient is finite
        engine.backward(engine(tokens[: engine.micro_batch]).square().mean())
        assert not math.isfinite(engine.step(0.1))
        assert dm.digest(engine.full_state()) == before
        assert math.isfinite(dm.train_step(engine, 0)[1])  # and training goes on
        assert dm.digest(engine.full_state()) != before
        with engine.swapped(None):
            assert engine(tokens).shape == targets.shape
        engine.destroy()
    with pytest.raises(UserError, match=r"parallel\.zero_stage=4"):
        dm.make_engine(rank, 4)
    with pytest.raises(UserError, match=r"parallel\.zero_stage to 1, 2 or 3"):
        dm.make_engine(rank, 0, precision="bf16")
    with pytest.raises(UserError, match="cannot be divided"):
        dm.make_engine(rank, 0, accumulation=3)


def test_misuse(tmp_path: Path) -> None:
    run_ranks(1, misuse, tmp_path)


def train_in_bf16(rank: Rank) -> dict[str, dict]:
    """bf16 at the stages that have it, and two engines that train in turns."""
    found = {}
    for stage in (1, 2, 3):
        engine = dm.make_engine(rank, stage, precision="bf16")
        start = dm.difference(engine.full_state(), dm.trained_state(dm.make_model()))
        losses = [dm.train_step(engine, step)[0] for step in range(dm.STEPS)]
        found[f"bf16 {stage}"] = {"losses": losses, "start": start, "buffer": str(engine.module.shift.dtype)}
        engine.destroy()
    one, two = dm.make_engine(rank, 2), dm.make_engine(rank, 3)
    pairs = [(dm.train_step(one, step)[0], dm.train_step(two, step)[0]) for step in range(dm.STEPS)]
    found["turns"] = {"losses": [list(pair) for pair in pairs]}
    return found


def test_bf16_and_two_engines_at_once(tmp_path: Path, plain: tuple) -> None:
    found = run_ranks(2, train_in_bf16, tmp_path)[0]
    for stage in (1, 2, 3):
        here = found[f"bf16 {stage}"]
        assert here["losses"] == pytest.approx(plain[0], abs=0.1, rel=0.03)
        assert here["start"] == 0, "masters must start from the fp32 weights, not from rounded ones"
        assert here["buffer"] == "torch.float32"
    for one, two in found["turns"]["losses"]:
        assert one == pytest.approx(two, abs=1e-5)


def collectives(rank: Rank, folder: Path) -> list:
    """What Rank offers, and that a failure on one rank is raised on all."""
    total = float(rank.sum(torch.tensor([1.0 + rank.rank])))
    mean = rank.mean(torch.tensor([1.0 + rank.rank, 5.0])).tolist()
    everyone = rank.gather({"rank": rank.rank, "text": "ä" * rank.rank})

    def fail_on_the_last() -> int:
        if rank.rank == rank.world_size - 1:
            raise UserError("this file is missing")
        return rank.rank

    with pytest.raises(UserError, match="this file is missing"):
        rank.together(fail_on_the_last)
    with pytest.raises(UserError, match="this file is missing"):
        rank.main_first(fail_on_the_last)
    begun = folder / "begun"

    def slow_on_the_first() -> bool:
        was_there = begun.exists()
        if rank.is_main:
            time.sleep(0.2)
            begun.touch()
        return was_there

    assert rank.main_first(slow_on_the_first, patience=0.01) == (not rank.is_main)
    rank.barrier()
    return [total, mean, everyone, rank.together(lambda: rank.rank), rank.is_main, rank.backend, str(rank.device)]


def test_collectives(tmp_path: Path) -> None:
    first, second = run_ranks(2, collectives, tmp_path, tmp_path)
    everyone = [{"rank": 0, "text": ""}, {"rank": 1, "text": "ä"}]
    assert first == [3.0, [1.5, 5.0], everyone, 0, True, "gloo", "cpu"]
    assert second == [3.0, [1.5, 5.0], everyone, 1, False, "gloo", "cpu"]


def test_decay() -> None:
    assert decay(0, 0.9999) == pytest.approx(0.1)
    assert decay(90, 0.9999) == pytest.approx(0.91)
    assert decay(10**7, 0.9999) == 0.9999


def test_an_engine_needs_something_to_train() -> None:
    rank = Rank(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), backend="gloo", launcher="single")
    parallel = ParallelConfig(precision=Precision.fp32)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Engine(torch.nn.ReLU(), optim=OptimConfig(), parallel=parallel, rank=rank, global_batch=1)
