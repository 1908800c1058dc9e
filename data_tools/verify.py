"""`sora-data verify`: is every byte of a data set as it was written, and does every clip decode to what is promised?"""

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.pool import ordered_map
from sora_lite.data.index import Index
from sora_lite.data.shards import DamagedSample, Manifest, ShardEntry, ShardReader
from sora_lite.data.video import BadVideo, decode_clip
from sora_lite.errors import UserError


@dataclass(kw_only=True, slots=True)
class Shard:
    """One shard to be checked: what a worker does at a time."""

    folder: Path
    entry: ShardEntry
    rows: Index
    """All samples of the split."""
    number: int
    """Place of this shard in `rows.shard_paths`."""


def verify(folder: Path, workers: int | None = None) -> None:
    """Check all shards of a data set and print what was found. Raises UserError if anything is wrong."""
    manifest = Manifest.load(folder)
    problems: list[str] = []
    shards, sources = [], {}
    for split in manifest.splits:
        index = Index.load(folder, split)
        sources[split] = set(index.source.tolist())
        entries = [entry for entry in manifest.shards if entry.split == split]
        shards += [Shard(folder=folder, entry=entry, rows=index, number=i) for i, entry in enumerate(entries)]
    for source in sorted(sources.get("train", set()) & sources.get("validation", set())):
        problems.append(f"source {source} is in both train and validation")
    with tqdm(total=sum(manifest.splits.values()), desc="verify", unit="clip", mininterval=0.5) as bar:
        for shard, found in zip(shards, ordered_map(check_shard, shards, workers), strict=True):
            problems += found
            bar.update(shard.entry.samples)
    print("\n".join([f"{folder}: {len(shards)} shards, {sum(manifest.splits.values())} clips", *problems]))
    if problems:
        raise UserError(f"{folder}: {len(problems)} faults (listed above); restore these shards or pack again.")


def check_shard(shard: Shard) -> list[str]:
    """All faults of one shard, in words."""
    path, rows, problems = shard.folder / shard.entry.path, shard.rows, []
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.entry.sha256:
            problems.append(f"{path.name}: SHA-256 differs from the manifest's")
    mine = np.flatnonzero(rows.shard == shard.number)
    expected = [
        member
        for i in mine
        for member in (
            (f"{rows.keys[i]}.{rows.ext[i]}", int(rows.media_offset[i]), int(rows.media_size[i])),
            (f"{rows.keys[i]}.json", int(rows.json_offset[i]), int(rows.json_size[i])),
        )
    ]
    try:
        with tarfile.open(path, "r:") as tar:
            if [(member.name, member.offset_data, member.size) for member in tar] != expected:
                problems.append(f"{path.name}: its members are not those of the index")
    except tarfile.TarError as error:
        problems.append(f"{path.name}: not a tar ({error})")
    with ShardReader(path) as reader:
        for i in mine:
            if fault := _check_sample(reader, rows, int(i)):
                problems.append(f"{path.name}: {rows.keys[i]}: {fault}")
    return problems


def _check_sample(reader: ShardReader, rows: Index, i: int) -> str:
    """What is wrong with a sample, or nothing."""
    try:
        media = reader.read(int(rows.media_offset[i]), int(rows.media_size[i]), int(rows.crc32c[i]))
        meta = json.loads(reader.read(int(rows.json_offset[i]), int(rows.json_size[i]), int(rows.json_crc32c[i])))
        frames = decode_clip(media, frames=int(rows.frames[i]))
    except (DamagedSample, BadVideo, ValueError) as error:
        return str(error)
    shape = (int(rows.frames[i]), int(rows.height[i]), int(rows.width[i]), 3)
    if frames.shape != shape:
        return f"decodes to {frames.shape}, the index says {shape}"
    promised = (meta["frames"], meta["height"], meta["width"], 3), meta["fps"], meta["source"]["sha256"][:16]
    if promised != (shape, float(rows.fps[i]), str(rows.source[i])):
        return "its JSON and the index differ"
    try:
        decode_clip(media, frames=shape[0] + 1)
    except BadVideo:
        return ""
    return f"holds more than the promised {shape[0]} frames"
