"""Writing checkpoints in the project's own, portable format: complete or invisible, and free of any process layout.

A rank's file `ENGINE-rank_00000.safetensors` holds, for each fragment of a parameter NAME, the 1-D fp32 tensors
`NAME|fp32`, `NAME|exp_avg`, `NAME|exp_avg_sq` and, with averaged weights, `NAME|ema`; its metadata says at which offset
of which full shape they lie. Rank 0 adds buffers as `NAME|buffer`. Frozen parameters are left out: whoever froze them
has them. As the fragments tile each parameter, any number of ranks at any ZeRO stage loads what any other wrote
(`training.restore`).

    saver = Saver(folder, engines, emas, rank, ...)      # takes the memory that snapshots need
    saver.save(step, extra)                              # copies the state, and returns; a thread writes it
    saver.border()                                       # after each step: whether it is written, on all ranks
    saver.finish()                                       # at the end: waits until all is safe

Threads only touch memory and files. Whatever ranks must agree on, they agree on in the calls above, which are
collectives: that all files are written, whereupon rank 0's thread completes the checkpoint, and whether any failed.
"""

import json
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sora_lite.config import OnFailedSave
from sora_lite.errors import UserError
from sora_lite.parallel.env import Rank
from sora_lite.training import store

if TYPE_CHECKING:
    from sora_lite.training.ema import EMA
    from sora_lite.training.engine import Engine

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""What is stored of every trained parameter. `ema` and, of buffers, `buffer` come beside them."""

_ENGINE = re.compile(r"[a-z][a-z0-9_]*")
_PATIENCE = 5.0  # seconds; ranks that wait for each other meet so often, or the process group gives up
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class Content:
    """What goes into one safetensors file: `head` (the header with its size), then the tensors one after another."""

    head: bytes
    tensors: list[Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> "Content":
        """Lay out named tensors. A header is JSON after its size as 8 bytes, little-endian."""
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return cls(len(text).to_bytes(8, "little") + text, list(tensors.values()))

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def copied(self, memory: Tensor) -> "Content":
        """The same, with the tensors as they are now copied into `memory` (uint8, on the CPU)."""
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.nbytes
            memory[start:end].copy_(tensor.detach().contiguous().flatten().view(torch.uint8), non_blocking=True)
        if memory.is_pinned():
            torch.cuda.synchronize()
        return Content(self.head, [memory[:end]])

    def parts(self) -> Iterator[memoryview]:
        """The bytes of the file."""
        yield memoryview(self.head)
        for tensor in self.tensors:
            yield byte_view(tensor.cpu().contiguous())


def contents(engine: "Engine", ema: "EMA | None", rank: Rank) -> Content | None:
    """This rank's file of one engine; None where it holds nothing that others do not. Refers to the live tensors."""
    if engine.stage == 0 and not rank.is_main:
        return None  # everything is replicated
    tensors: dict[str, Tensor] = {}
    layout = {}
    fragments = engine.fragments()
    averages = [None] * len(fragments) if ema is None else ema.pieces(fragments)
    for fragment, average in zip(fragments, averages, strict=True):
        layout[fragment.name] = {"offset": fragment.offset, "shape": list(fragment.shape)}
        stored = {"fp32": fragment.master, "exp_avg": fragment.exp_avg, "exp_avg_sq": fragment.exp_avg_sq}
        if average is not None:
            stored["ema"] = average
        tensors.update({f"{fragment.name}|{kind}": tensor for kind, tensor in stored.items()})
    if rank.is_main:
        tensors.update({f"{name}|buffer": tensor for name, tensor in engine.buffers().items()})
    return Content.of(tensors, {"fragments": json.dumps(layout)})


