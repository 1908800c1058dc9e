"""Encode the clips of a plan, and put them into shards in its order.

Workers encode stretches of clips, in any order, into parts: small tars under the work folder, each whole or absent.
Shards take the clips from there in the order of the plan. So the shards are the same bytes whoever encodes, and a kill
costs no more than the stretches that were being encoded.
"""

import hashlib
import io
import tarfile
from collections.abc import Generator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
from tqdm import tqdm

from data_tools.config import DataConfig, Executor
from data_tools.locations import open_source
from data_tools.plan import Plan, Rows, clip_size, crop_box, cropped, meta, quarantine
from data_tools.pool import Rows as WorkRows
from data_tools.pool import Task, beat
from data_tools.split import Clip, picks_of, stretch_task, stretches
from data_tools.state import Table, Unit, outcomes, rows_of
from sora_lite.data.files import replace_file
from sora_lite.data.index import read_index
from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import Sample, ShardWriter
from sora_lite.data.video import Box, Limits, cut_clips
from sora_lite.errors import UserError

PARTS = "parts"


def units(clips: list[Clip], scores: Rows, parts: Path, config: DataConfig) -> list[Unit]:
    """The work of encoding clips; those of a stretch that share a crop box go together."""
    found = []
    for stretch in stretches(clips):
        boxes: dict[Box | None, list[Clip]] = {}
        for clip in stretch:
            box = crop_box(scores[clip.key], clip.media, config)
            boxes.setdefault(box, []).append(clip)
        for box, alike in boxes.items():
            media = alike[0].media
            keys = [clip.key for clip in alike]
            name = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:32]
            task = {
                **stretch_task(alike),
                "out": str(parts / f"{name}.tar"),
                "crop": box and asdict(box),
                "size": clip_size(media, cropped(scores[keys[0]], media, config), config),
                "crf": config.pack.crf,
                "preset": config.pack.preset,
                "ext": "png" if media.still else "mp4",
            }
            found.append(Unit(keys=keys, task=task))
    return found


