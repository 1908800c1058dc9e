"""The shard format: writer and reader side by side.

A data set is a folder:

    manifest.json                      what the folder holds; a shard belongs to it once its entry stands here
    train-000000.tar                   plain tar: KEY.mp4 KEY.json KEY.mp4 KEY.json ... (stock webdataset reads it)
    train-000000.idx.parquet           one row per sample: where its members lie, their checksums, its size and rate

Shards that others wrote (any WebDataset of videos or stills, captions in KEY.txt or KEY.json, labels in KEY.cls) have
the same indexes and the same manifest, whose `root` says where they lie. `sora-data index` makes them; a shard of
others has an index for each split, and its keys may hold whatever names of members hold.

Everything is written to a temporary name, flushed to the disk and renamed; the same samples give the same bytes.
"""

import hashlib
import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from sora_lite.data.files import flush, flush_folder, replace_file
from sora_lite.data.manifest import ENCODED, ShardEntry, to_json
from sora_lite.data.remote import PATIENCE, Patience, ReadCounts
from sora_lite.errors import UserError

MEDIA = ("mp4", "png", "jpg", "webp", "jpeg", "webm", "mkv", "mov", "avi")
"""Extensions that a sample's media member may have; those that are packed here are the first two."""
NO_LABEL = -1
"""Label of a sample that has none."""

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("ext", pa.string()),
        ("media_offset", pa.int64()),
        ("media_size", pa.int64()),
        ("crc32c", pa.uint32()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("json_crc32c", pa.uint32()),
        ("text_offset", pa.int64()),
        ("text_size", pa.int64()),
        ("text_crc32c", pa.uint32()),
        ("label", pa.int32()),
        ("frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("fps", pa.float64()),
        ("source", pa.string()),
    ]
)
"""Columns of an index file. Offsets and sizes are bytes of the tar; crc32c is of the media member. json is of KEY.json
and text of KEY.txt, which holds the caption; each has size 0 if there is none, and label is NO_LABEL. Height and width
are as people see them, with square pixels. source is the first 16 hex digits of the source's SHA-256 or,
where something was made of clips, `clip_digits` of the clip."""

Answer = TypeVar("Answer")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
KEY_OF_OTHERS = r"[^\p{Cc}\p{Cf}\p{Zl}\p{Zp}]{1,512}"
"""Regular expression (RE2) of keys in shards of others: anything that can be printed."""
_BLOCK = tarfile.BLOCKSIZE


class DamagedSample(Exception):
    """A member of a shard is not what the index says: the sample can be replaced. The message is the reason."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One clip or still image, or what was made of one, as it lies in a shard."""

    key: str
    ext: str
    """mp4, png, jpg, webp, latent.safetensors or text.safetensors."""
    media: bytes
    meta: dict[str, Any]
    """Content of KEY.json; holds at least frames, height, width, fps and source.sha256."""
    made_of: str | None = None
    """`clip_digits` of the clip that it was made of; None for a clip."""

    def __post_init__(self) -> None:
        if self.made_of is None:
            check_key(self.key)
        allowed = MEDIA if self.made_of is None else tuple(ENCODED.values())
        if self.ext not in allowed:
            raise ValueError(f"{self.key}: ext {self.ext!r} is none of {', '.join(allowed)}")
        if missing := {"frames", "height", "width", "fps", "source"} - self.meta.keys():
            raise ValueError(f"{self.key}: meta lacks {', '.join(sorted(missing))}")
        if type(self.label) is not int or not NO_LABEL <= self.label < 2**31:
            raise ValueError(f"{self.key}: label {self.label!r} is no number from 0 on")

    @property
    def name(self) -> str:
        """What its members are called in a tar: the key or, of what was made of a sample of others whose key would lead
        out of a folder or hide its end, the first 32 hex digits of the key's SHA-256."""
        return self.key if _KEY.fullmatch(self.key) else hashlib.sha256(self.key.encode()).hexdigest()[:32]

    @property
    def label(self) -> int:
        """The class label, NO_LABEL for none."""
        return self.meta.get("label", NO_LABEL)


# ------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes one shard and its index; both appear under their names on `close`, and neither if an error comes first.

    with ShardWriter(folder / "train-000000.tar", split="train") as writer:
        writer.add(sample)
    manifest.shards.append(writer.entry)
    """

    def __init__(self, path: Path, split: str) -> None:
        if path.suffix != ".tar":
            raise ValueError(f"{path}: a shard's name ends in .tar")
        self.path, self.split = path, split
        self.index_path = path.with_suffix(".idx.parquet")
        self.bytes = 0
        """Bytes written so far."""
        self.entry: ShardEntry
        """What the manifest must hold; known after `close`."""
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._sha256 = hashlib.sha256()
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keys(self) -> set[str]:
        """Keys of the samples so far."""
        return self._keys

    def add(self, sample: Sample) -> None:
        """Append a sample. Raises ValueError if its key is in the shard already."""
        if sample.key in self._keys:
            raise ValueError(f"{self.path.name}: key {sample.key} comes twice")
        meta = to_json(sample.meta)
        self._rows.append(
            {
                "key": sample.key,
                "ext": sample.ext,
                "media_offset": self._member(f"{sample.name}.{sample.ext}", sample.media),
                "media_size": len(sample.media),
                "crc32c": google_crc32c.value(sample.media),
                "json_offset": self._member(f"{sample.name}.json", meta),
                "json_size": len(meta),
                "json_crc32c": google_crc32c.value(meta),
                "text_offset": 0,
                "text_size": 0,
                "text_crc32c": 0,
                "label": sample.label,
                "frames": sample.meta["frames"],
                "height": sample.meta["height"],
                "width": sample.meta["width"],
                "fps": float(sample.meta["fps"]),
                "source": sample.made_of or sample.meta["source"]["sha256"][:16],
            }
        )
        self._keys.add(sample.key)

    def close(self) -> ShardEntry:
        """Finish both files, on the disk and under their names; the shard is committed by the manifest alone."""
        self._write(bytes(2 * _BLOCK))  # the end of a tar
        flush(self._file)
        self._file.close()
        content = index_bytes(self._rows)
        replace_file(self.index_path, content)
        os.replace(self._partial, self.path)
        flush_folder(self.path.parent)
        self.entry = ShardEntry(
            path=self.path.name,
            bytes=self.bytes,
            sha256=self._sha256.hexdigest(),
            samples=len(self._rows),
            split=self.split,
            index=self.index_path.name,
            index_sha256=hashlib.sha256(content).hexdigest(),
        )
        return self.entry

    def discard(self) -> None:
        """Drop everything written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _member(self, name: str, content: bytes) -> int:
        """Append a tar member with fixed owner and time -> offset of its content."""
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.bytes
        self._write(content)
        self._write(bytes(-len(content) % _BLOCK))
        return offset

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.bytes += len(content)


