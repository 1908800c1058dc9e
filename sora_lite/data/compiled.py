"""The index and the buckets of a run as files that are mapped into memory, not read: what a start costs does not grow
with the number of samples.

CACHE/index-HASH/                    one split of one or several data sets; the hash is over their manifests
    index.json                       shards, and what was taken down
    keys.npy frames.npy ...          one file per column
    buckets-HASH/                    the samples of each row of a bucket table, by number; the hash is over the table
        buckets.json samples_0.npy shards_0.npy starts_0.npy ...

A folder appears complete or not at all, under a name that follows from what it is made of; so it is never out of date,
several processes may make it at once, and all of it may be deleted when no run is about to start.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sora_lite.data.buckets import Bucket, Row, assign, choose, longest_at, refuse_empty
from sora_lite.data.files import flush, flush_folder, replace_file
from sora_lite.data.index import (
    BY_KEY,
    COLUMNS,
    Index,
    Origin,
    ShardPaths,
    check_shard,
    entries_of,
    load_manifest,
    read_parts,
    require_content,
)
from sora_lite.data.manifest import MANIFEST, Manifest, to_json
from sora_lite.data.remote import CANNOT_WRITE, Location, Url
from sora_lite.data.shard_cache import ShardCache, default_cache
from sora_lite.errors import UserError

FORMAT = 2
"""Part of every hash: a new number when the files below change."""
CHUNK = 2**18
"""Samples that are given to buckets at a time."""
SIZES = {"keys": "keys", "frames": "frames", "height": "height", "width": "width", "own_fps": "fps"}
"""What decides the bucket of a sample: argument of `choose`, column of the index."""
ABANDONED_SECONDS = 6 * 3600
"""Age after which a folder that was never finished is taken for what a killed process left behind."""


def open_index(
    folders: Sequence[Location],
    split: str,
    *,
    cache: Path | None = None,
    shard_cache: ShardCache | None = None,
    check: bool = True,
    content: str = "clips",
) -> Index:
    """Map the index of one split of data sets, numbered through; compile it first where that was not done yet.

    Args:
        folders: the data sets.
        cache: folder for what is compiled; by default `.cache` in the first data set's folder, or, if that is remote,
            the shard cache.
        shard_cache: where remote shards are kept; None for a default.
        check: whether to look that every shard is there with its size. One process of a job is enough.
        content: what the data sets must hold: clips, latents or text.

    Raises:
        UserError: as `Index.load`, or the cache cannot be written.
    """
    if cache is None:
        first = folders[0]
        cache = first / ".cache" if isinstance(first, Path) else (shard_cache or default_cache()).folder / "index"
    folder = cache / _index_name([_manifest_hash(folder) for folder in folders], split)
    if not folder.is_dir():
        folder = _compile_index(folders, split, cache)
    meta = _read_json(folder / "index.json")
    origins = [Origin(**one) for one in meta["origins"]]
    require_content(folders, origins, content)
    names, set_shards = meta["names"], meta["set_shards"]
    if check:
        _check_shards(folders, set_shards, names, meta["bytes"])
    return Index(
        shard_paths=ShardPaths(folders, set_shards, names),
        shard_sha256=meta["sha256"],
        shard_bytes=meta["bytes"],
        set_shards=set_shards,
        counts=meta["counts"],
        origins=origins,
        removed=meta["removed"],
        folder=folder,
        shard_cache=shard_cache,
        **{name: map_column(folder / f"{name}.npy") for name in ["by_key", *COLUMNS]},
    )


def _check_shards(
    folders: Sequence[Location], set_shards: Sequence[int], names: Sequence[str], sizes: Sequence[int]
) -> None:
    """Raise UserError unless all shards are there. Their names stay texts, which are looked up in half the time."""
    last = 0
    for folder, count in zip(folders, set_shards, strict=True):
        first, last = last, last + count
        if isinstance(folder, Path):
            for name, size in zip(names[first:last], sizes[first:last], strict=True):
                check_shard(os.path.join(folder, name), size)


def open_buckets(index: Index, rows: Sequence[Row]) -> list[Bucket]:
    """The buckets of an index: mapped, and compiled first where that was not done yet; in memory where the index is.

    Raises:
        UserError: a row gets no sample, or the cache cannot be written.
    """
    if index.folder is None:
        columns = {argument: getattr(index, name) for argument, name in SIZES.items()}
        return assign(rows, **columns, shard=index.shard)
    table = [FORMAT, [[*row.shape, row.keep, row.fps] for row in rows]]
    folder = index.folder / f"buckets-{hashlib.sha256(json.dumps(table).encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        build(folder, lambda partial: _compile_buckets(partial, folder.parent, index, rows))
    digests = _read_json(folder / "buckets.json")["sha256"]
    return [
        Bucket(
            shape=row.shape,
            batch=row.batch,
            fps=row.fps,
            digest=digest,
            **{name: map_column(folder / f"{name}_{number}.npy") for name in ("samples", "shards", "starts")},
        )
        for number, (row, digest) in enumerate(zip(rows, digests, strict=True))
    ]


# ------------------------------------------------------------------------------------------------------ compiling


def _manifest_hash(folder: Location) -> str:
    """SHA-256 of a manifest as it lies there; of a path, what it says is only read when something is compiled."""
    if isinstance(folder, Url):
        return hashlib.sha256(Manifest.load(folder).to_bytes()).hexdigest()
    path = folder / MANIFEST
    if not path.is_file():
        Manifest.load(folder)  # says what is wrong
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _index_name(manifest_hashes: Sequence[str], split: str) -> str:
    text = json.dumps([FORMAT, split, *manifest_hashes])
    return f"index-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _compile_index(folders: Sequence[Location], split: str, cache: Path) -> Path:
    """Write the columns of an index -> its folder, named by the manifests as they were when they were read."""
    manifests = [load_manifest(folder) for folder in folders]
    hashes = [hashlib.sha256(manifest.to_bytes()).hexdigest() for manifest in manifests]
    folder = cache / _index_name(hashes, split)
    build(folder, lambda partial: _write_index(partial, folders, manifests, split))
    return folder


def _write_index(partial: Path, folders: Sequence[Location], manifests: Sequence[Manifest], split: str) -> None:
    writers = {name: ColumnWriter(partial / f"{name}.npy", kind) for name, kind in COLUMNS.items()}
    removed: list[str] = []
    first_keys, by_key, samples = np.empty(0, "S1"), np.empty(0, np.int64), 0
    for part, gone in read_parts(folders, manifests, split):
        for name, column in part.items():
            writers[name].append(column)
        removed += gone
        keys = part["keys"]
        near = np.flatnonzero(keys <= first_keys[-1]) if len(first_keys) == BY_KEY else np.arange(len(keys))
        if len(near):
            first_keys = np.concatenate([first_keys, keys[near]])
            by_key = np.concatenate([by_key, samples + near])
            chosen = np.argsort(first_keys, kind="stable")[:BY_KEY]
            first_keys, by_key = first_keys[chosen], by_key[chosen]
        samples += len(keys)
    for writer in writers.values():
        writer.close()
    with ColumnWriter(partial / "by_key.npy", np.dtype(np.int64)) as writer:
        writer.append(by_key)
    entries = [entries_of(manifest, split) for manifest in manifests]
    together = [entry for some in entries for entry in some]
    meta = {
        "names": [
            str(manifest.shard_path(Path(), entry))
            for manifest, some in zip(manifests, entries, strict=True)
            for entry in some
        ],
        "bytes": [entry.bytes for entry in together],
        "sha256": [entry.sha256 for entry in together],
        "set_shards": [len(some) for some in entries],
        "counts": [manifest.counts for manifest in manifests],
        "origins": [asdict(Origin.of(manifest)) for manifest in manifests],
        "removed": removed,
    }
    replace_file(partial / "index.json", to_json(meta))


def _compile_buckets(partial: Path, index_folder: Path, index: Index, rows: Sequence[Row]) -> None:
    """Write the samples of each row, ascending, and where those of each shard begin."""
    writers = [ColumnWriter(partial / f"samples_{n}.npy", np.dtype(np.int64)) for n in range(len(rows))]
    digests = [hashlib.sha256() for _ in rows]
    held = np.zeros((len(rows), len(index.shard_paths)), dtype=np.int64)  # samples of a row in a shard
    longest = np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(index), CHUNK):
        part = slice(start, start + CHUNK)
        # Mapped anew for each part, since pages that were read stay in memory as long as the mapping.
        sizes = {argument: map_column(index_folder / f"{name}.npy")[part] for argument, name in SIZES.items()}
        chosen = choose(rows, **sizes)
        longest = np.maximum(longest, longest_at(rows, sizes["frames"], sizes["own_fps"]))
        shard = map_column(index_folder / "shard.npy")[part]
        low = int(shard[0])
        for number in range(len(rows)):
            places = np.flatnonzero(chosen == number)
            samples = (start + places).astype(np.int64)
            writers[number].append(samples)
            digests[number].update(samples.data)
            found = np.bincount(shard[places] - low)
            held[number, low : low + len(found)] += found
    for writer in writers:
        writer.close()
    refuse_empty(rows, held.sum(axis=1), total=len(index), longest=longest)
    for number in range(len(rows)):
        shards = np.flatnonzero(held[number]).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(held[number, shards])]).astype(np.int64)
        for name, column in (("shards", shards), ("starts", starts)):
            with ColumnWriter(partial / f"{name}_{number}.npy", column.dtype) as writer:
                writer.append(column)
            digests[number].update(column.data)
    replace_file(partial / "buckets.json", to_json({"sha256": [digest.hexdigest() for digest in digests]}))


# ---------------------------------------------------------------------------------------------------------- files


class ColumnWriter:
    """Writes one .npy file of a length that is not known yet, piece by piece; texts may become wider on the way."""

    def __init__(self, path: Path, kind: np.dtype) -> None:
        self.path, self._kind, self._length = path, kind, 0
        self._file = path.open("w+b")
        self._start = self._write_header()

    def __enter__(self) -> "ColumnWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, values: np.ndarray) -> None:
        """Write more values, (n,)."""
        if values.dtype.kind == "S" and values.dtype.itemsize > self._kind.itemsize:
            self._widen(values.dtype)
        self._file.write(np.ascontiguousarray(values, dtype=self._kind).tobytes())
        self._length += len(values)

    def close(self) -> None:
        """Finish the file; when this returns it is on the disk."""
        self._file.seek(0)
        if self._write_header() != self._start:
            raise ValueError(f"{self.path}: the header of {self._length} values has another length than that of none")
        flush(self._file)
        self._file.close()

    def _write_header(self) -> int:
        """Returns the header's length in bytes, which numpy pads so that any number of values fits."""
        header = {"descr": np.lib.format.dtype_to_descr(self._kind), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def _widen(self, kind: np.dtype) -> None:
        """Write anew what was written, in a wider type."""
        self.close()
        narrow = map_column(self.path)
        self.path.unlink()  # what is mapped stays until it is let go
        self._kind, self._length = kind, 0
        self._file = self.path.open("w+b")
        self._start = self._write_header()
        for start in range(0, len(narrow), CHUNK):
            self.append(narrow[start : start + CHUNK])


def build(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that appears complete or not at all; if another process was first, its folder stays."""
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        partial.mkdir()
        fill(partial)
        flush_folder(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        flush_folder(folder.parent)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(
            f"data.cache: {folder} cannot be written ({os.strerror(error.errno)}); "
            "name a folder for the compiled index that can, with enough space"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Delete what a killed process left behind."""
    for partial in cache.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):  # its process has just finished it
            newest = max(path.stat().st_mtime for path in [partial, *partial.glob("*")])
            if newest < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def map_column(path: Path) -> np.ndarray:
    """A column, mapped read-only."""
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: cannot be read ({error}); delete the folder {path.parent}, it is made anew from the shards"
    )
