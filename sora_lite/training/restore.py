"""Reading checkpoints: into engines of any layout, or as a plain state dict without any process group.

Sizes and hashes come first, and nothing is parsed before they are right. A run goes on from its newest good checkpoint
(`restore`): all ranks agree which one that is, and it is said what was wrong with those that it is not.
"""

import json
import math
import os
import re
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sora_lite.errors import UserError
from sora_lite.parallel.env import Rank
from sora_lite.training import store
from sora_lite.training.checkpoint import KINDS, Saver, byte_view

if TYPE_CHECKING:
    from sora_lite.training.ema import EMA
    from sora_lite.training.engine import Engine


# ---------------------------------------------------------------------------------------------------- which one


@dataclass(kw_only=True, frozen=True, slots=True)
class Found:
    """The newest good checkpoint of a run, its files, and a line for each thing that was wrong before it was found."""

    path: Path
    files: store.Files
    bad: list[str]


def newest_good(folder: Path, rank: Rank, *, fall_back: bool) -> Found | None:
    """The checkpoint that a run goes on from, verified; None if it has none. A collective; changes nothing.

    Args:
        folder: the run's folder of checkpoints.
        rank: this process.
        fall_back: whether another one may be taken where that of the pointer is damaged.

    Raises:
        UserError: on all ranks alike, if something is damaged and nothing good is left, or it may not be taken.
    """
    # Rank 0 looks, since a network file system may not show all nodes the same.
    paths, wrong = rank.together(lambda: store.candidates(folder) if rank.is_main else ([], None))
    names, wrong = rank.gather([[path.name for path in paths], wrong])[0]
    bad = [wrong] if wrong else []
    for name in names:
        if damage := _damage(folder / name, rank):
            bad += damage
            continue
        if bad and not fall_back:
            raise UserError(f"{'; '.join(bad)}; {name} is good: run.on_damage=fall_back goes on from it")
        path = folder / name
        return Found(path=path, files=rank.together(partial(store.read_manifest, path)), bad=bad)
    if bad:
        raise UserError(
            f"{'; '.join(bad)}; no checkpoint of this run is good: give run.name another name to start anew"
        )
    return None


def _damage(path: Path, rank: Rank) -> list[str]:
    """What is wrong with a checkpoint, found by all ranks together, each on its share of the files."""
    told = rank.gather(rank.together(lambda: _damage_of_share(path, rank.rank, rank.world_size)))
    damage = [one for one in told if one]
    if damage and rank.world_size > 1:
        # Each share once more, by the next rank: a node that reads badly must not cost the run a good checkpoint.
        mine = (rank.rank + 1) % rank.world_size
        again = rank.gather(rank.together(lambda: _damage_of_share(path, mine, rank.world_size)))
        hosts = rank.gather(socket.gethostname())
        for reader, reason in enumerate(told):
            if reason and not again[reader - 1]:
                raise UserError(
                    f"rank {reader} on {hosts[reader]} finds: {reason}; but rank {(reader - 1) % rank.world_size} on "
                    f"{hosts[reader - 1]} reads that file without error: check the memory and network of the first"
                )
    return list(dict.fromkeys(damage))


def _damage_of_share(path: Path, index: int, count: int) -> str | None:
    try:
        store.verify(path, index, count)
    except store.Damaged as error:
        return str(error)
    return None


def restore(saver: Saver, *, check: Callable[[Path, dict[str, Any]], None], fall_back: bool) -> dict[str, Any] | None:
    """Go on from the newest good checkpoint of a run, and leave its folder as if nothing came after that one.

    What is later is set aside under another name, so that a folder holds one history. Where the pointer named what is
    damaged, it then names what the run goes on from: the only case in which it goes back. A collective.

    Args:
        saver: which folder, and what is filled; it has nothing under way.
        check: see `load`.
        fall_back: see `newest_good`.

    Returns:
        The checkpoint's state as from `load`; None if there is none.
    """
    found = newest_good(saver.folder, saver.rank, fall_back=fall_back)
    if found is None:
        return None
    state = load(found.path, saver.engines, saver.emas, check, files=found.files)
    saver.rank.together(lambda: _mend(found, saver) if saver.rank.is_main else None)
    saver.newest = found.path
    return state


