"""`sora-data index`: shards that others made become trainable by an index beside them; not a byte of them is changed.

A sample is what lies together in a tar under one KEY, a member's name without its last extension: a video or a still,
and, where there are such, KEY.txt (its caption), KEY.json (any fields; `caption` or `captions` are read) and KEY.cls
(its label). Every video is decoded once, each in a worker process, to know its frames, size and rate. Members of other
kinds are never opened. What was found out of a tar is kept, so that a second call goes on where the first one stopped.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from data_tools.config import IndexConfig, digest
from data_tools.job import locked
from data_tools.locations import printable
from data_tools.pool import Outcome, Rows, Task, beat, run_tasks
from sora_lite.data.files import replace_file
from sora_lite.data.manifest import MANIFEST, Manifest, ShardEntry, to_json
from sora_lite.data.shards import INDEX_SCHEMA, MEDIA, NO_LABEL, DamagedSample, ShardReader, captions_of, index_bytes
from sora_lite.data.video import probe, shown_size
from sora_lite.errors import UserError

FORMAT = 1
"""Part of the name of what is kept of a tar: a new number when other things are found in the same bytes."""
FOUND = ".work/index"
LEFT_OUT = "left_out.jsonl"
WORDS = {"json": "json", "txt": "text"}
"""Extension of a member of words: its name in an index."""
LARGEST_WORDS = 16 * 2**20
"""Most bytes of a member of words."""
SHOWN = 10
"""Samples that are left out, and named on the screen; all of them stand in a file."""


@dataclass(kw_only=True, slots=True)
class Tar:
    """What is known of a tar: rows of samples (of INDEX_SCHEMA), and why others are left out, by key or member."""

    name: str
    bytes: int = 0
    sha256: str = ""
    rows: Rows = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    """Members that are of no use here, by extension."""
    missing: int = 0
    """Outcomes that are still to come."""


def index(folder: Path, out: Path, config: IndexConfig) -> None:
    """Write indexes and a manifest for all tars in a folder (and below) into `out`, and print what became of them.

    Raises UserError if there is nothing to train on, or if `out` holds shards that were packed here.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tar") if path.is_file())
    if not names:
        raise UserError(f"{folder}: holds no .tar; name a folder of WebDataset shards.")
    with locked(out):
        earlier = Manifest.load(out) if (out / MANIFEST).exists() else Manifest(config_hash="", root=".")
        if earlier.root is None:
            raise UserError(f"{out}: holds shards that `sora-data run` packed, which have their index already.")
        tars = find(folder, names, out / FOUND, config)
        rename_twins(tars)
        same = os.path.realpath(folder) == os.path.realpath(out)
        content = digest([FORMAT, config.source_field, config.validation_fraction])
        manifest = Manifest(config_hash=content, root="." if same else os.path.realpath(folder))
        for name in ("removed_sources", "removed_frames", "removed_keys"):
            setattr(manifest, name, getattr(earlier, name))
        for tar in tars:
            manifest.shards += write(tar, out, config)
        left = [(tar.name, name, why) for tar in tars for name, why in tar.left_out]
        lines = [to_json({"shard": shard, "name": name, "reason": why}) + b"\n" for shard, name, why in left]
        replace_file(out / LEFT_OUT, b"".join(lines))
        rows = [row for tar in tars for row in tar.rows]
        manifest.counts = {
            "clips": len(rows),
            "clips_captioned": sum(row["captioned"] for row in rows),
            "clips_labelled": sum(row["label"] != NO_LABEL for row in rows),
            "clips_left_out": len(left),
        }
        print("\n".join(summary(tars, manifest, left, out)))
        if not rows:
            raise UserError(f"{folder}: none of its samples can be used; the reasons stand above.")
        manifest.save(out)


def write(tar: Tar, out: Path, config: IndexConfig) -> Iterator[ShardEntry]:
    """Write the index of each split of a tar -> their entries in the manifest."""
    for split in ("train", "validation"):
        rows = [row for row in tar.rows if (split_of(row["source"], config) == split)]
        if not rows:
            continue
        path = out / f"{tar.name.removesuffix('.tar')}.{split}.idx.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = index_bytes(rows)
        replace_file(path, content)
        yield ShardEntry(
            path=tar.name,
            bytes=tar.bytes,
            sha256=tar.sha256,
            samples=len(rows),
            split=split,
            index=str(path.relative_to(out)),
            index_sha256=hashlib.sha256(content).hexdigest(),
        )


def split_of(source: str, config: IndexConfig) -> str:
    """`train` or `validation`, by the source's hash alone."""
    return "validation" if int(source, 16) / 16 ** len(source) < config.validation_fraction else "train"


