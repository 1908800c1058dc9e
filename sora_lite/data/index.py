"""All samples of one split of one or several data sets as columns: what the order and the buckets are computed from."""

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sora_lite.data.manifest import ENCODED, Manifest, ShardEntry
from sora_lite.data.remote import Location, ReadCounts, Url, read_file
from sora_lite.data.shard_cache import RemoteShard, ShardCache, default_cache
from sora_lite.data.shards import INDEX_SCHEMA, KEY_OF_OTHERS, MEDIA, NO_LABEL, ShardReader
from sora_lite.errors import UserError

BY_KEY = 65_536
"""Samples in `Index.by_key`, at most."""
GROUP = 64
"""Shards whose index files are read at a time."""

COLUMNS: dict[str, np.dtype] = {
    {"key": "keys"}.get(name, name): np.dtype("S1") if kind == pa.string() else np.dtype(kind.to_pandas_dtype())
    for name, kind in zip(INDEX_SCHEMA.names, INDEX_SCHEMA.types, strict=True)
} | {"shard": np.dtype(np.int32)}
"""Columns of an index and their types; texts are UTF-8 bytes of whatever width they need."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Origin:
    """What the manifest of a data set says of all its samples; see `Manifest` for the fields."""

    content: str
    config_hash: str
    encoding: dict[str, Any]

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Out of a manifest."""
        return cls(content=manifest.content, config_hash=manifest.config_hash, encoding=manifest.encoding)


class ShardPaths(Sequence[Location]):
    """Where the shards of data sets lie. Each is made when it is asked for: to make 10^5 of them takes longer than all
    else that a start does with an index."""

    def __init__(self, folders: Sequence[Location], set_shards: Sequence[int], names: Sequence[str]) -> None:
        self._folders, self._names = folders, names
        self._ends = list(accumulate(set_shards))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        return self._folders[bisect_right(self._ends, number)] / self._names[number]


@dataclass(kw_only=True, slots=True)
class Index:
    """N samples in the order of data sets, of shards and of members within them.

    Every column is (N,). It may be mapped from a file: read it, never write it.
    """

    shard_paths: Sequence[Location]
    shard_sha256: list[str]
    shard_bytes: list[int]
    set_shards: list[int]
    """Number of shards of each data set, which follow one another in `shard_paths`."""
    counts: list[dict[str, int]]
    """What became of the sources and clips of each data set in its last packing."""
    origins: list[Origin]
    """What each data set is and was made with."""
    removed: list[str]
    """Keys of samples in these shards that were taken down, and so are not among the N."""
    by_key: np.ndarray
    """int64: numbers of the first 65,536 samples (or all) in the order of their keys, which is a fair draw."""
    keys: np.ndarray
    """Fixed-width bytes, UTF-8; `key` gives one as text."""
    source: np.ndarray
    """Fixed-width bytes: first 16 hex digits of the source's SHA-256, or `clip_digits` of what a sample was made of."""
    ext: np.ndarray
    """Fixed-width bytes: one of `shards.MEDIA`, or of `shards.ENCODED`."""
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
    """int64: bytes; 0 where there is no KEY.json."""
    json_crc32c: np.ndarray
    """uint32: checksum of KEY.json."""
    text_offset: np.ndarray
    """int64: bytes into the shard, where KEY.txt holds the caption."""
    text_size: np.ndarray
    """int64: bytes; 0 where there is no KEY.txt."""
    text_crc32c: np.ndarray
    """uint32: checksum of KEY.txt."""
    label: np.ndarray
    """int32: class label, -1 for none."""
    frames: np.ndarray
    """int32."""
    height: np.ndarray
    """int32: pixels, as people see them."""
    width: np.ndarray
    """int32: pixels, as people see them: square ones."""
    fps: np.ndarray
    """float64: frames per second."""
    folder: Path | None = None
    """Where the columns are mapped from; None in memory."""
    shard_cache: ShardCache | None = None
    """Where remote shards are kept; None for a default."""

    def __post_init__(self) -> None:
        shape = self.keys.shape
        for item in fields(self):
            column = getattr(self, item.name)
            if item.name in COLUMNS and (column.ndim != 1 or column.shape != shape):
                raise ValueError(f"{item.name} has shape {column.shape}, keys has {shape}")
        if not len(self.shard_paths) == len(self.shard_sha256) == len(self.shard_bytes) == sum(self.set_shards):
            raise ValueError("shard_paths, shard_sha256, shard_bytes and set_shards differ in length")

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def load(cls, folders: Location | Sequence[Location], split: str, *, content: str = "clips") -> Self:
        """Read one split ("train" or "validation") into memory; one that holds nothing gives an empty index.

        folders: one data set, or several, whose samples are numbered through.
        content: what they must hold: clips, latents or text.
        Raises UserError, with the file and the cure, if the manifest, a shard or an index is missing, if one is not
        as the manifest says, or if packing has not finished.
        """
        folders = [folders] if isinstance(folders, Location) else list(folders)
        return cls.of(folders, [load_manifest(folder) for folder in folders], split, content=content)

    @classmethod
    def of(
        cls, folders: Sequence[Location], manifests: Sequence[Manifest], split: str, *, content: str = "clips"
    ) -> Self:
        """As `load`, of what these manifests list."""
        origins = [Origin.of(manifest) for manifest in manifests]
        require_content(folders, origins, content)
        parts = [{name: np.empty(0, kind) for name, kind in COLUMNS.items()}]
        removed: list[str] = []
        for part, gone in read_parts(folders, manifests, split):
            parts.append(part)
            removed += gone
        columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
        entries = [entries_of(manifest, split) for manifest in manifests]
        return cls(
            shard_paths=[
                manifest.shard_path(folder, one)
                for folder, manifest, some in zip(folders, manifests, entries, strict=True)
                for one in some
            ],
            shard_sha256=[one.sha256 for some in entries for one in some],
            shard_bytes=[one.bytes for some in entries for one in some],
            set_shards=[len(some) for some in entries],
            counts=[manifest.counts for manifest in manifests],
            origins=origins,
            removed=removed,
            by_key=np.argsort(columns["keys"], kind="stable")[:BY_KEY],
            **columns,  # type: ignore[arg-type]
        )

    def open_shard(self, number: int, counts: ReadCounts | None = None) -> ShardReader:
        """A reader of shard `number`, wherever it lies. Raises UserError if it cannot be had."""
        path = self.shard_paths[number]
        if isinstance(path, Path):
            return ShardReader(path, counts=counts)
        place = path, self.shard_sha256[number], self.shard_bytes[number]
        return (self.shard_cache or default_cache()).open(*place, counts or ReadCounts())

    def remote_shard(self, number: int) -> RemoteShard | None:
        """Shard `number`, if it lies behind a URL."""
        path = self.shard_paths[number]
        return RemoteShard(path, self.shard_sha256[number], self.shard_bytes[number]) if isinstance(path, Url) else None

    def is_remote(self) -> bool:
        """Whether shards of any data set lie behind a URL."""
        firsts = [end - count for end, count in zip(accumulate(self.set_shards), self.set_shards, strict=True) if count]
        return any(isinstance(self.shard_paths[first], Url) for first in firsts)

    def key(self, sample: int) -> str:
        """The key of a sample."""
        return bytes(self.keys[sample]).decode()

    def set_of(self, samples: np.ndarray) -> np.ndarray:
        """Number of the data set of each sample."""
        return np.searchsorted(np.cumsum(self.set_shards), self.shard[samples], side="right")

    def set_samples(self) -> list[int]:
        """Number of samples of each data set."""
        ends = np.searchsorted(self.shard, np.cumsum(self.set_shards))
        return np.diff(ends, prepend=0).tolist()

    def fingerprint(self) -> str:
        """SHA-256 over the shards' checksums, in order, and what was taken down: equal if the samples are."""
        return hashlib.sha256("\n".join([*self.shard_sha256, *self.removed]).encode()).hexdigest()


