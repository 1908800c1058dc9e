"""What is applied to a plain model from outside, before the engine wraps it. Models know nothing of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Recompute each of `model.blocks` in the backward pass instead of keeping its activations, in place.

    Costs about one more forward pass; keeps the activations of one block at a time instead of all. Results do not
    change. Only the blocks' `forward` is replaced: modules, parameter names and state dict stay as they are.

    Raises:
        TypeError: the model has no `blocks`.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | list):
        raise TypeError(f"{type(model).__name__} has no list `blocks` to apply activation checkpointing to")
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` through non-reentrant checkpointing whenever gradients are being recorded."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Non-reentrant: the reentrant form loses gradients of inputs that do not require them and breaks ZeRO's hooks.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
