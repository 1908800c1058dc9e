"""Parameter groups, the learning rate of each step, and activation checkpointing of a plain model."""

import pytest
import torch
from torch import nn

from sora_lite.config import OptimConfig, Schedule
from sora_lite.parallel.apply import apply_activation_checkpointing
from sora_lite.training.optim import learning_rate, parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.pos_embed = nn.Parameter(torch.zeros(5, 3))
        self.scale_shift_table = nn.Parameter(torch.zeros(6, 3))
        self.time_embedder = nn.Linear(3, 3)
        self.norm = nn.GroupNorm(1, 3)
        self.final_norm_scale = nn.Parameter(torch.zeros(3, 1, 1))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)) for _ in range(2))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_only_matrices_decay() -> None:
    model = Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [names[id(p)] for p in decayed["params"]] == [
        "time_embedder.weight",
        "blocks.0.0.weight",
        "blocks.1.0.weight",
    ]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {names[id(p)] for group in (decayed, plain) for p in group["params"]} == trainable
    assert len(parameter_groups(nn.LayerNorm(3), 0.1)) == 1  # no empty group


def test_constant_rate_with_warm_up() -> None:
    optim = OptimConfig(lr=0.4, warmup_steps=4)
    rates = [learning_rate(step, optim, 10) for step in range(10)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4] + 6 * [0.4])
    assert learning_rate(0, OptimConfig(lr=0.4), 10) == 0.4


def test_cosine_rate() -> None:
    optim = OptimConfig(lr=2.0, warmup_steps=10, schedule=Schedule.cosine, final_lr=0.1)
    assert learning_rate(9, optim, 110) == learning_rate(10, optim, 110) == 2.0
    assert learning_rate(60, optim, 110) == pytest.approx(1.1)
    assert learning_rate(110, optim, 110) == learning_rate(10**6, optim, 110) == pytest.approx(0.2)
    rates = [learning_rate(step, optim, 110) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(5, OptimConfig(lr=1.0, schedule=Schedule.cosine), 5) == pytest.approx(0)
    with pytest.raises(ValueError, match="negative"):
        learning_rate(-1, optim, 110)


def test_activation_checkpointing_changes_nothing_but_memory() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Model()
        names = list(model.state_dict())
        if recompute:
            apply_activation_checkpointing(model)
        assert list(model.state_dict()) == names
        calls = []
        model.blocks[0][0].register_forward_hook(lambda *args, calls=calls: calls.append(1))
        model(torch.ones(7, 3)).square().sum().backward()
        assert len(calls) == 1 + recompute
        gradients.append([block[0].weight.grad for block in model.blocks])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)  # dropout included
    with torch.no_grad():
        assert model(torch.ones(7, 3)).shape == (7, 3)
    with pytest.raises(TypeError, match="no list `blocks`"):
        apply_activation_checkpointing(nn.Linear(1, 1))
