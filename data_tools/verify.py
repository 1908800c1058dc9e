"""`sora-data verify`: is every byte of a data set as it was written, and does every clip decode to what is promised?"""

import hashlib
import tarfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.pool import Rows, Task, beat, run_tasks
from data_tools.sources import printable
from sora_lite.data.index import read_index
from sora_lite.data.shards import DamagedSample, Manifest, ShardEntry, ShardReader, check_key
from sora_lite.data.video import BadVideo, probe
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
            index = read_index(folder, entry)
        except UserError as error:
            problems.append(str(error))
            continue
        keys.update(index["key"].to_pylist())
        sources.setdefault(entry.split, set()).update(index["source"].to_pylist())
        tasks.append((entry.path, {"folder": str(folder), "entry": asdict(entry)}))
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
        raise UserError(f"{folder}: {len(problems)} faults (listed above); restore these shards or pack again.")


def check_shard(task: Task) -> Rows:
    """All faults of one shard, in words. Nothing of it is written anywhere, whatever its members are called."""
    folder, entry = Path(task["folder"]), ShardEntry(**task["entry"])
    path, faults = folder / entry.path, []
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            faults.append("SHA-256 differs from the manifest's")
    rows = read_index(folder, entry).to_pylist()
    expected = [
        member
        for row in rows
        for member in (
            (f"{row['key']}.{row['ext']}", row["media_offset"], row["media_size"], True),
            (f"{row['key']}.json", row["json_offset"], row["json_size"], True),
        )
    ]
    try:
        with tarfile.open(path, "r:") as tar:
            if [(member.name, member.offset_data, member.size, member.isreg()) for member in tar] != expected:
                faults.append("its members are not those of the index")
    except tarfile.TarError as error:
        faults.append(f"not a tar ({error})")
    with ShardReader(path) as reader:
        for row in rows:
            beat()
            if fault := _check_sample(reader, row):
                faults.append(f"{row['key']}: {fault}")
    return [{"fault": fault} for fault in faults]


def _check_sample(reader: ShardReader, row: dict[str, Any]) -> str:
    """What is wrong with a sample, or nothing."""
    try:
        check_key(row["key"])
        media = reader.read(row["media_offset"], row["media_size"], row["crc32c"])
        meta = reader.read_json(row["json_offset"], row["json_size"], row["json_crc32c"])
        facts = probe(media, beat=beat)
        promised = (meta["frames"], meta["height"], meta["width"], 3), meta["fps"], meta["source"]["sha256"][:16]
        captions, label = list(meta.get("captions", [])), meta.get("label", 0)
    except (KeyError, TypeError) as error:
        return f"its JSON lacks what it must hold ({type(error).__name__}: {error})"
    except (DamagedSample, BadVideo, ValueError, OSError, OverflowError) as error:
        return str(error)
    shape = (row["frames"], row["height"], row["width"], 3)
    if (facts.frames, facts.height, facts.width, 3) != shape:
        return f"decodes to {(facts.frames, facts.height, facts.width, 3)}, the index says {shape}"
    if not isinstance(label, int) or not all(isinstance(caption, str) for caption in captions):
        return "its captions are no texts, or its label is no number"
    return "" if promised == (shape, row["fps"], row["source"]) else "its JSON and the index differ"
