"""Checkpoints in the project's own, portable format: complete or invisible, and free of any process layout.

    checkpoints/
      latest                            the name of one directory beside it, and only ever of a complete one
      step_00000500/
        manifest.json                   size and SHA-256 of every other file
        state.json                      step, optimizer steps, and the caller's own JSON
        ENGINE-rank_00000.safetensors   the fragments that rank 0 held (one such file per rank and engine)

A rank's file holds, for each fragment of a parameter NAME, the 1-D fp32 tensors `NAME|fp32`, `NAME|exp_avg`,
`NAME|exp_avg_sq` and, with averaged weights, `NAME|ema`; its metadata says at which offset of which full shape they
lie. Rank 0 adds buffers and frozen parameters as `NAME|constant`. As the fragments tile each parameter, any number of
ranks at any ZeRO stage loads what any other wrote, and `read_full` needs no process group at all.

Writing: a temporary directory whose name carries a fresh token, every file synced to disk, the manifest, one rename,
and only then the pointer. Reading: sizes and hashes first, and nothing is parsed before they are right.
"""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sora_lite.errors import UserError
from sora_lite.parallel.env import Rank

if TYPE_CHECKING:
    from sora_lite.training.ema import EMA
    from sora_lite.training.engine import Engine

FORMAT_VERSION = 1
POINTER = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""What is stored of every trained parameter. `ema` and, for what is not trained, `constant` come beside them."""

_DIRECTORY = re.compile(r"step_(\d{8,})(?:-(\d+))?")
_ENGINE = re.compile(r"[a-z][a-z0-9_]*")
_CHUNK = 16 * 1024 * 1024
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


# ---------------------------------------------------------------------------------------------------- writing


def save(
    folder: Path,
    step: int,
    engines: Mapping[str, "Engine"],
    emas: Mapping[str, "EMA | None"],
    extra: dict[str, Any],
    rank: Rank,
    keep_last: int,
) -> Path:
    """Write a checkpoint and make it the latest. A collective; it raises on all ranks if it fails on any.

    Args:
        folder: The run's folder of checkpoints, seen by all ranks.
        step: Optimizer steps done by the run.
        engines: By name; the names (small letters, digits, underscores) become file names.
        emas: The averaged weights of those engines that have any, by the same names.
        extra: JSON to come back from `load` under "extra": state of the data, configuration, ids.
        rank: This process.
        keep_last: How many of the newest checkpoints to keep, this one included.

    Returns:
        The directory of the checkpoint. If the step was saved before, it is a new directory with a number after it:
        a complete checkpoint is never written over.
    """
    if keep_last < 1:
        raise UserError(f"run.keep_last={keep_last} would keep no checkpoint: use 1 or more")
    for name in engines:
        if not _ENGINE.fullmatch(name):
            raise ValueError(f"engine name {name!r}: use small letters, digits and underscores")
    names = rank.gather(rank.together(lambda: _prepare(folder, step) if rank.is_main else None))[0]
    final, temporary = (folder / name for name in names)
    constants = {name: engine.constants() for name, engine in engines.items()}
    files = rank.together(lambda: _write_rank(temporary, engines, emas, constants, rank))
    listed = {name: facts for part in rank.gather(files) for name, facts in part.items()}
    rank.together(lambda: _commit(temporary, final, step, engines, extra, listed, keep_last) if rank.is_main else None)
    return final


def _prepare(folder: Path, step: int) -> list[str]:
    """Make the temporary directory; the names that it will have in the end and that it has now."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step_*.tmp-*"):
        shutil.rmtree(leftover)
    revision = max([r for s, r, _ in _complete(folder) if s == step], default=0) + 1
    name = f"step_{step:08d}" + (f"-{revision}" if revision > 1 else "")
    temporary = f"{name}.tmp-{secrets.token_hex(4)}"
    (folder / temporary).mkdir()
    return [name, temporary]


