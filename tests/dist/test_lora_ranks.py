"""Adapters on an imported Wan model at every ZeRO stage on 1 and 2 ranks, against torch and peft alone."""

from pathlib import Path

import dist_model as dm
import pytest
import torch
from dist_ranks import run_ranks
from tiny_inputs import call
from tiny_models import tiny_wan
from torch import Tensor, nn

from sora_lite.config import LoraConfig, OptimConfig, ParallelConfig
from sora_lite.errors import UserError
from sora_lite.generation.export import load_transformer, read_contract
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.parallel.env import Rank
from sora_lite.training import restore, store
from sora_lite.training.checkpoint import Saver
from sora_lite.training.ema import EMA
from sora_lite.training.engine import Engine
from sora_lite.training.lora import adapt
from sora_lite.training.replicas import ReplicaCheck

pytestmark = pytest.mark.dist
peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")

STAGES, WORLDS = (0, 1, 2, 3), (1, 2)
STEPS, BATCH, RANK, ALPHA = 8, 4, 3, 6.0
OPTIM = OptimConfig(lr=2e-2, weight_decay=0.1, ema_decay=0.9)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan().save_pretrained(folder / "theirs")
    assert call("import", f"weights_from={folder / 'theirs'}", f"out={folder / 'ours'}") == 0
    return str(folder / "ours")


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, times, text features, and what shall be predicted: the same in every step."""
    draw = torch.Generator().manual_seed(5)
    shape = (BATCH, 4, 3, 4, 4)
    return (
        torch.randn(shape, generator=draw), torch.rand(BATCH, generator=draw),
        torch.randn(BATCH, 6, 10, generator=draw), torch.randn(shape, generator=draw),
    )  # fmt: skip


def loss_of(model: nn.Module | Engine, share: slice = slice(None)) -> Tensor:
    x, time, text, target = (one[share] for one in batch())
    return (model(x, time, Conditions(text=text)) - target).square().mean()


def make_engine(rank: Rank, wan: str, stage: int) -> Engine:
    architecture = read_contract(Path(wan), "dit")[1].architecture
    module = VideoDiT(**architecture)
    torch.manual_seed(0)
    adapt(module, architecture, LoraConfig(rank=RANK, alpha=ALPHA), wan)
    parallel = ParallelConfig(zero_stage=stage)
    return Engine(module, optim=OPTIM, parallel=parallel, rank=rank, global_batch=BATCH)


def step(engine: Engine, ema: EMA, number: int) -> float:
    first = engine.rank.rank * engine.micro_batch
    loss = loss_of(engine, slice(first, first + engine.micro_batch))
    engine.backward(loss)
    engine.step(OPTIM.lr)
    ema.update(number)
    return float(engine.rank.mean(loss.detach()))


def frozen_whole(engine: Engine) -> dict[str, Tensor]:
    """The frozen weights of all ranks together, put together apart from the code under test."""
    full = {}
    for name, piece in engine.frozen().items():
        pieces = engine.rank.gather(piece.flatten().tolist()) if engine.stage == 3 else [piece.flatten().tolist()]
        full[name.replace(".base_layer", "")] = torch.tensor([value for one in pieces for value in one])
    return full


def train_everywhere(rank: Rank, wan: str) -> dict[str, dict]:
    base = load_transformer(Path(wan))[0].state_dict()
    found = {}
    for stage in STAGES:
        engine = make_engine(rank, wan, stage)
        ema = EMA(engine, OPTIM.ema_decay)
        replicas = ReplicaCheck(rank, {}, engine.frozen(), {}) if stage == 3 else ReplicaCheck(
            rank, engine.frozen(), {}, {}
        )  # fmt: skip
        losses = [step(engine, ema, number) for number in range(STEPS)]
        replicas.check(engine.replicated())
        kept = frozen_whole(engine)
        same = all(torch.equal(kept[name][: tensor.numel()], tensor.flatten()) for name, tensor in base.items())
        found[str(stage)] = {
            "losses": losses, "base": same and kept.keys() == base.keys(),
            "state": {name: tensor.tolist() for name, tensor in engine.full_state().items()},
            "held": sum(fragment.master.numel() for fragment in engine.fragments()),
        }  # fmt: skip
        # One bit of one frozen weight turns on the last rank.
        with torch.no_grad():
            next(t for t in engine.frozen().values() if t.numel()).view(torch.int32).flatten()[:1].bitwise_xor_(
                int(rank.rank == rank.world_size - 1)
            )
        with pytest.raises(UserError, match=rf"rank {rank.world_size - 1} \(.*frozen weights in memory changed"):
            replicas.check(engine.replicated())
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def found(wan: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    return {world: run_ranks(world, train_everywhere, tmp_path_factory.mktemp("lora"), wan) for world in WORLDS}


@pytest.fixture(scope="module")
def plain(wan: str) -> tuple[list[float], dict[str, Tensor]]:
    """The same by torch and peft."""
    model = load_transformer(Path(wan))[0]
    targets = r"blocks\.\d\.(attention|cross|mlp)\.(qkv|q|kv|out|0|2)"
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), model)
    model.train()
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    adamw = torch.optim.AdamW(
        adapters.values(), lr=OPTIM.lr, betas=(OPTIM.betas[0], OPTIM.betas[1]), eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
    )  # fmt: skip
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model)
        loss.backward()
        nn.utils.clip_grad_norm_(list(adapters.values()), OPTIM.clip)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses, {name: tensor.detach() for name, tensor in adapters.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_adapters_learn_as_with_peft_alone(
    found: dict[int, list[dict]], plain: tuple[list[float], dict[str, Tensor]], wan: str, world: int, stage: int
) -> None:
    losses, adapters = plain
    assert losses[-1] < 0.9 * losses[0]
    assert losses[0] == pytest.approx(float(loss_of(load_transformer(Path(wan))[0])), abs=1e-6)
    for here in (one[str(stage)] for one in found[world]):
        assert here["losses"] == pytest.approx(losses, abs=1e-5)
        assert dm.difference({name: torch.tensor(one) for name, one in here["state"].items()}, adapters) < 1e-4
        assert here["base"], "the frozen weights are no longer those of the import, bit for bit"
    held = sum(one[str(stage)]["held"] for one in found[world])
    assert held == sum(tensor.numel() for tensor in adapters.values()) * (world if stage == 0 else 1)


def train_on(rank: Rank, wan: str, folder: str, stage: int, numbers: list[int], resume: bool) -> list:
    """Steps in a fresh process, with a checkpoint after the third."""
    engine = make_engine(rank, wan, stage)
    ema = EMA(engine, OPTIM.ema_decay)
    if resume:
        path = store.latest(Path(folder))
        assert path is not None
        restore.load(path, {"dit": engine}, {"dit": ema})
    losses = []
    for number in numbers:
        losses.append(step(engine, ema, number))
        if number == 2:
            saver = Saver(Path(folder), {"dit": engine}, {"dit": ema}, rank, keep_last=1)
            saver.save(3, {})
            saver.finish()
    return [losses, dm.digest(engine.full_state()), dm.digest(engine.full_state(ema))]


@pytest.mark.parametrize(("before", "after"), [(3, 3), (2, 2), (0, 3)])
def test_a_run_goes_on_without_the_base_in_its_checkpoint(wan: str, tmp_path: Path, before: int, after: int) -> None:
    folder = tmp_path / "run"
    whole = run_ranks(2, train_on, tmp_path, wan, str(folder), before, list(range(6)), False)
    rest = run_ranks(2, train_on, tmp_path, wan, str(folder), after, [3, 4, 5], True)
    held = {name.split("|")[1] for name in dm.contents(folder / "step_00000003")}
    assert held and all("lora_" in name for name in held)
    for undisturbed, resumed in zip(whole, rest, strict=True):
        if before == after:  # bit for bit
            assert [undisturbed[0][3:], *undisturbed[1:]] == resumed
        assert undisturbed[0][3:] == pytest.approx(resumed[0], abs=1e-6)