class _Work(threading.Thread):
    """Work in a thread that does not keep the process alive, with its result or its error."""

    def __init__(self, work: Callable[[], Any], folder: Path) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._work, self._folder = work, folder
        self.result: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except OSError as error:
            self.error = store.explain(error, self._folder)
        except Exception as error:  # noqa: BLE001 - raised on all ranks by whoever asks for the outcome
            self.error = error

    def outcome(self) -> list[Any]:
        """[result, message of the error]."""
        error = self.error
        return [self.result, error and (str(error) if isinstance(error, UserError) else repr(error))]


@dataclass(slots=True)
class _Flight:
    """A checkpoint on its way to the disk."""

    step: int
    name: str
    temporary: Path
    state: dict[str, Any]
    work: _Work | None
    completing: bool = False


class Saver:
    """Writes the checkpoints of a run, one at a time. Its methods are collectives.

    Args:
        folder: the run's folder of checkpoints, seen by all ranks, in which this attempt alone writes.
        engines: by name; the names (small letters, digits, underscores) become file names.
        emas: the averaged weights of those engines that have any, by the same names.
        rank: this process.
        keep_last: how many of the newest checkpoints are kept.
        keep_every: keep those of steps that are multiples of it, too; 0 for none.
        background: whether to copy the state and write it while training goes on; else `save` ends when all is safe.
        on_failure: whether a checkpoint that cannot be written ends training (as an error of the next call on all
            ranks), or is told and counted in `failed` while training goes on. In `finish` it is an error always.
        token: of this attempt; part of every temporary name.
        fence: called where the run is about to be changed; raises where another attempt has taken it over.
        say: shows a line to people; called on rank 0.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        engines: Mapping[str, "Engine"],
        emas: Mapping[str, "EMA | None"],
        rank: Rank,
        *,
        keep_last: int,
        keep_every: int = 0,
        background: bool = True,
        on_failure: OnFailedSave = OnFailedSave.stop,
        token: str | None = None,
        fence: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = print,
    ) -> None:
        for name in engines:
            if not _ENGINE.fullmatch(name):
                raise ValueError(f"engine name {name!r}: use small letters, digits and underscores")
        self.folder, self.engines, self.emas, self.rank = folder, engines, emas, rank
        self.keep_last, self.keep_every = keep_last, keep_every
        self.background, self.on_failure, self.fence, self.say = background, on_failure, fence, say
        self.token = token or rank.gather(secrets.token_hex(4))[0]
        self.failed = 0
        """Checkpoints that could not be written."""
        self.newest: Path | None = None
        """The last checkpoint that was completed here, or that was gone on from."""
        self.waiting: Callable[[], None] = lambda: None
        """Called every few seconds while this waits for the disk."""
        self._flight: _Flight | None = None
        self._failure: str | None = None  # of the last checkpoint, if that could not be written
        self._on_disk(lambda: store.open_folder(folder) if rank.is_main else None)
        self._memory = {name: self._room(content) for name, content in self._contents().items() if background}

    @staticmethod
    def _room(content: Content) -> Tensor:
        # Written to, so that the first snapshot need not wait for the memory.
        if any(tensor.is_cuda for tensor in content.tensors):
            return torch.empty(content.data_bytes, dtype=torch.uint8, pin_memory=True).zero_()
        # NumPy asks the kernel for huge pages, torch does not: copying into them is a quarter faster.
        return torch.from_numpy(np.empty(content.data_bytes, dtype=np.uint8)).zero_()

    def _contents(self) -> dict[str, Content]:
        files = {name: contents(engine, self.emas.get(name), self.rank) for name, engine in self.engines.items()}
        return {name: content for name, content in files.items() if content is not None}

    def _on_disk(self, work: Callable[[], Any]) -> Any:
        """`Rank.together`, with errors of the file system as people can mend them."""

        def explained() -> Any:
            try:
                return work()
            except OSError as error:
                raise store.explain(error, self.folder) from error

        return self.rank.together(explained)

    # ------------------------------------------------------------------------------------------------ saving

    def save(self, step: int, extra: dict[str, Any]) -> None:
        """Save the state as it is now: after `step` optimizer steps, with JSON that comes back as "extra".

        Waits first if the one before is not safe yet. A step that was saved before gets a directory of its own.
        """
        self._land()
        self._check_fence()
        live = self._contents()
        sizes = self.rank.gather([len(one.head) + one.data_bytes for one in live.values()])
        everything = [size for own in sizes for size in own]
        try:
            names = self._on_disk(lambda: self._prepare(step, sum(everything), len(everything)))
        except UserError as error:
            self._fail(step, str(error))
            return
        name, temporary = self.rank.gather(names)[0]
        files = {f"{engine}-rank_{self.rank.rank:05d}.safetensors": one for engine, one in self._copied(live).items()}
        state = {
            "format_version": store.FORMAT_VERSION,
            "step": step,
            "engines": {name: {"optimizer_step": engine.step_count} for name, engine in self.engines.items()},
            "extra": extra,
        }
        directory = self.folder / temporary
        work = _Work(lambda: {n: store.write_hashed(directory / n, one.parts()) for n, one in files.items()}, directory)
        self._flight = _Flight(step, name, directory, state, work)
        if not self.background:
            self._land()

    def _prepare(self, step: int, size: int, files: int) -> list[str] | None:
        return store.prepare(self.folder, step, self.token, size, files) if self.rank.is_main else None

    def _check_fence(self) -> None:
        self.rank.together(lambda: self.fence() if self.rank.is_main else None)

    def _copied(self, live: dict[str, Content]) -> dict[str, Content]:
        return {name: one.copied(self._memory[name]) if self.background else one for name, one in live.items()}

    def border(self) -> None:
        """To be called after each step: completes a checkpoint once every rank's files are on disk."""
        if self._flight is not None:
            self._advance(0.0)

    def settle(self) -> None:
        """Wait until nothing is under way. Raises as `border` does, where a checkpoint that fails ends training."""
        self._land()

    def finish(self) -> None:
        """Wait until the last checkpoint is safe.

        Raises:
            UserError: on all ranks, if it could not be written.
        """
        self._land()
        if self._failure is not None:
            raise UserError(self._failure)

    def _land(self) -> None:
        while self._flight is not None:
            self.waiting()
            self._advance(_PATIENCE)

    def _advance(self, patience: float) -> None:
        """See whether all ranks have done what is under way, and go on to what comes after it."""
        flight = self._flight
        assert flight is not None
        if flight.work is not None:
            flight.work.join(patience)
        done = flight.work is None or not flight.work.is_alive()
        if float(self.rank.sum(torch.tensor(float(done)))) < self.rank.world_size:
            return
        outcomes = self.rank.gather(flight.work.outcome() if flight.work else [None, None])
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
        if errors:
            self._flight = None
            self._fail(flight.step, "; ".join(errors), flight.temporary)
        elif flight.completing:
            self._flight, self._failure, self.newest = None, None, self.folder / flight.name
        else:
            files = {name: facts for part, _ in outcomes for name, facts in part.items()}
            flight.work = _Work(lambda: self._complete(flight, files), self.folder) if self.rank.is_main else None
            flight.completing = True

    def _complete(self, flight: _Flight, files: store.Files) -> None:
        path = store.commit(flight.temporary, flight.name, flight.state, files, self.fence)
        store.prune(path, self.keep_last, self.keep_every)

    def _fail(self, step: int, why: str, temporary: Path | None = None) -> None:
        self.failed += 1
        self._failure = f"the checkpoint of step {step} could not be written: {why}"
        if temporary is not None and self.rank.is_main:
            # Makes the room again that it took; if not even that is possible, the error at hand says why.
            shutil.rmtree(temporary, ignore_errors=True)
        self._check_fence()
        if self.on_failure is OnFailedSave.stop:
            raise UserError(self._failure)
        if self.rank.is_main:
            self.say(f"warning: {self._failure}; training goes on with the checkpoint before it")