def _write_rank(
    directory: Path,
    engines: Mapping[str, "Engine"],
    emas: Mapping[str, "EMA | None"],
    constants: Mapping[str, dict[str, Tensor]],
    rank: Rank,
) -> dict[str, dict]:
    """Write this rank's file of each engine; size and hash of each file by name."""
    written = {}
    for name, engine in engines.items():
        if engine.stage == 0 and not rank.is_main:
            continue  # everything is replicated
        tensors: dict[str, Tensor] = {}
        layout = {}
        fragments = engine.fragments()
        ema = emas.get(name)
        averages = [None] * len(fragments) if ema is None else ema.pieces(fragments)
        for fragment, average in zip(fragments, averages, strict=True):
            layout[fragment.name] = {"offset": fragment.offset, "shape": list(fragment.shape)}
            stored = {"fp32": fragment.master, "exp_avg": fragment.exp_avg, "exp_avg_sq": fragment.exp_avg_sq}
            if average is not None:
                stored["ema"] = average
            tensors.update({f"{fragment.name}|{kind}": tensor for kind, tensor in stored.items()})
        if rank.is_main:
            tensors.update({f"{key}|constant": tensor for key, tensor in constants[name].items()})
        file = f"{name}-rank_{rank.rank:05d}.safetensors"
        written[file] = _write_safetensors(directory / file, tensors, {"fragments": json.dumps(layout)})
    return written


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Write a safetensors file and sync it to disk, hashing on the way: the data is passed over once.

    Returns size in bytes and SHA-256. The layout is an 8-byte little-endian header size, the JSON header, the data.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            file.write(part)
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(head) + end, "sha256": digest.hexdigest()}


def _commit(
    temporary: Path,
    final: Path,
    step: int,
    engines: Mapping[str, "Engine"],
    extra: dict[str, Any],
    files: dict[str, dict],
    keep_last: int,
) -> None:
    """What rank 0 does when every rank's files are on disk: state, manifest, rename, pointer, and old ones away."""
    state = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "engines": {name: {"optimizer_step": engine.step_count} for name, engine in engines.items()},
        "extra": extra,
    }
    files[STATE] = _write_text(temporary / STATE, json.dumps(state, indent=1, allow_nan=False))
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": dict(sorted(files.items()))}
    _write_text(temporary / MANIFEST, json.dumps({**manifest, "sha256": _manifest_hash(manifest)}, indent=1))
    _sync_directory(temporary)
    temporary.rename(final)
    _sync_directory(final.parent)
    pointer = final.parent / f"{POINTER}.tmp"
    pointer.unlink(missing_ok=True)  # of an attempt that was killed just here
    _write_text(pointer, final.name + "\n")
    pointer.replace(final.parent / POINTER)
    _sync_directory(final.parent)
    _prune(final, keep_last)


