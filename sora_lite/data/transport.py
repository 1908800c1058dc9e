"""A worker's answers on their way to the process that asked: tensors in shared memory, the rest through a pipe.

The memory has no name, so nothing is left behind when a process is killed. Its descriptor goes once through the same
pipe: torch's own way asks the worker for it anew, which one that hangs would not answer.

A piece of memory belongs to one answer until the receiver holds no tensor of it any more; then the sender uses it
again. Memory that is fresh from the kernel, which has to find and to zero it, costs more than what is written there.
"""

import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True, frozen=True)
class _Placed:
    """A tensor that lies in the shared memory: byte at which it begins, shape there, and order of its axes."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class _Made:
    """A dataclass as it is made again."""

    kind: type
    fields: dict[str, Any]


class _Piece:
    """Memory that both processes may map, mapped here."""

    def __init__(self, number: int) -> None:
        self.number, self.size, self.sent = number, 0, False
        self.descriptor = os.memfd_create("answer")
        self.memory: mmap.mmap | None = None

    def reach(self, size: int) -> mmap.mmap:
        """So many bytes of it. Arrays in what was mapped before stay where they are: it is the same memory."""
        if self.memory is None or size > self.size:
            os.ftruncate(self.descriptor, size)
            self.memory, self.size = mmap.mmap(self.descriptor, size), size
        return self.memory


class Sender:
    """The worker's end."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._pieces: list[_Piece] = []
        self._free: list[_Piece] = []
        self._piece: _Piece | None = None
        self._end = 0
        self._arrays: dict[int, tuple[int, np.ndarray]] = {}  # in the piece, with their offsets, by their addresses

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of any content whose tensor, or that of its first part, is sent without a copy."""
        if self._piece is None:
            if not self._free:
                self._pieces.append(_Piece(len(self._pieces)))
                self._free.append(self._pieces[-1])
            self._piece = self._free.pop()
        count, start = math.prod(shape), self._end
        self._end += -(-count * np.dtype(dtype).itemsize // 64) * 64
        array = np.frombuffer(self._piece.reach(max(1, self._end)), dtype, count, start).reshape(shape)
        self._arrays[_address(array)] = start, array
        return array

    def send(self, failed: str, answer: Any) -> None:
        """Send an answer; all that was allocated since the last one belongs to it.

        Its tensors are those that it is, or holds in a list, or in a field if it is a dataclass.
        """
        rest = self._take_out(answer)
        piece, size = self._piece, self._end
        self._piece, self._end, self._arrays = None, 0, {}
        self._pipe.send((failed, rest, piece.number if piece else None, size))
        if piece and not piece.sent:
            piece.sent = True
            send_handle(self._pipe, piece.descriptor, None)

    def reuse(self, numbers: Iterable[int]) -> None:
        """Take back what the receiver says is free."""
        self._free += [self._pieces[number] for number in numbers]

    def forget(self) -> None:
        """There will be no answer from what was allocated."""
        if self._piece is not None:
            self._free.append(self._piece)
        self._piece, self._end, self._arrays = None, 0, {}

    def _take_out(self, thing: Any) -> Any:
        """The same with `_Placed` for tensors, which lie in the piece then."""
        if isinstance(thing, Tensor):
            return self._place(thing)
        if is_dataclass(thing) and not isinstance(thing, type):
            return _Made(type(thing), {one.name: self._take_out(getattr(thing, one.name)) for one in fields(thing)})
        if isinstance(thing, list) and any(isinstance(one, Tensor) for one in thing):
            return [self._take_out(one) for one in thing]
        return thing

    def _place(self, tensor: Tensor) -> _Placed:
        # In the order in which they lie in memory, a permuted tensor's values are an array without gaps.
        axes = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        array = tensor.permute(axes).contiguous().numpy()
        if array.size and _address(array) not in self._arrays:
            copied = self.allocate(array.shape, array.dtype)
            copied[...] = array
            array = copied
        offset = self._arrays[_address(array)][0] if array.size else 0
        back = tuple(sorted(range(tensor.ndim), key=axes.__getitem__))
        return _Placed(offset, array.shape, array.dtype, back)


class Receiver:
    """The end of the process that asked. Close it; what it received stays."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._free = deque[int]()
        self._descriptors: dict[int, int] = {}

    def receive(self) -> tuple[str, Any]:
        """What `Sender.send` was given next."""
        failed, rest, number, size = self._pipe.recv()
        if number is None:
            return failed, _put_back(rest, None)
        if number not in self._descriptors:
            self._descriptors[number] = recv_handle(self._pipe)
        memory = mmap.mmap(self._descriptors[number], size)
        # Every tensor of the answer holds the mapping, so it is gone when the last of them is.
        weakref.finalize(memory, self._free.append, number).atexit = False
        return failed, _put_back(rest, memory)

    def free(self) -> list[int]:
        """Numbers of the pieces that have become free since the last call, for `Sender.reuse`."""
        return [self._free.popleft() for _ in range(len(self._free))]

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _put_back(thing: Any, memory: mmap.mmap | None) -> Any:
    """The inverse of `Sender._take_out`."""
    if isinstance(thing, _Placed):
        count = math.prod(thing.shape)
        if count == 0 or memory is None:
            return torch.from_numpy(np.empty(thing.shape, thing.dtype)).permute(thing.axes)
        array = np.frombuffer(memory, thing.dtype, count, thing.offset).reshape(thing.shape)
        return torch.from_numpy(array).permute(thing.axes)
    if isinstance(thing, _Made):
        return thing.kind(**{name: _put_back(value, memory) for name, value in thing.fields.items()})
    if isinstance(thing, list):
        return [_put_back(one, memory) if isinstance(one, _Placed) else one for one in thing]
    return thing