def require_content(folders: Sequence[Location], origins: Sequence[Origin], content: str) -> None:
    """Raise UserError unless all these data sets hold `content`."""
    for folder, origin in zip(folders, origins, strict=True):
        if origin.content != content:
            setting = "shards" if origin.content == "clips" else origin.content
            raise UserError(f"{folder}: holds {origin.content}, not {content}; give it as data.{setting}.")


class OpenShards:
    """Readers of an index's shards, of which the `limit` last used stay open: a data set may have 10^5 of them."""

    def __init__(self, index: Index, limit: int = 16) -> None:
        self.index, self.limit = index, limit
        self.counts = ReadCounts()
        """What reading through them cost."""
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __getitem__(self, number: int) -> ShardReader:
        """The reader of a shard, for use at once. Raises UserError if the shard cannot be had."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self.limit:
            self._open.popitem(last=False)[1].close()
        self._open[number] = self.index.open_shard(number, self.counts)
        return self._open[number]

    def close(self) -> None:
        """Close all."""
        while self._open:
            self._open.popitem()[1].close()


def load_manifest(folder: Location) -> Manifest:
    """The manifest of a data set that can be read. Raises UserError if its first packing has not finished."""
    manifest = Manifest.load(folder)
    if manifest.pending and not manifest.shards:
        raise UserError(f"{folder}: packing was interrupted; `sora-data run` with the same arguments finishes it.")
    return manifest


def entries_of(manifest: Manifest, split: str) -> list[ShardEntry]:
    """The shards of one split."""
    return [entry for entry in manifest.shards if entry.split == split]


def read_parts(
    folders: Sequence[Location], manifests: Sequence[Manifest], split: str
) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
    """Columns of one split of data sets, in pieces of some shards each, and the keys that were left out of each.

    Raises UserError as `read_index` does.
    """
    first = 0
    with ThreadPoolExecutor(8) as pool:
        for folder, manifest in zip(folders, manifests, strict=True):
            entries = entries_of(manifest, split)
            hidden_keys = np.array(sorted(key.encode() for key in manifest.removed_keys), dtype="S")
            hidden_sources = np.array(sorted(one.encode() for one in manifest.removed_sources), dtype="S")
            for start in range(0, len(entries), GROUP):
                group = entries[start : start + GROUP]
                tables = list(pool.map(read_index, [folder] * len(group), [manifest] * len(group), group))
                part = _columns(pa.concat_tables(tables))
                numbers = np.arange(first + start, first + start + len(group), dtype=np.int32)
                part["shard"] = np.repeat(numbers, [entry.samples for entry in group])
                gone = np.zeros(len(part["keys"]), dtype=bool)
                if len(hidden_keys) or len(hidden_sources):
                    gone = np.isin(part["keys"], hidden_keys) | np.isin(part["source"], hidden_sources)
                removed = [key.decode() for key in part["keys"][gone].tolist()]
                yield {name: column[~gone] for name, column in part.items()}, removed
            first += len(entries)


def read_index(folder: Location, manifest: Manifest, entry: ShardEntry) -> pa.Table:
    """One shard's table, after a check that both files are those of the manifest (a tar by its size alone)."""
    check_shard(manifest.shard_path(folder, entry), entry.bytes)
    path = folder / entry.index
    changed = f"is not as it was written (SHA-256 differs); {_CURE}."

    def check(content: bytes) -> str:
        return "" if hashlib.sha256(content).hexdigest() == entry.index_sha256 else changed

    try:
        content = read_file(path, check)
    except FileNotFoundError:
        raise UserError(f"{path}: named in the manifest but missing; {_CURE}.") from None
    if fault := check(content):
        raise UserError(f"{path}: {fault}")
    try:
        table = pq.read_table(pa.BufferReader(content), schema=INDEX_SCHEMA, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is no index ({error}); {_CURE}.") from None
    if table.num_rows != entry.samples:
        raise UserError(f"{path}: has {table.num_rows} rows, not {entry.samples}; {_CURE}.")
    if fault := _fault(table, entry.bytes, of_others=manifest.root is not None):
        raise UserError(f"{path}: {fault}; do not use it, whoever made it may mean harm.")
    return table


def check_shard(path: Location | str, size: int) -> None:
    """Raise UserError unless the shard is there with its size in bytes; a remote one is verified when it is fetched."""
    if isinstance(path, Url):
        return
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: named in the manifest but missing; {_CURE}.") from None
    if found != size:
        raise UserError(f"{path}: has {found} bytes, not the manifest's {size}; {_CURE}.")


_CURE = "restore it, or pack the videos again with `sora-data run`"


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    """The columns of index files as arrays, under the names of `Index`."""
    columns = {}
    for name, kind in zip(INDEX_SCHEMA.names, INDEX_SCHEMA.types, strict=True):
        column = table[name]
        columns[{"key": "keys"}.get(name, name)] = (
            _fixed_width(column) if kind == pa.string() else column.to_numpy(zero_copy_only=False)
        )
    return columns


def _fixed_width(column: pa.ChunkedArray) -> np.ndarray:
    """Texts as UTF-8 bytes of the longest one's width."""
    texts = pa.concat_arrays([pa.array([], pa.large_string()), *column.cast(pa.large_string()).chunks])
    _, offset_buffer, data = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64, len(texts) + 1, 8 * texts.offset)
    lengths = np.diff(offsets)
    width = max(1, int(lengths.max(initial=0)))
    fixed = np.zeros((len(texts), width), dtype=np.uint8)
    if len(texts) and data is not None:
        fixed[np.arange(width) < lengths[:, None]] = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]
    return fixed.view(f"S{width}")[:, 0]


