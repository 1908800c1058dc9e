"""`sora-data verify`: is every byte of a data set as it was written, and does every clip decode to what is promised?"""

import hashlib
import tarfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load
from tqdm import tqdm

from data_tools.locations import printable
from data_tools.pool import Rows, Task, beat, run_tasks
from sora_lite.data.index import read_index
from sora_lite.data.manifest import ENCODED, Manifest, ShardEntry
from sora_lite.data.shards import NO_LABEL, DamagedSample, ShardReader, captions_of, check_key
from sora_lite.data.video import BadVideo, probe, shown_size
from sora_lite.errors import UserError


def verify(folder: Path, workers: int | None = None) -> None:
    """Check all shards of a data set and print what was found. Raises UserError if anything is wrong."""
    manifest = Manifest.load(folder)
    if manifest.pending and not manifest.shards:
        raise UserError(f"{folder}: packing was interrupted; `sora-data run` with the same arguments finishes it.")
    problems: list[str] = []
    keys: Counter[str] = Counter()
    sources: dict[str, set[str]] = {}
    tasks: list[tuple[str, Task]] = []
    for entry in manifest.shards:
        try:
            index = read_index(folder, manifest, entry)
        except UserError as error:
            problems.append(str(error))
            continue
        keys.update(index["key"].to_pylist())
        if manifest.content == "clips":
            sources.setdefault(entry.split, set()).update(index["source"].to_pylist())
        tasks.append((entry.path, {"folder": str(folder), "root": manifest.root, "entry": asdict(entry)}))
    problems += [f"key {key} stands in the index {count} times" for key, count in keys.items() if count > 1]
    for source in sorted(sources.get("train", set()) & sources.get("validation", set())):
        problems.append(f"source {source} is in both train and validation")
    clips = sum(manifest.splits.values())
    with tqdm(total=clips, desc="verify", unit="clip", mininterval=0.5) as bar:
        for outcome in run_tasks(check_shard, tasks, workers=workers, stall_seconds=60.0, memory_mb=4096):
            found = [outcome.reason] if outcome.reason else [row["fault"] for row in outcome.rows]
            problems += [f"{outcome.unit}: {fault}" for fault in found]
            bar.update(next(entry.samples for entry in manifest.shards if entry.path == outcome.unit))
    print(f"{folder}: {len(manifest.shards)} shards, {clips} clips")
    for problem in sorted(problems):
        print(printable(problem))  # keys and names of members are whatever somebody wrote
    if problems:
        again = "pack again" if manifest.root is None else "index them again with `sora-data index`"
        raise UserError(f"{folder}: {len(problems)} faults (listed above); restore these shards or {again}.")


def check_shard(task: Task) -> Rows:
    """All faults of one shard, in words. Nothing of it is written anywhere, whatever its members are called."""
    folder, entry = Path(task["folder"]), ShardEntry(**task["entry"])
    manifest = Manifest(config_hash="", root=task["root"])
    path, faults, of_others = manifest.shard_path(folder, entry), [], manifest.root is not None
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            faults.append("SHA-256 differs from the manifest's")
    rows = read_index(folder, manifest, entry).to_pylist()
    parts = [(row, *part) for row in rows for part in ((row["ext"], "media"), ("json", "json"), ("txt", "text"))]
    expected = [
        (None if of_others else f"{row['key']}.{ext}", row[f"{what}_offset"], row[f"{what}_size"], True)
        for row, ext, what in parts
        if row[f"{what}_size"]
    ]
    members, damage = [], ""
    try:
        with tarfile.open(path, "r:") as tar:
            for one in tar:
                members.append((None if of_others else one.name, one.offset_data, one.size, one.isreg()))
    except tarfile.TarError as error:
        damage = f"not a tar ({error})"
    if of_others:  # what cannot be read behind its last member was left out when it was indexed
        if not set(expected) <= set(members):
            faults.append(damage or "its members are not those of the index")
    elif damage or expected != members:
        faults.append(damage or "its members are not those of the index")
    with ShardReader(path) as reader:
        for row in rows:
            beat()
            if fault := _check_sample(reader, row, of_others=of_others):
                faults.append(f"{row['key']}: {fault}")
    return [{"fault": fault} for fault in faults]


def _check_sample(reader: ShardReader, row: dict[str, Any], *, of_others: bool) -> str:
    """What is wrong with a sample, or nothing."""
    try:
        captions_of(reader, row)
        if row["ext"] in ENCODED.values():
            load(reader.read(row["media_offset"], row["media_size"], row["crc32c"]))
            return ""
        facts = probe(reader.read(row["media_offset"], row["media_size"], row["crc32c"]), beat=beat)
        if of_others:
            found = (facts.frames, *shown_size(facts))
            return "" if found == (row["frames"], row["height"], row["width"]) else f"decodes to {found}"
        check_key(row["key"])
        meta = reader.read_json(row["json_offset"], row["json_size"], row["json_crc32c"])
        promised = (meta["frames"], meta["height"], meta["width"], 3), meta["fps"], meta["source"]["sha256"][:16]
        label = meta.get("label", NO_LABEL)
    except (KeyError, TypeError) as error:
        return f"its JSON lacks what it must hold ({type(error).__name__}: {error})"
    except (DamagedSample, BadVideo, SafetensorError, ValueError, OSError, OverflowError) as error:
        return str(error)
    shape = (row["frames"], row["height"], row["width"], 3)
    if (facts.frames, facts.height, facts.width, 3) != shape:
        return f"decodes to {(facts.frames, facts.height, facts.width, 3)}, the index says {shape}"
    same = promised == (shape, row["fps"], row["source"]) and label == row["label"]
    return "" if same else "its JSON and the index differ"
