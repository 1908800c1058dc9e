"""Parts of the transformers in their fast forms, against torch's own and plain ones."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile

from sora_lite.models import linear
from sora_lite.models.layers import modulate
from sora_lite.models.linear import Linear
from sora_lite.models.rms_norm import RMSNorm, _RMSNorm


def packed(**options) -> Tensor:
    """Keys among queries and values: B N heads d, a part of B N 3 heads d. One is zero."""
    qkv = torch.randn(2, 5, 3, 3, 8, generator=torch.Generator().manual_seed(0), **options)
    qkv[0, 0, 1, 0] = 0
    return qkv.unbind(2)[1]


def results(norm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradients of the input and of the gain."""
    x = x.detach().requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(grad)
    assert x.grad is not None and norm.weight.grad is not None
    return [y.detach(), x.grad, norm.weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_rms_norm_equals_torchs_own(dtype: torch.dtype, transposed: bool) -> None:
    ours, torchs = RMSNorm(8, eps=1e-6, dtype=dtype), nn.RMSNorm(8, eps=1e-6, dtype=dtype)
    nn.init.normal_(torchs.weight)
    ours.load_state_dict(torchs.state_dict())
    x, grad = packed(dtype=dtype), torch.randn(2, 3, 5, 8).transpose(1, 2).to(dtype)  # of attention
    if transposed:
        x, grad = x.transpose(1, 2), grad.transpose(1, 2)
    before = grad.clone()
    for one, other in zip(results(ours, x, grad), results(torchs, x, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.dtype == dtype
    assert torch.equal(grad, before)


def test_rms_norms_derivatives() -> None:
    x, gain = packed(dtype=torch.float64).requires_grad_(), torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(_RMSNorm.apply, (x, gain, 1e-6))


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_rms_norm_of_mixed_precision_is_torchs() -> None:
    """As under bf16 with gains kept in fp32."""
    ours, torchs = RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)
    x = packed(dtype=torch.bfloat16)
    assert torch.equal(ours(x), torchs(x)) and ours(x).dtype == torchs(x).dtype
    assert ours.to("meta")(x.to("meta")).dtype == torchs(x).dtype


def make_linear(kind: type[nn.Linear] = Linear, *, bias: bool = True) -> nn.Linear:
    """Just large enough."""
    torch.manual_seed(0)
    return kind(256, linear.LARGE // 256, bias=bias)


def derivatives(layer: nn.Linear, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of all parameters that train."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    found = [x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad]
    return [y.detach(), *(one for one in found if one is not None)]


def agree(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * math.sqrt(b.numel() / b.shape[-1]))


X = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(2))
INPUTS = {
    "tokens": lambda x: x, "sample": lambda x: x[0], "one": lambda x: x[0, 0], "strided": lambda x: x.transpose(0, 1),
    "apart": lambda x: x.repeat_interleave(2, -1)[..., ::2], "expanded": lambda x: x[:1, :1].expand(2, 3, -1),
    "none": lambda x: x[:, :0],
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_large_linear_equals_torchs_own(name: str, bias: bool) -> None:
    x = INPUTS[name](X)
    agree(derivatives(make_linear(bias=bias), x), derivatives(make_linear(nn.Linear, bias=bias), x))


def test_large_linear_with_strided_parameters() -> None:
    ours, torchs = make_linear(), make_linear(nn.Linear)
    for layer in (ours, torchs):
        layer.bias = nn.Parameter(torch.arange(2.0 * layer.out_features)[::2])
        layer.weight = nn.Parameter(layer.weight.detach().repeat(1, 2)[:, ::2])
    agree(derivatives(ours, X), derivatives(torchs, X))


def test_frozen_large_linear_passes_the_gradient_on() -> None:
    ours, torchs = make_linear().requires_grad_(False), make_linear(nn.Linear).requires_grad_(False)
    found = derivatives(ours, X)
    assert len(found) == 2
    agree(found, derivatives(torchs, X))


@pytest.mark.parametrize("threads", [1, linear.FEW_THREADS + 1])
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 7), (7, 1), (24, 33), (129, 512)])
def test_transposed(rows: int, columns: int, threads: int) -> None:
    """Of a contiguous matrix and of one that is a transpose itself."""
    x, before = torch.randn(rows, columns), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [linear.transposed(x), linear.transposed(x.t())]
    finally:
        torch.set_num_threads(before)
    for one, expected in zip(found, (x.t(), x), strict=True):
        assert torch.equal(one, expected) and one.is_contiguous()


def products(layer: nn.Linear, x: Tensor) -> int:
    """How often oneDNN multiplies, forward and back."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        derivatives(layer, x)
    return sum(event.count for event in seen.key_averages() if event.key == "mkldnn::_linear_pointwise")


def test_only_large_linears_in_float32_take_onednns_product() -> None:
    """Forward, back to x and back to the weights."""
    assert products(make_linear(), X) == 3 * linear.ONEDNN
    assert not products(Linear(256, linear.LARGE // 256 - 1), X)
    assert not products(make_linear().to(torch.bfloat16), X.to(torch.bfloat16))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        make_linear().to("meta")(X.to("meta"))
    assert "mkldnn::_linear_pointwise" not in {event.key for event in seen.key_averages()}


def test_compiled_large_linear_is_one_graph_for_all_sizes() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    layer, eager = make_linear(), make_linear()
    layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)
    for x in (X, X[:, :2].repeat(2, 1, 1), X.repeat(1, 3, 1)):
        agree(derivatives(layer, x), derivatives(eager, x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_modulation_has_a_shift_and_a_scale_for_each_sample(batch: int) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(8, eps=1e-6, elementwise_affine=False)
    inputs = [torch.randn(batch, 5, 8), torch.randn(batch, 8), torch.randn(batch, 8)]
    x, shift, scale = (one.requires_grad_() for one in inputs)
    y = modulate(norm, x, shift, scale)
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normal * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(y, expected)
    grad = torch.randn(batch, 5, 8)
    found, sought = (torch.autograd.grad(out, (x, shift, scale), grad) for out in (y, expected))
    torch.testing.assert_close(found, sought, rtol=1e-4, atol=1e-5)
