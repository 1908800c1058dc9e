"""Blocks through torch.compile: the same predictions and gradients as without, at many shapes; all kinds of blocks."""

import itertools

import pytest
import torch
from test_dit import MODELS, conditions_for, inputs, make

from sora_lite.config import ParallelConfig
from sora_lite.errors import UserError
from sora_lite.models import linear
from sora_lite.models.dit import VideoDiT
from sora_lite.parallel.apply import apply_activation_checkpointing, apply_compile, apply_parallel

SIZES = [(2, 1, 4, 6), (1, 3, 4, 6), (3, 3, 4, 6), (2, 5, 8, 4), (2, 2, 2, 8), (3, 9, 4, 4)]
"""Batch, latent frames and cells: stills, single samples, and clips that differ in all sizes."""


@pytest.fixture(autouse=True)
def some_large_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of products in each block."""
    monkeypatch.setattr(linear, "LARGE", 2**11)


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


def pair(kind: str) -> tuple[VideoDiT, VideoDiT]:
    """The same model eager and compiled."""
    eager, compiled = make(**MODELS[kind]), make(**MODELS[kind])
    names = list(compiled.state_dict())
    apply_parallel(compiled, ParallelConfig(compile=True))
    assert list(compiled.state_dict()) == names
    return eager, compiled


def without_gradients(compiled: VideoDiT, eager: VideoDiT) -> None:
    """The same predictions as in validation and in samples."""
    for batch, frames in itertools.product((1, 2), (1, 3)):
        latent, time, _ = inputs(batch, frames, 4, 6)
        given = conditions_for(compiled, batch, frames)
        with torch.no_grad():
            torch.testing.assert_close(compiled(latent, time, given), eager(latent, time, given), rtol=1e-4, atol=1e-5)


def graphs() -> int:
    """Compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_blocks_change_nothing_but_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    before = graphs()
    eager, compiled = pair("paper")
    same(gradients(compiled, 2, 3, 4, 6), gradients(eager, 2, 3, 4, 6))
    assert graphs() == before + 1  # for all blocks together
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"parallel\.compile=true.*'no-such-compiler', which is not there"):
        apply_compile(make())
    with pytest.raises(TypeError, match="no list `blocks`"):
        monkeypatch.delenv("CXX")
        apply_compile(torch.nn.Linear(1, 1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_few_graphs_serve_every_size() -> None:
    """One for the first size, one for all others, one for single samples; and the like without gradients."""
    torch.compiler.reset()
    eager, compiled = pair("ours")
    sizes = {
        "first": ([(2, 3, 4, 6)], 1),
        "others": ([(3, 5, 8, 4), (2, 2, 2, 8), (3, 9, 4, 4), (2, 1, 4, 6)], 1),
        "single": ([(1, 3, 4, 6), (1, 5, 8, 4), (1, 1, 4, 6)], 1),
    }
    for shapes, expected in sizes.values():
        before = graphs()
        for shape in shapes:
            same(gradients(compiled, *shape), gradients(eager, *shape))
        assert graphs() == before + expected
    before = graphs()
    without_gradients(compiled, eager)
    assert graphs() == before + 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", MODELS)
# Sizes are variables at once, not from the second one on: half of the time.
@torch._dynamo.config.patch(assume_static_by_default=False)
def test_every_kind_at_every_size(kind: str) -> None:
    """Then recomputed, for which there are no other graphs, and without gradients, as in validation and in samples."""
    torch.compiler.reset()
    eager, compiled = pair(kind)
    sizes = [size for size in SIZES if kind != "frames" or size[2:] == (4, 6)]  # what conditions_for makes
    wanted = [gradients(eager, *size) for size in sizes]
    for size, want in zip(sizes, wanted, strict=True):
        same(gradients(compiled, *size), want)
    before = graphs()
    apply_activation_checkpointing(compiled)
    for size, want in zip(sizes, wanted, strict=True):
        same(gradients(compiled, *size), want)
    assert graphs() == before
    without_gradients(compiled, eager)