def _write_text(path: Path, text: str) -> dict[str, Any]:
    data = text.encode()
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest_hash(manifest: dict[str, Any]) -> str:
    """Hash of the manifest's content, kept inside it: the manifest itself is checked too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_directory(path: Path) -> None:
    """Make names in `path` (new files, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, revision, directory) of every complete checkpoint, oldest first: temporary names do not match."""
    found = []
    for path in folder.iterdir():
        match = _DIRECTORY.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), int(match[2] or 1), path))
    return sorted(found)


def _prune(newest: Path, keep_last: int) -> None:
    """Remove what is older than the `keep_last` newest steps up to `newest`, and superseded revisions of a step."""
    # A complete checkpoint of a later step, left by an attempt that died before it set the pointer, stays until the
    # run comes past it.
    complete = _complete(newest.parent)
    at = next((step, revision) for step, revision, path in complete if path == newest)
    past = [(step, path) for step, revision, path in complete if (step, revision) <= at]
    kept = list(dict(past).values())[-keep_last:]  # of several revisions of a step the last counts
    for _, path in past:
        if path not in kept:
            # Renamed first: half a directory must not carry the name of a complete one.
            path = path.rename(path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}"))
            shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------------- reading


def latest(folder: Path) -> Path | None:
    """The checkpoint that the pointer names, or None where nothing was saved yet.

    Raises:
        UserError: the pointer is damaged or names what is not there.
    """
    pointer = folder / POINTER
    if not pointer.exists():
        return None
    name = pointer.read_text(errors="replace").strip()
    if not _DIRECTORY.fullmatch(name):  # also keeps the pointer from leading out of the folder
        raise UserError(f"{pointer} is damaged: write into it the name of one of the step_... directories beside it")
    if not (folder / name).is_dir():
        raise UserError(
            f"{pointer} names {name}, which does not exist: write into it the name of another step_... directory, "
            "or delete it to begin anew"
        )
    return folder / name


def verify(path: Path, rank: Rank | None = None) -> dict[str, dict]:
    """Check that every file of a checkpoint has the size and hash of the manifest; returns those by file name.

    With `rank` it is a collective: the ranks share the files among them and raise together.

    Raises:
        UserError: names the first file that is missing, short or changed, and the cure.
    """
    if rank is None:
        return _verify_share(path, 0, 1)
    return rank.together(lambda: _verify_share(path, rank.rank, rank.world_size))


def _verify_share(path: Path, index: int, count: int) -> dict[str, dict]:
    cure = f"this checkpoint cannot be used: write another step_... directory's name into {path.parent / POINTER}"
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        stated = manifest.pop("sha256")
        files = manifest["files"]
        right = stated == _manifest_hash(manifest) and STATE in files and all(Path(n).name == n for n in files)
        version = manifest["format_version"]
    except FileNotFoundError as error:
        raise UserError(f"{path} is not a complete checkpoint: it has no {MANIFEST}; {cure}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST} is damaged; {cure}") from error
    if not right:
        raise UserError(f"{path / MANIFEST} is damaged: its content does not match its hash; {cure}")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has checkpoint format {version}, this version reads {FORMAT_VERSION}: update sora_lite"
        )
    for name in sorted(files)[index::count]:
        _verify_file(path / name, files[name], cure)
    return files


def _verify_file(path: Path, facts: dict[str, Any], cure: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; {cure}")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise UserError(f"{path} has {size} bytes instead of {facts['bytes']}; {cure}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
            raise UserError(f"{path} is damaged: its SHA-256 is not the manifest's; {cure}")


class _Reader:
    """All rank files of one engine as one store of full tensors, from which any range can be read."""

    def __init__(self, path: Path, engine: str, files: Mapping[str, dict]) -> None:
        self.path, self.engine = path, engine
        own = re.compile(re.escape(engine) + r"-rank_\d{5,}\.safetensors")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: set[str] = set()
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        self._constants: dict[str, Any] = {}
        for name in sorted(n for n in files if own.fullmatch(n)):
            try:
                # Memory-mapped; stays open as long as it is referred to here.
                file = safe_open(path / name, framework="pt")
                keys, metadata = list(file.keys()), file.metadata()
            except SafetensorError as error:
                raise UserError(f"{path / name} is no safetensors file: {error}") from error
            self._index(file, keys, json.loads(metadata["fragments"]))
        if not self.shapes:
            engines = sorted({n.rpartition("-rank_")[0] for n in files if n.endswith(".safetensors")})
            raise UserError(
                f"{path} holds no {engine!r}, only {', '.join(engines)}: it is the checkpoint of another verb"
            )

    def _index(self, file: Any, keys: list[str], layout: dict[str, dict]) -> None:
        for key in keys:
            name, _, kind = key.rpartition("|")
            if kind == "constant":
                self._constants[name] = file
                continue
            self.kinds.add(kind)
            if kind == "fp32":
                numel = file.get_slice(key).get_shape()[0]
                self._pieces.setdefault(name, []).append((layout[name]["offset"], numel, file))
                self.shapes[name] = tuple(layout[name]["shape"])

    def read(self, name: str, kind: str, offset: int, count: int) -> Tensor:
        """Elements `offset` to `offset + count` of the flattened parameter `name`, as fp32 of shape (count,)."""
        out = torch.empty(count)
        filled = 0
        for start, numel, file in self._pieces[name]:
            first, last = max(offset, start), min(offset + count, start + numel)
            if first < last:
                out[first - offset : last - offset] = file.get_slice(f"{name}|{kind}")[first - start : last - start]
                filled += last - first
        if filled != count:
            raise UserError(
                f"{self.path} holds {filled} of {count} elements of {self.engine}'s {name}: use another one"
            )
        return out

    def full(self, name: str, kind: str) -> Tensor:
        """The whole parameter, in its own shape."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def constants(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters."""
        return {name: file.get_tensor(f"{name}|constant") for name, file in self._constants.items()}


