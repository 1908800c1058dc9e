"""Take sources or clips out of finished shards: at once for every reader, and later from the disk."""

import shlex
from pathlib import Path

from tqdm import tqdm

from data_tools.locations import printable
from sora_lite.data.files import flush_folder
from sora_lite.data.index import Index, read_index
from sora_lite.data.manifest import Manifest, ShardEntry
from sora_lite.data.shards import DamagedSample, Sample, ShardReader, ShardWriter
from sora_lite.errors import UserError


def remove(folder: Path, names: list[str]) -> None:
    """Put clips (by key) and sources (by the first 16 hex digits of their SHA-256) on the list that readers leave out.

    Later packing leaves them out too. Raises UserError, and changes nothing, if the shards hold no such clip or source.
    """
    manifest = Manifest.load(folder)
    tables = [read_index(folder, manifest, entry) for entry in manifest.shards]
    keys = {key for table in tables for key in table["key"].to_pylist()}
    sources = {source for table in tables for source in table["source"].to_pylist()}
    if unknown := [name for name in names if name not in keys and name not in sources]:
        raise UserError(
            f"{unknown[0]}: {folder} holds no clip and no source of this name; a clip's key is its file's name in the "
            "shard, a source's are the 16 digits that its clips' keys begin with."
        )
    wanted = [name for name in names if name in sources]
    frames = {_frames_hash(folder, manifest, entry, source) for entry in manifest.shards for source in wanted}
    manifest.removed_frames = sorted({*manifest.removed_frames, *(one for one in frames if one)})
    manifest.removed_keys = sorted({*manifest.removed_keys, *(name for name in names if name in keys)})
    manifest.removed_sources = sorted({*manifest.removed_sources, *(name for name in names if name in sources)})
    before = sum(manifest.splits.values())
    manifest.save(folder)
    left = sum(len(Index.load(folder, split)) for split in manifest.splits)
    how = f"`sora-data compact {shlex.quote(str(folder))}` frees their space"
    if manifest.root is not None:
        how = "readers leave them out; the tars themselves stay as they are"
    print(f"{folder}: {before - left} of {before} clips are taken down; {how}")


def _frames_hash(folder: Path, manifest: Manifest, entry: ShardEntry, source: str) -> str:
    """Of a source with a sample in the shard; empty if it has none there."""
    for row in read_index(folder, manifest, entry).to_pylist():
        if row["source"] == source:
            with ShardReader(manifest.shard_path(folder, entry)) as reader:
                try:
                    meta = reader.read_json(row["json_offset"], row["json_size"], row["json_crc32c"])
                    return str(meta["source"].get("frames_hash", ""))
                except (DamagedSample, KeyError, AttributeError):
                    continue  # the next clip of it says the same
    return ""


def compact(folder: Path) -> None:
    """Write the shards that hold samples that were taken down anew, without these, and delete the old ones.

    The manifest names the new shards all at once, so a reader sees the old data set or the new one. The list of what
    was taken down stays, so that it is never packed again.
    """
    manifest = Manifest.load(folder)
    manifest.refuse_others(folder)
    _delete_strangers(folder, manifest)
    fresh: list[ShardEntry] = []
    freed = 0
    gone = {split: set(Index.load(folder, split).removed) for split in manifest.splits}
    for entry in tqdm(manifest.shards, desc="compact", unit="shard", mininterval=0.5):
        if not gone[entry.split].intersection(read_index(folder, manifest, entry)["key"].to_pylist()):
            fresh.append(entry)
            continue
        rewritten = _without(folder, manifest, entry, gone[entry.split])
        freed += entry.bytes - (rewritten.bytes if rewritten else 0)
        fresh += [rewritten] if rewritten else []
    manifest.shards = fresh
    manifest.save(folder)
    _delete_strangers(folder, manifest)
    print(f"{folder}: {freed / 2**20:,.1f} MiB freed; runs that train on it will ask for a new start of their data")


def _without(folder: Path, manifest: Manifest, entry: ShardEntry, gone: set[str]) -> ShardEntry | None:
    """A new shard with the rest of the samples; None if there is none. Raises UserError if one cannot be read."""
    stem, _, edition = entry.path.removesuffix(".tar").partition(".")
    path = folder / f"{stem}.{int(edition or 0) + 1}.tar"
    with ShardReader(folder / entry.path) as reader, ShardWriter(path, entry.split) as writer:
        for row in read_index(folder, manifest, entry).to_pylist():
            if row["key"] in gone:
                continue
            try:
                media = reader.read(row["media_offset"], row["media_size"], row["crc32c"])
                meta = reader.read_json(row["json_offset"], row["json_size"], row["json_crc32c"])
                writer.add(Sample(key=row["key"], ext=row["ext"], media=media, meta=meta))
            except (DamagedSample, ValueError, KeyError, TypeError, OverflowError, OSError) as error:
                raise UserError(
                    f"{reader.path}: {row['key']!r} cannot be copied ({printable(str(error))}); restore this shard "
                    f"(`sora-data verify {folder}` lists all that is wrong)."
                ) from None
    if len(writer):
        return writer.entry
    path.unlink()
    writer.index_path.unlink()
    return None


def _delete_strangers(folder: Path, manifest: Manifest) -> None:
    """Delete shards that the manifest does not name: leftovers of a packing or a compaction that was interrupted."""
    known = {name for entry in [*manifest.shards, *manifest.pending] for name in (entry.path, entry.index)}
    for path in [*folder.glob("*.tar"), *folder.glob("*.idx.parquet"), *folder.glob("*.partial")]:
        if path.name not in known:
            path.unlink()
    flush_folder(folder)