def rename_twins(tars: list[Tar]) -> None:
    """Put the tar's name before every key that several tars have."""
    keys = pa.chunked_array([pa.array([row["key"] for row in tar.rows], pa.string()) for tar in tars])
    counts = pc.value_counts(keys)
    twins = set(counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist())
    for tar in tars:
        for row in tar.rows if twins else ():
            if row["key"] in twins:
                row["key"] = f"{tar.name.removesuffix('.tar')}/{row['key']}"


def summary(tars: list[Tar], manifest: Manifest, left: list[tuple[str, str, str]], out: Path) -> list[str]:
    """Lines for people."""
    counts = manifest.counts
    sizes = ", ".join(f"{samples:,} {split}" for split, samples in sorted(manifest.splits.items()))
    lines = [
        f"{out}: {counts['clips']:,} samples in {len(manifest.shards)} of {len(tars)} shards ({sizes or 'none'}), "
        f"{counts['clips_captioned']:,} with captions, {counts['clips_labelled']:,} with labels; {len(left):,} left out"
    ]
    for shard, name, why in left[:SHOWN]:
        lines.append(f"  left out: {printable(': '.join(part for part in (shard, name, why) if part))}")
    if len(left) > SHOWN:
        lines.append(f"  ... all of them are in {out / LEFT_OUT}")
    ignored = sum((tar.ignored for tar in tars), Counter())
    for ext, number in sorted(ignored.items()):
        lines.append(printable(f"  never opened: {number:,} members of kind {ext or 'none'}"))
    return lines


# ------------------------------------------------------------------------------------------------------- finding


def find(folder: Path, names: list[str], kept: Path, config: IndexConfig) -> list[Tar]:
    """What is in each tar, from an earlier call or by looking now."""
    tars, places = {}, {}
    todo = []
    for name in names:
        facts = (folder / name).stat()
        mark = digest([FORMAT, name, facts.st_size, facts.st_mtime_ns, config.source_field])
        places[name] = kept / f"{mark}.parquet"
        found = load(places[name], name)
        tars[name] = found or scan(folder, name)
        if found is None:
            todo.append(tars[name])
    tasks = (task for tar in todo for task in tasks_of(tar, folder, config))
    with tqdm(total=sum(len(tar.rows) for tar in todo), desc="index", unit="sample", mininterval=0.5) as bar:
        for outcome in run_tasks(
            look,
            tasks,
            workers=config.workers,
            stall_seconds=config.stall_seconds,
            memory_mb=config.memory_mb,
        ):
            name, number = outcome.unit.rsplit(":", 1)
            take(tars[name], int(number), outcome)
            bar.update(number != "-1")
            if tars[name].missing == 0:
                tars[name].rows = [row for row in tars[name].rows if row.get("frames")]
                save(places[name], tars[name])
    return [tars[name] for name in names]


def tasks_of(tar: Tar, folder: Path, config: IndexConfig) -> Iterator[tuple[str, Task]]:
    """The work on a tar: its checksum, and every sample."""
    path = str(folder / tar.name)
    yield f"{tar.name}:-1", {"path": path}
    for number, row in enumerate(tar.rows):
        yield f"{tar.name}:{number}", {"path": path, "row": row, "source_field": config.source_field}


def take(tar: Tar, number: int, outcome: Outcome) -> None:
    """Note what became of a task."""
    tar.missing -= 1
    if number == -1:
        if outcome.reason:
            raise UserError(f"{tar.name}: cannot be read ({outcome.reason}).")
        tar.sha256 = outcome.rows[0]["sha256"]
    elif outcome.reason:
        tar.left_out.append((tar.rows[number]["key"], outcome.reason))
    else:
        tar.rows[number] = outcome.rows[0]


def scan(folder: Path, name: str) -> Tar:
    """Find the samples of a tar by its headers. Rows know keys and places of members, nothing of what is in them."""
    path = folder / name
    tar = Tar(name=name, bytes=path.stat().st_size)
    groups: list[tuple[str, dict[str, tarfile.TarInfo]]] = []
    faults: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as members:
            for member in members:
                if member.isdir():
                    continue
                key, ext, fault = part_of(member, tar.bytes)
                if ext not in (*MEDIA, *WORDS, "cls"):
                    tar.ignored[ext] += 1
                    continue
                if not groups or groups[-1][0] != key:
                    groups.append((key, {}))
                if ext in groups[-1][1]:
                    fault = fault or f"has two members .{ext}"
                groups[-1][1][ext] = member
                if fault:
                    faults.setdefault(key, fault)
            if not ends(path, members.offset):
                tar.left_out.append(("", "its end is missing: it may be cut off"))
    except (tarfile.TarError, EOFError, ValueError) as error:
        tar.left_out.append(("", f"what follows the last good member cannot be read ({error})"))
    times = Counter(key for key, _ in groups)
    faults |= {key: "its members do not lie together, or another has its key" for key in times if times[key] > 1}
    for key, parts in groups:
        media = next((ext for ext in MEDIA if ext in parts), "")
        if not media:
            faults.setdefault(key, "holds no video or still")
        if key in faults:
            continue
        row: dict[str, Any] = {"key": key, "ext": media, **place("media", parts[media])}
        for ext, what in (*WORDS.items(), ("cls", "cls")):
            row |= place(what, parts.get(ext))
        tar.rows.append(row)
    tar.left_out += faults.items()
    tar.missing = len(tar.rows) + 1
    return tar