def index_bytes(rows: list[dict[str, Any]]) -> bytes:
    """The content of an index file; the same rows give the same bytes."""
    index = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), index, compression="zstd")
    return index.getvalue().to_pybytes()


def clip_digits(crc32c: int) -> str:
    """How an index names the clip that a sample was made of: the checksum of the clip's media member, in decimal."""
    return str(int(crc32c))


def check_key(key: str) -> None:
    """Raise ValueError unless the key is safe as a file's name and has no dot, which would end it for webdataset."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"key {key!r} must be 1 to 90 letters, digits, underscores and hyphens")


# ------------------------------------------------------------------------------------------------------- reading


class ShardReader:
    """Reads members of one shard by offset; threads and forked processes may share it. Close it, or use `with`.

    What fails on the way to the disk is tried again, as network file systems need it.
    """

    def __init__(self, path: Path, patience: Patience = PATIENCE, counts: ReadCounts | None = None) -> None:
        self.path, self._patience, self.counts = path, patience, counts or ReadCounts()
        self._descriptor = self._open()

    def _open(self) -> int:
        try:
            return self._persist(lambda: os.open(self.path, os.O_RDONLY))
        except FileNotFoundError:
            raise UserError(f"{self.path}: the shard is missing; restore it or pack the videos again.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, offset: int, size: int, crc32c: int) -> bytes:
        """The member's bytes.

        Raises DamagedSample unless they have this size and checksum; UserError if the disk fails again and again.
        """
        if offset < 0 or size < 0:
            raise DamagedSample(f"{self.path.name} cannot hold {size} bytes at offset {offset}")
        if (missing := offset + size - os.fstat(self._descriptor).st_size) > 0:
            raise DamagedSample(f"{self.path.name} ends {missing} bytes early at offset {offset}")
        content = self._persist(lambda: self._pread(offset, size))
        if len(content) < size:
            raise DamagedSample(f"{self.path.name} ends {size - len(content)} bytes early at offset {offset}")
        if google_crc32c.value(content) != crc32c:
            raise DamagedSample(f"{self.path.name} has a wrong checksum for {size} bytes at offset {offset}")
        self.counts.bytes_read += size
        return content

    def _pread(self, offset: int, size: int) -> bytes:
        """So many bytes, or fewer where the file ends."""
        content = os.pread(self._descriptor, size, offset)
        while 0 < len(content) < size:  # one call reads at most 2 GiB
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    def _persist(self, call: Callable[[], Answer]) -> Answer:
        for attempt in range(self._patience.retries):
            try:
                return call()
            except FileNotFoundError:
                raise
            except OSError:
                self.counts.io_retries += 1
                time.sleep(min(60.0, 0.5 * 2**attempt))
        try:
            return call()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); look at the disk") from None

    def read_json(self, offset: int, size: int, crc32c: int) -> dict[str, Any]:
        """As `read`, for KEY.json. Raises DamagedSample too if it is no JSON object."""
        try:
            content = json.loads(self.read(offset, size, crc32c))
        except (ValueError, RecursionError) as error:
            raise DamagedSample(f"{self.path.name} holds no JSON at offset {offset} ({error})") from None
        if not isinstance(content, dict):
            raise DamagedSample(f"{self.path.name} holds no JSON object at offset {offset}")
        return content

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def captions_of(reader: ShardReader, row: Mapping[str, int]) -> list[str]:
    """Captions of a sample: the text of KEY.txt, else `captions` (texts) or `caption` (a text) of KEY.json, else none.

    row: offsets, sizes and checksums of its members, as in an index.
    Raises DamagedSample: a member is not what the index says, or holds something else there.
    """
    if row["text_size"]:
        content = reader.read(row["text_offset"], row["text_size"], row["text_crc32c"])
        try:
            return [content.decode().strip()]
        except UnicodeDecodeError as error:
            raise DamagedSample(f"{reader.path.name} holds no text at offset {row['text_offset']} ({error})") from None
    if not row["json_size"]:
        return []
    meta = reader.read_json(row["json_offset"], row["json_size"], row["json_crc32c"])
    captions = meta.get("captions")
    if captions is None:
        captions = [] if meta.get("caption") is None else [meta["caption"]]
    if not isinstance(captions, list) or not all(_is_text(caption) for caption in captions):
        raise DamagedSample(f"{reader.path.name}: captions are no list of texts at offset {row['json_offset']}")
    return captions


def _is_text(value: Any) -> bool:
    """Whether a value of JSON is a text, and one that has UTF-8: half of a surrogate pair has none."""
    try:
        return isinstance(value, str) and len(value.encode()) >= 0
    except UnicodeEncodeError:
        return False
