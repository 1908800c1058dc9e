"""What the optimizer is told: which parameters decay, and the learning rate of each step."""

import math

from torch import nn

from sora_lite.config import OptimConfig, Schedule


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in at most two groups for AdamW: with weight decay, and without.

    Without are norms, biases, embeddings, and whatever else has less than two dimensions: decay pulls a matrix's scale
    towards zero, which for these would pull the function itself.
    """
    embeddings = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag))
        for parameter in child.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # A table of positions or of modulations is a bare parameter; layers inside an embedder are ordinary matrices.
        own = name.rpartition(".")[2].lower()
        table = "embed" in own or "table" in own
        exempt = parameter.ndim < 2 or "norm" in name.lower() or table or id(parameter) in embeddings
        (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (the first is 0) of `total_steps`.

    It rises linearly over `warmup_steps` (step w-1 is the first at the peak), then stays, or falls as half a cosine to
    `final_lr` times the peak, which it would reach at step `total_steps`; beyond, it stays there.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule is Schedule.constant:
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * cosine)
