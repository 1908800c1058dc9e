"""What is applied to a plain model from outside, before the engine wraps it. Models know nothing of it."""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sora_lite.config import ParallelConfig
from sora_lite.errors import UserError

VARIANTS = 64
"""How often one kind of block may be compiled. A variant serves many clip sizes, but a single sample, a still, and a
pass without gradients need their own; torch's own limit is 8."""


def apply_parallel(model: nn.Module, parallel: ParallelConfig) -> None:
    """Compilation, then activation checkpointing, as far as `parallel` asks for them.

    In this order a recomputed block runs compiled too, and what is recomputed is one whole block.
    """
    if parallel.compile:
        apply_compile(model)
    if parallel.activation_checkpointing:
        apply_activation_checkpointing(model)


def apply_compile(model: nn.Module) -> None:
    """Run each of `model.blocks` through torch.compile, in place.

    All blocks of one kind share one compilation, which takes some seconds at their first call and again at the first
    batch of another shape; from then on sizes are variables. Only the blocks' `forward` is replaced: modules, parameter
    names and state dict stay as they are.

    Raises:
        TypeError: the model has no `blocks`.
        UserError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"parallel.compile=true: torch.compile builds kernels with {compiler!r}, which is not there; install it, "
            "name another C++ compiler in the environment variable CXX, or set parallel.compile=false"
        )
    from torch._dynamo import config  # seconds, which others need not wait for

    config.recompile_limit = VARIANTS
    for block in blocks_of(model):
        # fullgraph: a part that cannot be compiled is an error here, and not a block that is slow without a word.
        block.forward = _unviewed(torch.compile(block.forward, fullgraph=True))


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Recompute each of `model.blocks` in the backward pass instead of keeping its activations, in place.

    Costs about one more forward pass; keeps the activations of one block at a time instead of all. Results do not
    change. Only the blocks' `forward` is replaced: modules, parameter names and state dict stay as they are.

    Raises:
        TypeError: the model has no `blocks`.
    """
    for block in blocks_of(model):
        block.forward = _recomputed(block.forward)


def blocks_of(model: nn.Module) -> nn.ModuleList | list[nn.Module]:
    """`model.blocks`, the repeated parts that hold most of its weights and activations.

    Raises:
        TypeError: the model has none.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | list):
        raise TypeError(f"{type(model).__name__} has no list `blocks` to treat one by one")
    return blocks


def _unviewed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a block on a first argument that is no view of another tensor.

    A linear layer returns a view, which the first block would be compiled for once more, apart from the blocks that
    get what another block returns.
    """

    @functools.wraps(forward)
    def wrapped(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(x.clone() if x._is_view() else x, *args, **kwargs)

    return wrapped


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` through non-reentrant checkpointing whenever gradients are being recorded."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Non-reentrant: the reentrant form loses gradients of inputs that do not require them and breaks ZeRO's hooks.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
