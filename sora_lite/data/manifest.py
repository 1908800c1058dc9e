"""The table of contents of a data set: which shards it consists of, and what they must be."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

from sora_lite.data.files import replace_file
from sora_lite.data.remote import Location, Url, read_file
from sora_lite.errors import UserError

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
ENCODED = {"latents": "latent.safetensors", "text": "text.safetensors"}
"""What was made of clips and joins them by key (`Manifest.content`), and its extension."""

Place = TypeVar("Place", Path, Url, Location)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"((?:train|validation)-\d{6}(?:\.\d{1,9})?)\.tar")


@dataclass(kw_only=True, slots=True)
class ShardEntry:
    """What the manifest says of one shard. File names are relative to the folder."""

    path: str
    bytes: int
    sha256: str
    samples: int
    split: str
    index: str
    index_sha256: str

    def check(self, *, of_others: bool) -> None:
        """Raise ValueError unless sizes are numbers, and names those that a packing gives, or inside their folder."""
        name = _SHARD.fullmatch(self.path)
        whole = name is not None and self.index == f"{name[1]}.idx.parquet"
        if of_others:
            whole = is_inside(self.path, ".tar") and is_inside(self.index, ".idx.parquet")
        if not whole or self.split not in ("train", "validation"):
            raise ValueError(f"names {self.path!r} and {self.index!r}, outside of its folder or not of its split")
        if not all(isinstance(size, int) and size >= 0 for size in (self.bytes, self.samples)):
            raise ValueError(f"sizes of {self.path} are no numbers")
        if not all(
            isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in (self.sha256, self.index_sha256)
        ):
            raise ValueError(f"checksums of {self.path} are no SHA-256")


@dataclass(kw_only=True, slots=True)
class Manifest:
    """The table of contents of a data set; writing an entry into it is what commits a shard."""

    config_hash: str
    """Hash of the settings that made the clips."""
    content: str = "clips"
    """`clips`, or what was made of them and joins them by key: `latents` or `text`."""
    encoding: dict[str, Any] = field(default_factory=dict)
    """Of latents and text: what they were made with. `fingerprint` names the VAE or the text encoder."""
    shards: list[ShardEntry] = field(default_factory=list)
    """What the data set consists of."""
    pending: list[ShardEntry] = field(default_factory=list)
    """Shards of a packing that has not ended yet. They join `shards` all together, so readers never see a part."""
    removed_sources: list[str] = field(default_factory=list)
    """Sources that were taken down (first 16 hex digits of their SHA-256). Readers leave their samples out."""
    removed_frames: list[str] = field(default_factory=list)
    """Their `frames_hash`, by which copies of them are known."""
    removed_keys: list[str] = field(default_factory=list)
    """Samples that were taken down."""
    counts: dict[str, int] = field(default_factory=dict)
    """What became of sources and clips in the last packing or indexing."""
    root: str | None = None
    """Where shards of others lie: a folder, relative to the manifest's or absolute. None: packed here, beside it. What
    was made of shards of others has ".", since it has their names and keys."""
    schema_version: int = SCHEMA_VERSION

    @property
    def splits(self) -> dict[str, int]:
        """Samples in each split, with those that were taken down."""
        sizes: dict[str, int] = {}
        for entry in self.shards:
            sizes[entry.split] = sizes.get(entry.split, 0) + entry.samples
        return sizes

    @classmethod
    def load(cls, folder: Location) -> Self:
        """Read FOLDER/manifest.json. Raises UserError if there is none, or if it is not as it was written."""
        path = folder / MANIFEST
        try:
            return cls.parse(read_file(path, _faulty_manifest), str(path))
        except FileNotFoundError:
            raise UserError(f"{path}: not found; name a folder that `sora-data run VIDEOS SHARDS` has made.") from None

    @classmethod
    def parse(cls, written: bytes, name: str) -> Self:
        """A manifest from its bytes. Raises UserError, which begins with the name, if it is not as it was written."""
        try:
            content = json.loads(written)
            version = content["schema_version"]
            if version != SCHEMA_VERSION:
                raise UserError(f"{name}: written in format {version}, read here is {SCHEMA_VERSION}; pack it again.")
            del content["splits"]  # for people who read the file; follows from the entries
            del content["sha256"]
            shards = [ShardEntry(**entry) for entry in content.pop("shards")]
            pending = [ShardEntry(**entry) for entry in content.pop("pending")]
            for entry in shards + pending:
                entry.check(of_others=content["root"] is not None)
            if not isinstance(content["root"], str | None):
                raise ValueError("root is no text")
            manifest = cls(shards=shards, pending=pending, **content)
            if manifest.content not in ("clips", *ENCODED) or not isinstance(manifest.encoding, dict):
                raise ValueError(f"it holds {manifest.content!r}")
            whole = written == manifest.to_bytes()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{name}: not a manifest of shards ({error}); name another folder or pack again.") from None
        if not whole:
            raise UserError(f"{name}: is not as it was written (SHA-256 differs); restore it, or pack again.")
        return manifest

    def refuse_others(self, folder: Path) -> None:
        """Raise UserError if the shards were made by others: they are read, and never changed or added to."""
        if self.root is not None:
            raise UserError(
                f"{folder}: holds the index of shards that others made, which are never changed; name another folder."
            )

    def shard_path(self, folder: Place, entry: ShardEntry) -> Place:
        """Where a shard lies whose manifest is in a folder."""
        return (folder if self.root in (None, ".") else folder / self.root) / entry.path

    def save(self, folder: Path) -> None:
        """Replace FOLDER/manifest.json atomically; when this returns it is on the disk."""
        replace_file(folder / MANIFEST, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's content, which ends in the SHA-256 of the rest."""
        content = {"schema_version": self.schema_version, "splits": self.splits} | asdict(self)
        content["sha256"] = hashlib.sha256(to_json(content)).hexdigest()
        return json.dumps(content, indent=1).encode() + b"\n"


def _faulty_manifest(content: bytes) -> str:
    try:
        Manifest.parse(content, "the server's answer")
    except UserError as error:
        return str(error)
    return ""


def is_inside(name: str, suffix: str) -> bool:
    """Whether a manifest's name of a file cannot lead out of its folder."""
    path = PurePosixPath(name)
    inside = name.isprintable() and str(path) == name and not path.is_absolute() and ".." not in path.parts
    return inside and name.endswith(suffix)


def to_json(content: Mapping[str, Any]) -> bytes:
    """The one way in which content becomes JSON in a shard: the same content gives the same bytes."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