def _read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_bytes())


def load(
    path: Path,
    engines: Mapping[str, "Engine"],
    emas: Mapping[str, "EMA | None"],
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Put a checkpoint into engines and averages of any rank count and ZeRO stage. A collective.

    Everything is verified before the first engine is touched. At the same layout the continuation is bit for bit that
    of the run that wrote it.

    Args:
        path: Directory of the checkpoint, as from `latest`.
        engines: By the names that they were saved under.
        emas: Averages to fill, by the same names; None or absent where none is wanted.
        check: Called with the state before anything is loaded; it raises where this run must not go on from it.

    Returns:
        The checkpoint's state: `step`, `extra` as given to `save`, and `engines`.

    Raises:
        UserError: on all ranks, if the checkpoint is damaged, or of another model.
    """
    rank = next(iter(engines.values())).rank
    files = verify(path, rank)
    state = rank.together(lambda: _read_state(path))
    if check is not None:
        rank.together(lambda: check(state))
    readers = rank.together(lambda: {name: _Reader(path, name, files) for name in engines})
    constants = {name: engine.constants() for name, engine in engines.items()}
    rank.together(lambda: _check_fits(engines, constants, readers, emas))
    for name, engine in engines.items():
        reader, ema = readers[name], emas.get(name)
        fragments = engine.fragments()
        for fragment in fragments:
            where = (fragment.offset, fragment.master.numel())
            for kind, target in zip(KINDS, (fragment.master, fragment.exp_avg, fragment.exp_avg_sq), strict=True):
                target.copy_(reader.read(fragment.name, kind, *where))
        if ema is not None:
            for fragment, average in zip(fragments, ema.pieces(fragments), strict=True):
                average.copy_(reader.read(fragment.name, "ema", fragment.offset, average.numel()))
        engine.step_count = state["engines"][name]["optimizer_step"]
        engine.load_constants(reader.constants())
        engine.refresh_weights()
    return state


def _check_fits(
    engines: Mapping[str, "Engine"],
    constants: Mapping[str, dict[str, Tensor]],
    readers: Mapping[str, _Reader],
    emas: Mapping[str, "EMA | None"],
) -> None:
    """Same parameters of the same shapes, same buffers, and an average if one is wanted."""
    cure = "run with the configuration that wrote it, or under another run.name"
    for engine, reader in readers.items():
        where = f"{reader.path} does not fit the {engine!r} of this configuration"
        for what, held, wanted in (
            ("parameter", reader.shapes, engines[engine].shapes),
            ("buffer or frozen parameter", _shapes(reader.constants()), _shapes(constants[engine])),
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
    """A checkpoint's model as a full state dict on the CPU, and its state as from `load`. Needs no process group.

    Args:
        path: Directory of the checkpoint; it is verified first.
        source: "ema" for the averaged weights, "raw" for the trained ones.
        engine: Which engine's model; may be left out where there is only one.

    Raises:
        UserError: the checkpoint is damaged, or has no such weights.
    """
    if source not in ("ema", "raw"):
        raise UserError(f"weights={source!r} are unknown: use ema or raw")
    files = verify(path)
    state = _read_state(path)
    if engine is None:
        if len(state["engines"]) != 1:
            raise ValueError(f"{path} holds several engines ({', '.join(state['engines'])}): name one")
        engine = next(iter(state["engines"]))
    reader = _Reader(path, engine, files)
    kind = "ema" if source == "ema" else "fp32"
    if kind not in reader.kinds:
        raise UserError(f"{path} holds no averaged weights: use weights=raw")
    return {**{name: reader.full(name, kind) for name in reader.shapes}, **reader.constants()}, state
