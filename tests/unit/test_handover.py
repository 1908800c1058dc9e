"""A step that is taken early is the step that would have come, and neither its absence nor its error is taken early."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sora_lite.data.batch import Allocate, ClipBatch, View
from sora_lite.data.workers import Workers
from sora_lite.errors import UserError
from sora_lite.training.handover import Handover

PASSES, STOP = 2, 12


def batch_of(step: int, number: int) -> ClipBatch:
    video = torch.full((1, 3, 1, 8, 8), step * PASSES + number, dtype=torch.uint8)
    return ClipBatch(
        video=video, is_latent=torch.tensor([False]), keys=[f"{step}-{number}"], captions=[""],
        labels=torch.tensor([-1]), positions=torch.tensor([number]), step=step,
        views=[View(start=0, crop=(0, 0, 8, 8), flip=False)], samples=torch.tensor([0]), bucket=0,
    )  # fmt: skip


class Loader:
    """As `ClipLoader`, of batches that cost no decoding."""

    def __init__(self, make: Callable[[tuple[int, int], Allocate], ClipBatch], workers: int) -> None:
        self.workers = Workers(make, workers, timeout=20, together=PASSES)

    def ready(self) -> bool:
        return self.workers.ready(PASSES)

    def steps(self, start: int, stop: int) -> Iterator[list[ClipBatch]]:
        answers = self.workers.answers((step, number) for step in range(start, stop) for number in range(PASSES))
        for _ in range(start, stop):
            yield [next(answers) for _ in range(PASSES)]


def patiently(handover: Handover) -> bool:
    """Give the workers time, then look ahead: whether a step was taken."""
    until = time.monotonic() + 20
    while handover._next is None and time.monotonic() < until:
        handover.ahead()
        time.sleep(0.01)
    return handover._next is not None


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_and_content_are_unchanged(workers: int) -> None:
    handover = Handover(Loader(lambda item, _: batch_of(*item), workers), 3, STOP, torch.device("cpu"))
    kept: list[tuple[int, Tensor]] = []
    for step in range(3, STOP):
        if workers and step % 3 == 1:
            assert patiently(handover)
        handover.ahead()
        handover.ahead()  # more often changes nothing
        for number, batch in enumerate(handover.take()):
            assert (batch.step, batch.keys) == (step, [f"{step}-{number}"])
            kept.append((step * PASSES + number, batch.video))
    assert all((video == value).all() for value, video in kept)
    handover.ahead()  # there is none after the last
    with pytest.raises(StopIteration):
        handover.take()


def test_it_never_waits_for_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    gate = tmp_path_factory.mktemp("gate") / "open"

    def make(item: tuple[int, int], _: Allocate) -> ClipBatch:
        while item == (1, 1) and not gate.exists():
            time.sleep(0.01)
        return batch_of(*item)

    handover = Handover(Loader(make, 2), 0, STOP, torch.device("cpu"))
    assert handover.take()[0].step == 0
    for _ in range(20):
        handover.ahead()  # would hang, for the gate is closed
    assert handover._next is None
    gate.touch()
    assert patiently(handover) and handover.take()[1].keys == ["1-1"]


def test_an_error_comes_with_its_own_step() -> None:
    def make(item: tuple[int, int], _: Allocate) -> ClipBatch:
        if item[0] == 1:
            raise UserError("the shard is missing")
        return batch_of(*item)

    handover = Handover(Loader(make, 2), 0, STOP, torch.device("cpu"))
    assert handover.take()[0].step == 0
    assert patiently(handover)  # the step that is being trained goes on
    with pytest.raises(UserError, match="the shard is missing"):
        handover.take()