def ends(path: Path, offset: int) -> bool:
    """Whether a tar has the mark of its end (a block of zeros) at an offset, which tarfile does not look for."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def part_of(member: tarfile.TarInfo, size: int) -> tuple[str, str, str]:
    """(key, extension in small letters, what is wrong with it or nothing) of a member of a tar of `size` bytes."""
    key, dot, ext = member.name.removeprefix("./").rpartition(".")
    if not dot or "/" in ext:
        return member.name, "", ""
    if not member.isreg() or member.issparse():
        fault = f".{ext} is a link, a device or sparse"
    elif member.offset_data + member.size > size:
        fault = f".{ext} is cut off"
    elif not key.isprintable() or not 1 <= len(key) <= 512:
        fault = "its name is no text of 1 to 512 characters that can be printed"
    else:
        fault = ""
    return key, ext.lower(), fault


def place(what: str, member: tarfile.TarInfo | None) -> dict[str, int]:
    """Columns that say where a member lies; sizes of 0 for one that is not there."""
    offset, size = (member.offset_data, member.size) if member is not None else (0, 0)
    return {f"{what}_offset": offset, f"{what}_size": size}


def look(task: Task) -> Rows:
    """The checksum of a tar or, for one of its samples, the whole row of the index and whether it has a caption."""
    path = Path(task["path"])
    with path.open("rb") as file:
        if "row" not in task:
            digest = hashlib.sha256()
            while chunk := file.read(2**22):
                beat()
                digest.update(chunk)
            return [{"sha256": digest.hexdigest()}]
        row: dict[str, Any] = dict(task["row"])
        contents = {}
        for what in ("media", "json", "text", "cls"):
            if what != "media" and row[f"{what}_size"] > LARGEST_WORDS:
                raise OSError(f"its {what} has more than {LARGEST_WORDS} bytes")
            file.seek(row[f"{what}_offset"])
            contents[what] = file.read(row[f"{what}_size"])
    row["crc32c"] = google_crc32c.value(contents["media"])
    for what in ("json", "text"):
        row[f"{what}_crc32c"] = google_crc32c.value(contents[what]) if contents[what] else 0
    try:
        with ShardReader(path) as reader:
            row["captioned"] = bool(captions_of(reader, row))
        fields = json.loads(contents["json"]) if contents["json"] else {}
    except (DamagedSample, ValueError, RecursionError) as error:
        raise OSError(f"its words cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise OSError("its json is no object")
    source = fields.get(task["source_field"])
    row["source"] = hashlib.sha256(str(source if isinstance(source, str) else row["key"]).encode()).hexdigest()[:16]
    row["label"] = label_of(contents.pop("cls"), fields.get("label"))
    facts = probe(contents["media"], beat=beat)
    row["frames"], (row["height"], row["width"]) = facts.frames, shown_size(facts)
    seconds = float((int(facts.pts[-1]) - int(facts.pts[0])) * facts.time_base)
    # Of a variable rate nobody says how long the last frame is shown: it counts as no time.
    row["fps"] = facts.frames / seconds if facts.variable_rate and seconds > 0 else float(facts.average_rate)
    return [row]


def label_of(content: bytes, named: Any) -> int:
    """The label that KEY.cls holds, else that of the JSON. Raises OSError if it is no whole number from 0 on."""
    if content:
        text = content.decode("ascii", "replace").strip()
        named = int(text) if text.isdecimal() and len(text) < 11 else text
    if named is None:
        return NO_LABEL
    if type(named) is not int or not 0 <= named < 2**31:
        raise OSError(f"its label {named!r} is no whole number from 0 on")
    return named


# ------------------------------------------------------------------------------------------------------- keeping


def save(path: Path, tar: Tar) -> None:
    """Keep what was found in a tar."""
    facts = {"bytes": tar.bytes, "sha256": tar.sha256, "left_out": tar.left_out, "ignored": tar.ignored}
    schema = pa.schema([*INDEX_SCHEMA, ("captioned", pa.bool_())], metadata={"facts": json.dumps(facts)})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(tar.rows, schema=schema), sink, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, sink.getvalue().to_pybytes())


def load(path: Path, name: str) -> Tar | None:
    """What an earlier call found in a tar; None if there is nothing, or if it cannot be read."""
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[b"facts"])
        left_out = [(key, why) for key, why in facts["left_out"]]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
    return Tar(
        name=name,
        bytes=facts["bytes"],
        sha256=facts["sha256"],
        rows=table.to_pylist(),
        left_out=left_out,
        ignored=Counter(facts["ignored"]),
    )