def _mend(found: Found, saver: Saver) -> None:
    for line in found.bad:
        saver.say(f"warning: {line}")
    if found.bad:
        saver.say(f"warning: goes on from {found.path}, the newest good checkpoint")
        store.move_pointer(found.path, saver.token, saver.fence)
    every = [path for _, _, path in store.complete(saver.folder)]
    for path in every[every.index(found.path) + 1 :]:
        saver.fence()
        saver.say(f"warning: {path} is later than that, and set aside as {store.set_aside(path).name}")


# ---------------------------------------------------------------------------------------------------- reading


class _Reader:
    """All rank files of one engine as one store of full tensors, from which any range can be read."""

    def __init__(self, path: Path, engine: str, files: Mapping[str, dict]) -> None:
        self.path, self.engine = path, engine
        own = re.compile(re.escape(engine) + r"-rank_\d{5,}\.safetensors")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: set[str] = set()
        self._pieces: dict[tuple[str, str], list[tuple[int, int, BinaryIO, int]]] = {}
        self._buffers: dict[str, Any] = {}
        for name in sorted(n for n in files if own.fullmatch(n)):
            try:
                # Stays open as long as it is referred to here. It checks the header, on which `_index` relies.
                file = safe_open(path / name, framework="pt")
                self._index(path / name, file, json.loads(file.metadata()["fragments"]))
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path / name} is no file of a checkpoint: {error!r}") from error
        if not self.shapes:
            engines = sorted({n.rpartition("-rank_")[0] for n in files if n.endswith(".safetensors")})
            raise UserError(
                f"{path} holds no {engine!r}, only {', '.join(engines)}: it is the checkpoint of another verb"
            )

    def _index(self, path: Path, file: Any, layout: dict[str, dict]) -> None:
        raw = path.open("rb", buffering=0)
        size = int.from_bytes(raw.read(8), "little")
        for key, facts in json.loads(raw.read(size)).items():
            name, _, kind = key.rpartition("|")
            if key == "__metadata__":
                continue
            if kind == "buffer":
                self._buffers[name] = file
                continue
            if facts["dtype"] != "F32" or len(facts["shape"]) != 1:
                raise ValueError(f"{key} is {facts['dtype']} {facts['shape']}")
            self.kinds.add(kind)
            piece = (int(layout[name]["offset"]), facts["shape"][0], raw, 8 + size + facts["data_offsets"][0])
            self._pieces.setdefault((name, kind), []).append(piece)
            self.shapes[name] = tuple(layout[name]["shape"])

    def read(self, name: str, kind: str, offset: int, out: Tensor) -> Tensor:
        """Fill `out`, fp32 of shape (n,), with elements `offset` to `offset + n` of the flattened parameter `name`."""
        target = out if out.device.type == "cpu" else torch.empty(out.shape)
        count, filled = len(out), 0
        data = byte_view(target)
        for start, numel, file, at in self._pieces.get((name, kind), ()):
            first, last = max(offset, start), min(offset + count, start + numel)
            if first < last:
                _read_into(file, data[4 * (first - offset) : 4 * (last - offset)], at + 4 * (first - start))
                filled += last - first
        if filled != count:
            raise UserError(
                f"{self.path} holds {filled} of {count} elements of {self.engine}'s {name}: use another one"
            )
        return out if target is out else out.copy_(target)

    def full(self, name: str, kind: str) -> Tensor:
        """The whole parameter, in its own shape."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, torch.empty(math.prod(shape))).view(shape)

    def buffers(self) -> dict[str, Tensor]:
        """The buffers, whole."""
        return {name: file.get_tensor(f"{name}|buffer") for name, file in self._buffers.items()}


def _read_into(file: BinaryIO, data: memoryview, offset: int) -> None:
    while data:
        count = os.preadv(file.fileno(), [data], offset)
        if count == 0:
            raise UserError(f"{file.name} ended while it was read: something writes to it")
        data, offset = data[count:], offset + count


def _read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / store.STATE).read_bytes())


def load(
    path: Path,
    engines: Mapping[str, "Engine"],
    emas: Mapping[str, "EMA | None"],
    check: Callable[[Path, dict[str, Any]], None] | None = None,
    *,
    files: store.Files | None = None,
) -> dict[str, Any]:
    """Put a checkpoint into engines and averages of any rank count and ZeRO stage. A collective.

    Everything is verified before the first engine is touched. At the same layout the continuation is bit for bit that
    of the run that wrote it.

    Args:
        path: directory of the checkpoint, as from `store.latest`.
        engines: by the names that they were saved under.
        emas: averages to fill, by the same names; None or absent where none is wanted.
        check: called with the checkpoint and its state before anything is loaded; it raises where this run must not
            go on from it.
        files: what `newest_good` found, so that it is not verified again.

    Returns:
        The checkpoint's state: `step`, `extra` as given to `Saver.save`, and `engines`.

    Raises:
        UserError: on all ranks, if the checkpoint is damaged, or of another model.
    """
    rank = next(iter(engines.values())).rank
    known = files or rank.together(lambda: store.verify(path, rank.rank, rank.world_size))
    state = rank.together(lambda: _read_state(path))
    if check is not None:
        rank.together(lambda: check(path, state))
    readers = rank.together(lambda: {name: _Reader(path, name, known) for name in engines})
    rank.together(lambda: _check_fits(engines, readers, emas))
    for name, engine in engines.items():
        reader, ema = readers[name], emas.get(name)
        fragments = engine.fragments()
        targets = [
            (fragment.name, kind, fragment.offset, target)
            for fragment in fragments
            for kind, target in zip(KINDS, (fragment.master, fragment.exp_avg, fragment.exp_avg_sq), strict=True)
        ]
        if ema is not None:
            pieces = zip(fragments, ema.pieces(fragments), strict=True)
            targets += [(fragment.name, "ema", fragment.offset, average) for fragment, average in pieces]
        with ThreadPoolExecutor(store.THREADS) as pool:  # disks and copies are faster by several at a time
            list(pool.map(lambda one, reader=reader: reader.read(*one), targets))
        engine.step_count = state["engines"][name]["optimizer_step"]
        engine.load_buffers(reader.buffers())
        engine.refresh_weights()
    return state


def _check_fits(
    engines: Mapping[str, "Engine"],
    readers: Mapping[str, _Reader],
    emas: Mapping[str, "EMA | None"],
) -> None:
    """Same parameters of the same shapes, same buffers, and an average if one is wanted."""
    cure = "run with the configuration that wrote it, or under another run.name"
    for engine, reader in readers.items():
        where = f"{reader.path} does not fit the {engine!r} of this configuration"
        for what, held, wanted in (
            ("parameter", reader.shapes, engines[engine].shapes),
            ("buffer", _shapes(reader.buffers()), _shapes(engines[engine].buffers())),
        ):
            for name in [*wanted, *held]:
                there, here = (shapes.get(name, "missing") for shapes in (held, wanted))
                if there != here:
                    raise UserError(f"{where}: the {what} {name} is {there} in it and {here} here; {cure}")
        if emas.get(engine) is not None and "ema" not in reader.kinds:
            raise UserError(f"{reader.path} holds no averaged weights: set optim.ema_decay=0, or train anew with them")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_full(path: Path, source: str = "ema", engine: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint's run trained as full tensors on the CPU, and its state as from `load`. Needs no process group.

    It is the state dict of the model, which lacks parameters that were frozen.

    Args:
        path: Directory of the checkpoint; it is verified first.
        source: "ema" for the averaged weights, "raw" for the trained ones.
        engine: Which engine's model; may be left out where there is only one.

    Raises:
        UserError: the checkpoint is damaged, or has no such weights.
    """
    if source not in ("ema", "raw"):
        raise UserError(f"weights: {source!r} is unknown; take ema or raw")
    files = store.verify(path)
    state = _read_state(path)
    if engine is None:
        if len(state["engines"]) != 1:
            raise ValueError(f"{path} holds several engines ({', '.join(state['engines'])}): name one")
        engine = next(iter(state["engines"]))
    reader = _Reader(path, engine, files)
    kind = "ema" if source == "ema" else "fp32"
    if kind not in reader.kinds:
        raise UserError(f"{path} holds no averaged weights: use weights=raw")
    return {**{name: reader.full(name, kind) for name in reader.shapes}, **reader.buffers()}, state
