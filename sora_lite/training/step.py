"""One optimizer step: forward and backward of every micro-batch, update, average."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sora_lite.data.batch import ClipBatch
from sora_lite.training.ema import EMA
from sora_lite.training.engine import Engine
from sora_lite.training.guards import UpdateGuard
from sora_lite.training.objective import Loss, Objective


@dataclass(kw_only=True, slots=True, frozen=True)
class StepResult:
    """What one optimizer step showed. losses has one entry per pass of this rank; all else is alike on all ranks.

    loss: of the global batch. left_out: why the update was not made, "" where it was. stopping: whether any rank was
    asked to stop.
    """

    losses: list[Loss]
    loss: float
    grad_norm: float
    left_out: str
    stopping: bool


def train_step(
    objective: Objective,
    engine: Engine,
    ema: EMA | None,
    guard: UpdateGuard,
    batches: Sequence[ClipBatch],
    step: int,
    lr: float,
    *,
    meanwhile: Callable[[], None],
    stop: bool,
) -> StepResult:
    """One optimizer step: forward and backward of every micro-batch, update unless the guard objects, average.

    meanwhile: called once the device has forward and backward to do. stop: whether this rank was asked to stop; what
    any rank was asked travels with the losses.
    """
    losses = []
    for batch in batches:
        result = objective.loss(engine, batch)
        engine.backward(result.loss)
        losses.append(result)
    meanwhile()
    mean = torch.stack([one.loss.detach().double() for one in losses]).mean()
    told = torch.stack([mean, torch.tensor(float(stop), dtype=torch.float64, device=mean.device)])
    loss, stopping = engine.rank.mean(told).tolist()
    grad_norm = engine.step(lr, guard.limit(loss))
    left_out = guard.judge(step, loss, grad_norm)
    if ema is not None and not left_out:
        ema.update(step)
    return StepResult(losses=losses, loss=loss, grad_norm=grad_norm, left_out=left_out, stopping=stopping > 0)