def _fault(table: pa.Table, size: int, *, of_others: bool) -> str:
    """What nobody who packs, or indexes what others packed, writes into an index of a shard of `size` bytes."""
    if any(table[name].null_count for name in INDEX_SCHEMA.names):
        return "has empty fields"
    keys = table["key"]
    pattern = KEY_OF_OTHERS if of_others else "[A-Za-z0-9_-]{1,90}"
    if len(keys) and not pc.all(pc.match_substring_regex(keys, f"^{pattern}$")).as_py():
        return "has keys that are " + ("not printable" if of_others else "not 1 to 90 letters, digits, _ and -")
    if len(pc.unique(keys)) < len(keys):
        return "has a key twice"
    if not pc.all(pc.is_in(table["ext"], pa.array([*MEDIA, *ENCODED.values()]))).as_py() and len(keys):
        return f"has files that are none of {', '.join(MEDIA)}, nor made of such"
    for what in ("media", "json", "text"):
        begin, length = table[f"{what}_offset"].to_numpy(), table[f"{what}_size"].to_numpy()
        if np.any((begin < 0) | (length < 0) | (begin > size) | (length > size - begin)):
            return "names places outside of its shard"
    if np.any(table["label"].to_numpy() < NO_LABEL):
        return "has labels below 0"
    if any(np.any(table[name].to_numpy() < 1) for name in ("frames", "height", "width")):
        return "has samples without size"
    return "" if np.all(np.isfinite(fps := table["fps"].to_numpy()) & (fps > 0)) else "has samples without a rate"
