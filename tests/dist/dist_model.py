"""A tiny model with every kind of parameter that the engine must handle, its data, and plain one-process training."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sora_lite.config import Offload, OptimConfig, ParallelConfig, Precision
from sora_lite.parallel.env import Rank
from sora_lite.training.ema import EMA
from sora_lite.training.engine import Engine

STEPS = 10
BATCH = 8
OPTIM = OptimConfig(lr=1e-2, betas=[0.9, 0.95], clip=1.0, weight_decay=0.1, ema_decay=0.99)


class Block(nn.Module):
    """A residual layer with a bare parameter of its own beside its children."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.tanh(self.linear(self.norm(x)))


class TinyModel(nn.Module):
    """Regression from 5 tokens; its odd width makes fragments end in the middle of parameters."""

    def __init__(self, width: int = 13, frozen: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 1)
        self.idle = nn.Parameter(torch.ones(3))  # takes no part in the forward pass
        self.fixed = nn.Linear(width, width)
        self.fixed.requires_grad_(not frozen)
        self.register_buffer("shift", torch.tensor(0.3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).mean(1)  # (B, D)
        for block in self.blocks:
            x = block(x)
        x = x + self.fixed(x)
        return (self.head(x) - self.shift).squeeze(-1)  # (B,)


def make_model(**kwargs) -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(**kwargs)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what is frozen."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, 5) and targets (B,) of a global step."""
    tokens = torch.randint(0, 11, (BATCH, 5), generator=torch.Generator().manual_seed(100 + step))
    return tokens, tokens.float().mean(-1) / 10


def make_engine(
    rank: Rank, stage: int, accumulation: int = 1, precision: str = "fp32", offload: str = "none", **kwargs
) -> Engine:
    parallel = ParallelConfig(
        zero_stage=stage, accumulation=accumulation, precision=Precision[precision], offload=Offload[offload]
    )
    return Engine(make_model(**kwargs), optim=OPTIM, parallel=parallel, rank=rank, global_batch=BATCH)


def rate(step: int) -> float:
    """A learning rate that changes."""
    return OPTIM.lr * (1 - 0.05 * step)


def train_step(engine: Engine, step: int, ema: EMA | None = None) -> tuple[float, float]:
    """One optimizer step on this rank's share; the loss over the global batch, and the gradient norm."""
    tokens, targets = batch(step)
    total = torch.zeros(())
    for micro in range(engine.accumulation):
        first = (micro * engine.rank.world_size + engine.rank.rank) * engine.micro_batch
        share = slice(first, first + engine.micro_batch)
        loss = (engine(tokens[share]).float() - targets[share]).square().mean()
        engine.backward(loss)
        total += loss.detach() / engine.accumulation
    norm = engine.step(rate(step))
    if ema is not None:
        ema.update(step)
    return float(engine.rank.mean(total)), norm


def train_plainly(steps: int = STEPS) -> tuple[list[float], list[float], TinyModel]:
    """The same training by torch alone in this process: losses, gradient norms, the trained model."""
    model = make_model()
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n and p.requires_grad]
    others = [p for n, p in model.named_parameters() if (p.ndim < 2 or "embedding" in n) and p.requires_grad]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(OPTIM.betas[0], OPTIM.betas[1]),
        eps=OPTIM.eps,
    )
    losses, norms = [], []
    for step in range(steps):
        tokens, targets = batch(step)
        loss = (model(tokens) - targets).square().mean()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)))
        for group in adamw.param_groups:
            group["lr"] = rate(step)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of two state dicts with the same names."""
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash over names and bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def contents(path: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint as full tensors by `ENGINE|NAME|KIND`, assembled apart from the code under test."""
    full: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        engine = file.name.split("-rank_")[0]
        with safe_open(file, framework="pt") as stored:
            layout = json.loads(stored.metadata()["fragments"])
            for key in stored.keys():  # noqa: SIM118 - not a mapping
                name, _, kind = key.rpartition("|")
                piece = stored.get_tensor(key)
                if kind == "buffer":
                    full[f"{engine}|{key}"] = piece
                    continue
                shape, offset = layout[name]["shape"], layout[name]["offset"]
                whole = full.setdefault(f"{engine}|{key}", torch.full(shape, float("nan")))
                whole.view(-1)[offset : offset + piece.numel()] = piece
    return full
