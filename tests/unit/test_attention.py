"""Attention that keeps its weights, against torch's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from sora_lite.models import attention as kept
from sora_lite.models.layers import InnerAttention

pytestmark = pytest.mark.skipif(not kept.ONEDNN, reason="torch has no oneDNN")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def tokens(n: int, m: int, *, batch: int = 2, heads: int = 3, width: int = 16) -> list[Tensor]:
    """Queries of n tokens, keys and values of m, in memory B tokens heads d as projections make them."""
    generator = torch.Generator().manual_seed(0)
    sizes = (n, m, m)
    made = [torch.randn(batch, size, heads, width, generator=generator).transpose(1, 2) for size in sizes]
    return [one.requires_grad_() for one in made]


def results(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of queries, keys and values."""
    y = attend(*inputs)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


def agree_with_torchs(inputs: list[Tensor]) -> None:
    """To the rounding of float32."""
    exact = [one.detach().double().requires_grad_() for one in inputs]
    for ours, torchs in zip(
        results(kept.attention, inputs), results(F.scaled_dot_product_attention, exact), strict=True
    ):
        torch.testing.assert_close(ours.double(), torchs, rtol=1e-5, atol=1e-5 * torchs.abs().max().item())
        assert ours.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("n", "m"), [(24, 24), (5, 33), (33, 5), (1, 1)])
@pytest.mark.parametrize("strided", [False, True])
def test_equals_torchs_own(n: int, m: int, strided: bool) -> None:
    inputs = tokens(n, m)
    if strided:  # a part of something larger, in memory heads before tokens
        inputs = [torch.cat([one, one], dim=-1).contiguous()[..., :16] for one in inputs]
    agree_with_torchs(inputs)


def test_scores_beyond_what_exp_can_hold() -> None:
    agree_with_torchs([one.detach().mul(10).requires_grad_() for one in tokens(24, 24)])


def test_bits_do_not_depend_on_threads() -> None:
    inputs, before, found = tokens(kept.LEAST, kept.LEAST, batch=1), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(kept.attention, inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def keeps(inputs: list[Tensor], mask: Tensor | None = None) -> bool:
    """Whether `InnerAttention` trains by attention that keeps its weights."""
    return type(InnerAttention()(*inputs, mask).grad_fn).__name__ == "_AttentionBackward"


def test_only_training_on_many_tokens_keeps_weights() -> None:
    few, many, most = kept.LEAST - 1, kept.LEAST, kept.MOST
    assert keeps(tokens(many, many, heads=1)) and keeps(tokens(many, most, heads=1))
    assert not keeps(tokens(few, few, heads=1)) and not keeps(tokens(many, few, heads=1))
    assert not keeps(tokens(most + 1, many, heads=1))
    assert not keeps(tokens(many, many, heads=1), torch.ones(2, 1, 1, many, dtype=torch.bool))
    assert not keeps([one.detach() for one in tokens(many, many, heads=1)])
    assert not keeps([one.detach().bfloat16().requires_grad_() for one in tokens(many, many, heads=1)])
    assert not keeps([one.detach().to("meta").requires_grad_() for one in tokens(many, many, heads=1)])
    with torch.no_grad():
        assert not keeps(tokens(many, many, heads=1))


def test_recomputed_it_is_the_same() -> None:
    inner, inputs = InnerAttention(), tokens(kept.LEAST, kept.LEAST, batch=1)
    again = results(lambda *qkv: checkpoint(inner, *qkv, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(results(inner, inputs), again, strict=True))


def test_compiled_it_is_one_graph_for_all_sizes() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    inner = InnerAttention()
    compiled = torch.compile(inner, fullgraph=True, dynamic=True)
    for batch, n in ((2, kept.LEAST), (3, kept.LEAST + 8), (2, kept.MOST)):
        inputs = tokens(n, n, batch=batch)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            found = results(compiled, inputs)
        assert "sora_lite::attention_backward" in {event.key for event in seen.key_averages()}
        for ours, eager in zip(found, results(inner, inputs), strict=True):
            torch.testing.assert_close(ours, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
