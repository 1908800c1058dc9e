"""Shards that mean harm, as somebody else may have written them."""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq
from hostile_files import FRAMES, HEIGHT, WIDTH

from sora_lite.data.manifest import Manifest, ShardEntry
from sora_lite.data.shards import INDEX_SCHEMA


@dataclass(kw_only=True)
class Shards:
    """A folder of shards as somebody else may have written it: every checksum is right, whatever the rest is."""

    members: list[tuple[tarfile.TarInfo, bytes]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the index; without offsets, which `write` fills in where they are missing."""
    split: str = "train"
    name: str = "train-000000"
    removed: list[str] = field(default_factory=list)

    def add(self, key: str, media: bytes, *, ext: str = "mp4", kind: bytes = tarfile.REGTYPE, **meta: Any) -> None:
        """A sample. kind: of its media member, which is a link to /etc/hostname if it is not a file."""
        source = {"sha256": f"{len(self.rows):064x}"}
        facts = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 25.0}
        note = json.dumps({"source": source, **facts, **meta}).encode()
        for suffix, content in ((ext, media), ("json", note)):
            member = tarfile.TarInfo(f"{key}.{suffix}")
            if suffix == ext and kind != tarfile.REGTYPE:
                member.type, member.linkname, content = kind, "/etc/hostname", b""
            member.size = len(content)
            self.members.append((member, content))
        self.rows.append({"key": key, "ext": ext, **facts, "source": source["sha256"][:16]})

    def write(self, folder: Path) -> None:
        """Write the tar, its index and the manifest."""
        folder.mkdir(parents=True)
        out, places = io.BytesIO(), []
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for member, content in self.members:
                tar.addfile(member, io.BytesIO(content))
                places.append((out.tell() - len(content) - -len(content) % 512, content))
        for i, row in enumerate(self.rows):
            words = {"text_offset": 0, "text_size": 0, "text_crc32c": 0, "label": -1}
            self.rows[i] = row = words | row
            for what, crc, place in (("media", "crc32c", 2 * i), ("json", "json_crc32c", 2 * i + 1)):
                offset, content = places[place]
                found = {f"{what}_offset": offset, f"{what}_size": len(content), crc: google_crc32c.value(content)}
                self.rows[i] = row = found | row
        index = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self.rows, schema=INDEX_SCHEMA), index)
        manifest = Manifest(config_hash="", removed_keys=self.removed)
        names = {"path": f"{self.name}.tar", "index": f"{self.name}.idx.parquet"}
        checks = {}
        for what, content in (("path", out.getvalue()), ("index", index.getvalue().to_pybytes())):
            checks[what] = hashlib.sha256(content).hexdigest()
            if "/" not in self.name:
                (folder / names[what]).write_bytes(content)
        manifest.shards.append(
            ShardEntry(
                **names,
                bytes=len(out.getvalue()),
                sha256=checks["path"],
                samples=len(self.rows),
                split=self.split,
                index_sha256=checks["index"],
            )
        )
        manifest.save(folder)