def work(task: Task) -> WorkRows:
    """Decode a stretch of a source once, and write its encoded clips into a part."""
    facts, picks = picks_of(task)
    part = io.BytesIO()
    with (
        open_source(task["location"]) as file,
        tarfile.open(fileobj=part, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        encoded = cut_clips(
            file,
            pts=facts.pts,
            clips=picks,
            size=tuple(task["size"]),
            crop=task["crop"] and Box(**task["crop"]),
            fps=Fraction(task["fps"]),
            crf=task["crf"],
            preset=task["preset"],
            limits=Limits(**task["limits"]),
            beat=beat,
        )
        for clip, media in zip(task["clips"], encoded, strict=True):
            member = tarfile.TarInfo(f"{clip['key']}.{task['ext']}")
            member.size, member.uname = len(media), f"{google_crc32c.value(media):08x}"
            tar.addfile(member, io.BytesIO(media))
    try:
        replace_file(Path(task["out"]), part.getvalue())
    except OSError as error:  # no fault of the source
        raise UserError(f"{task['out']}: cannot be written ({error.strerror}); mend that and call again.") from None
    return []  # the part says it all


class Place(NamedTuple):
    """Where an encoded clip lies."""

    part: Path
    ext: str
    offset: int
    size: int
    crc32c: int


class Parts:
    """Encoded clips that are in no shard yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Place] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.partial"):
            leftover.unlink()
        for path in folder.glob("*.tar"):
            self.take(path)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def take(self, path: Path) -> None:
        """Know what is in a part. One that is damaged is dropped, and its clips are encoded again."""
        found: dict[str, Place] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    key, _, ext = member.name.rpartition(".")
                    # the owner's name, of no use in a part, holds the checksum
                    found[key] = Place(path, ext, member.offset_data, member.size, int(member.uname, 16))
        except (tarfile.TarError, ValueError):
            path.unlink()
        else:
            self.places |= found

    def read(self, key: str) -> tuple[str, bytes]:
        """Extension and content of a clip. Raises UserError if it is not what was written."""
        place = self.places[key]
        with place.part.open("rb") as file:
            file.seek(place.offset)
            media = file.read(place.size)
        if google_crc32c.value(media) != place.crc32c:
            raise UserError(f"{place.part}: is damaged at {key}; remove it, and its clips are encoded again.")
        return place.ext, media

    def drop(self, keys: list[str]) -> None:
        """Delete the parts of which nothing else is left."""
        paths = {self.places.pop(key).part for key in keys}
        for path in paths - {place.part for place in self.places.values()}:
            path.unlink()


def pack(
    plan: Plan,
    captions: dict[str, list[str]],
    folder: Path,
    manifest: Manifest,
    table: Table,
    config: DataConfig,
) -> None:
    """Encode and write what is planned and in no shard yet, committing each shard, as pending, as it fills up."""
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    parts = Parts(table.folder / PARTS)
    failed = {key: row["reason"] for key, row in table.read().items() if row["reason"]}
    _reconsider(manifest, plan, folder)
    shards = _Shards(folder, manifest, parts, config)
    parts.drop([key for key in parts.places if key in shards.committed])
    clips = [clip for clip in plan.left() if clip.key not in shards.committed]
    missing = [clip for clip in clips if clip.key not in failed and clip.key not in parts]
    todo = units(missing, plan.scores, parts.folder, config)
    with tqdm(total=len(missing), desc="pack", unit="clip", mininterval=0.5) as bar:
        if config.executor is Executor.slurm and todo:
            from data_tools.slurm import run_array

            run_array(table, "encode", todo, config, bar.update)
            failed |= {key: row["reason"] for key, row in table.read().items() if row["reason"]}
            for path in parts.folder.glob("*.tar"):
                parts.take(path)
            todo = []
        encoded = _encoded(todo, parts, table, failed, config, bar)
        try:
            for clip in clips:
                while clip.key not in parts and clip.key not in failed:
                    if next(encoded, None) is None:
                        raise RuntimeError(f"{clip.key} was encoded and is in no part")
                if clip.key in failed:
                    continue
                ext, media = parts.read(clip.key)
                content = meta(clip, plan.scores[clip.key], captions.get(clip.key, []), config, manifest.config_hash)
                shards.add(Sample(key=clip.key, ext=ext, media=media, meta=content), plan.splits[clip.media.sha256])
            shards.commit_all()
        finally:
            encoded.close()
            shards.discard()
    quarantine(plan, table.read(), "encode")
    packed = {key for entry in manifest.pending for key in read_index(folder, manifest, entry)["key"].to_pylist()}
    if packed != {clip.key for clip in plan.left()}:
        raise RuntimeError(f"{folder}: what was packed is not what was planned")


def _reconsider(manifest: Manifest, plan: Plan, folder: Path) -> None:
    """Give up pending shards that hold what the plan has elsewhere or nowhere: sources changed since they were made."""
    wanted = {clip.key: plan.splits[clip.media.sha256] for clip in plan.left()}
    for entry in manifest.pending:
        if any(wanted.get(key) != entry.split for key in read_index(folder, manifest, entry)["key"].to_pylist()):
            manifest.pending = []
            manifest.save(folder)
            return


def _encoded(
    todo: list[Unit], parts: Parts, table: Table, failed: dict[str, str], config: DataConfig, bar: Any
) -> Generator[Unit, None, None]:
    """Encode units; each is yielded when its part, or the reason why there is none, is known."""
    for unit, outcome in outcomes(work, todo, config):
        bar.update(len(unit.keys))
        if outcome.reason:
            table.append(rows_of(outcome, unit))
            failed |= dict.fromkeys(unit.keys, outcome.reason)
        else:
            parts.take(Path(unit.task["out"]))
        yield unit


class _Shards:
    """The open shard of each split."""

    def __init__(self, folder: Path, manifest: Manifest, parts: Parts, config: DataConfig) -> None:
        self.folder, self.manifest, self.parts = folder, manifest, parts
        self.limit = config.pack.shard_mb * 2**20
        self.writers: dict[str, ShardWriter] = {}
        self.committed = {
            key for one in manifest.pending for key in read_index(folder, manifest, one)["key"].to_pylist()
        }

    def add(self, sample: Sample, split: str) -> None:
        """Append a clip to the shard of its split, which is closed before it grows too large."""
        if split in self.writers and self.writers[split].bytes + len(sample.media) > self.limit:
            self._commit(split)
        if split not in self.writers:
            entries = [*self.manifest.shards, *self.manifest.pending]
            number = 1 + max((int(one.path.partition("-")[2][:6]) for one in entries if one.split == split), default=-1)
            self.writers[split] = ShardWriter(self.folder / f"{split}-{number:06d}.tar", split)
        self.writers[split].add(sample)

    def commit_all(self) -> None:
        """Close what is open."""
        for split in sorted(self.writers):
            self._commit(split)

    def discard(self) -> None:
        """Drop what is open: its clips are still in their parts."""
        for writer in self.writers.values():
            writer.discard()

    def _commit(self, split: str) -> None:
        writer = self.writers.pop(split)
        self.manifest.pending.append(writer.close())
        self.manifest.save(self.folder)
        self.parts.drop([key for key in writer.keys if key in self.parts])
