"""All samples of one split of a data set as columns: what the order and the buckets are computed from."""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sora_lite.data.shards import INDEX_SCHEMA, MEDIA, Manifest, ShardEntry
from sora_lite.errors import UserError


@dataclass(kw_only=True, slots=True)
class Index:
    """N samples in the order of shards and of members within them. Every array is (N,); read it, never write it."""

    shard_paths: list[Path]
    shard_sha256: list[str]
    removed: list[str]
    """Keys of samples in these shards that were taken down, and so are not among the N."""
    keys: np.ndarray
    """Fixed-width unicode."""
    source: np.ndarray
    """Fixed-width unicode: first 16 hex digits of the source's SHA-256."""
    ext: np.ndarray
    """Fixed-width unicode: mp4, png, jpg or webp."""
    shard: np.ndarray
    """int32: place in `shard_paths`."""
    media_offset: np.ndarray
    """int64: bytes into the shard."""
    media_size: np.ndarray
    """int64: bytes."""
    crc32c: np.ndarray
    """uint32: checksum of the media member."""
    json_offset: np.ndarray
    """int64: bytes into the shard."""
    json_size: np.ndarray
    """int64: bytes."""
    json_crc32c: np.ndarray
    """uint32: checksum of KEY.json."""
    frames: np.ndarray
    """int32."""
    height: np.ndarray
    """int32: pixels."""
    width: np.ndarray
    """int32: pixels."""
    fps: np.ndarray
    """float64: frames per second."""

    def __post_init__(self) -> None:
        shape = self.keys.shape
        for item in fields(self):
            column = getattr(self, item.name)
            if isinstance(column, np.ndarray) and (column.ndim != 1 or column.shape != shape):
                raise ValueError(f"{item.name} has shape {column.shape}, keys has {shape}")
        if len(self.shard_paths) != len(self.shard_sha256):
            raise ValueError("shard_paths and shard_sha256 differ in length")

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def load(cls, folder: Path, split: str) -> Self:
        """Read the index of one split ("train" or "validation"); a split that holds nothing gives an empty index.

        Raises UserError, with the file and the cure, if the manifest, a shard or an index is missing, if one is not
        as the manifest says, or if packing has not finished.
        """
        manifest = Manifest.load(folder)
        if manifest.pending and not manifest.shards:
            raise UserError(f"{folder}: packing was interrupted; `sora-data run` with the same arguments finishes it.")
        entries = [entry for entry in manifest.shards if entry.split == split]
        tables = [read_index(folder, entry) for entry in entries]
        table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *tables])
        columns = {name: table[name].to_numpy(zero_copy_only=False) for name in INDEX_SCHEMA.names}
        for old, new in (("key", "keys"), ("source", "source"), ("ext", "ext")):
            columns[new] = columns.pop(old).astype(np.str_)
        columns["shard"] = np.repeat(np.arange(len(entries), dtype=np.int32), [entry.samples for entry in entries])
        gone = np.isin(columns["keys"], manifest.removed_keys) | np.isin(columns["source"], manifest.removed_sources)
        return cls(
            shard_paths=[folder / entry.path for entry in entries],
            shard_sha256=[entry.sha256 for entry in entries],
            removed=columns["keys"][gone].tolist(),
            **{name: column[~gone] for name, column in columns.items()},
        )

    def fingerprint(self) -> str:
        """SHA-256 over the shards' checksums, in order, and what was taken down: equal if the samples are."""
        return hashlib.sha256("\n".join([*self.shard_sha256, *self.removed]).encode()).hexdigest()


def read_index(folder: Path, entry: ShardEntry) -> pa.Table:
    """One shard's table, after a check that both files are those of the manifest (the tar by its size alone)."""
    cure = "restore it, or pack the videos again with `sora-data run`"
    for name in (entry.path, entry.index):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: named in the manifest but missing; {cure}.")
    if (size := (folder / entry.path).stat().st_size) != entry.bytes:
        raise UserError(f"{folder / entry.path}: has {size} bytes, not the manifest's {entry.bytes}; {cure}.")
    content = (folder / entry.index).read_bytes()
    if hashlib.sha256(content).hexdigest() != entry.index_sha256:
        raise UserError(f"{folder / entry.index}: is not as it was written (SHA-256 differs); {cure}.")
    try:
        table = pq.read_table(pa.BufferReader(content), schema=INDEX_SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{folder / entry.index}: is no index ({error}); {cure}.") from None
    if table.num_rows != entry.samples:
        raise UserError(f"{folder / entry.index}: has {table.num_rows} rows, not {entry.samples}; {cure}.")
    if fault := _fault(table, entry.bytes):
        raise UserError(f"{folder / entry.index}: {fault}; do not use it, whoever made it may mean harm.")
    return table


def _fault(table: pa.Table, size: int) -> str:
    """What nobody who packs writes into an index of a shard of `size` bytes; or nothing."""
    if any(table[name].null_count for name in INDEX_SCHEMA.names):
        return "has empty fields"
    keys = table["key"]
    if len(keys) and not pc.all(pc.match_substring_regex(keys, "^[A-Za-z0-9_-]{1,90}$")).as_py():
        return "has keys that are not 1 to 90 letters, digits, underscores and hyphens"
    if len(pc.unique(keys)) < len(keys):
        return "has a key twice"
    if not pc.all(pc.is_in(table["ext"], pa.array(MEDIA))).as_py() and len(keys):
        return f"has files that are none of {', '.join(MEDIA)}"
    for what in ("media", "json"):
        begin, length = table[f"{what}_offset"].to_numpy(), table[f"{what}_size"].to_numpy()
        if np.any((begin < 0) | (length < 0) | (begin > size) | (length > size - begin)):
            return "names places outside of its shard"
    if any(np.any(table[name].to_numpy() < 1) for name in ("frames", "height", "width")):
        return "has samples without size"
    return "" if np.all(np.isfinite(fps := table["fps"].to_numpy()) & (fps > 0)) else "has samples without a rate"
