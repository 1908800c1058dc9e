"""Batches on their way to the device: while it works on one step, the next is being copied there."""

import torch

from sora_lite.data.batch import ClipBatch
from sora_lite.data.loader import ClipLoader
from sora_lite.errors import UserError


class Handover:
    """Steps of a loader in order, each with its large tensors on the device.

    Two steps are on the device at a time: the one that it works on, and the next, which comes out of pinned memory on a
    stream of its own. On a CPU there is nothing to copy, and the next step is merely taken from the workers early.

    Args:
        loader: with `pin` where the device is a GPU.
        start, stop: the steps start, ..., stop - 1 are wanted.
        device: of this rank.
    """

    def __init__(self, loader: ClipLoader, start: int, stop: int, device: torch.device) -> None:
        self._loader, self._steps, self._device = loader, loader.steps(start, stop), device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: list[ClipBatch] | UserError | None = None

    def ahead(self) -> None:
        """Call it when the device has been given its work: begins to copy the next step if the workers have made it.

        Never waits for them. What the loader objects to is raised where that step is taken.
        """
        if self._next is None and self._loader.ready():
            try:
                self._next = self._send(next(self._steps))
            except UserError as error:
                self._next = error

    def take(self) -> list[ClipBatch]:
        """The next step, for use on the current stream. Raises UserError as the loader does."""
        found, self._next = self._next, None
        if isinstance(found, UserError):
            raise found
        batches = self._send(next(self._steps)) if found is None else found
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)  # the copies are done before anything reads them
            for batch in batches:
                for tensor in batch.heavy().values():
                    tensor.record_stream(current)  # nor is their memory given to the next copy while something does
        return batches

    def _send(self, batches: list[ClipBatch]) -> list[ClipBatch]:
        if self._stream is None:
            return batches
        with torch.cuda.stream(self._stream):
            return [batch.to(self._device) for batch in batches]
