"""Blocks through torch.compile: the same predictions and gradients as without, at many shapes; all kinds of blocks."""

import itertools

import pytest
import torch
from test_dit import MODELS, conditions_for, inputs, make

from sora_lite.config import ParallelConfig
from sora_lite.errors import UserError
from sora_lite.models.dit import VideoDiT
from sora_lite.parallel.apply import apply_compile, apply_parallel

SHAPES = [(2, 1, 4, 6), (1, 3, 4, 6), (3, 3, 4, 6), (2, 5, 8, 4), (2, 2, 2, 8), (3, 9, 4, 4)]
"""Batch, latent frames and cells: stills, single samples, and clips that differ in all sizes."""


def gradients(model: VideoDiT, batch: int, *shape: int) -> dict[str, torch.Tensor]:
    """Of a loss on fixed inputs, with the prediction, by name."""
    latent, time, _ = inputs(batch, *shape)
    given = conditions_for(model, batch, shape[0])
    model.zero_grad()
    out = model(latent, time, given)
    (out[:, :4] - latent).square().mean().backward()
    return {"out": out.detach()} | {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    largest = max(value.abs().max() for value in other.values())
    for name, value in one.items():
        error = (value - other[name]).abs().max()
        assert error <= 1e-4 * max(other[name].abs().max(), 1e-3 * largest), name


def compare(kind: str, shapes: list[tuple[int, ...]], **parallel: bool) -> VideoDiT:
    """Eager and compiled at some shapes; the compiled model."""
    eager, compiled = make(**MODELS[kind]), make(**MODELS[kind])
    names = list(compiled.state_dict())
    apply_parallel(compiled, ParallelConfig(compile=True, **parallel))
    assert list(compiled.state_dict()) == names
    for shape in shapes:
        same(gradients(compiled, *shape), gradients(eager, *shape))
    eager.load_state_dict(compiled.state_dict())
    return compiled


def test_compiled_blocks_change_nothing_but_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compare("paper", [(2, 3, 4, 6)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1  # for all blocks together
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"parallel\.compile=true.*'no-such-compiler', which is not there"):
        apply_compile(make())
    with pytest.raises(TypeError, match="no list `blocks`"):
        monkeypatch.delenv("CXX")
        apply_compile(torch.nn.Linear(1, 1))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_every_kind_at_every_shape(kind: str, recompute: bool) -> None:
    torch.compiler.reset()
    shapes = [shape for shape in SHAPES if kind != "frames" or shape[2:] == (4, 6)]  # what conditions_for makes
    model = compare(kind, shapes, activation_checkpointing=recompute)
    for batch, *shape in itertools.product((1, 2), (1, 3), (4,), (6,)):  # as in validation and in samples
        latent, time, _ = inputs(batch, *shape)
        with torch.no_grad():
            assert torch.isfinite(model(latent, time, conditions_for(model, batch, shape[0]))).all()
