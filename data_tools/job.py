"""One data set in the making: its folder, its settings, and its stages, each of which goes on where it stopped."""

import fcntl
import json
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from tqdm import tqdm

from data_tools import look, pack, probe, split
from data_tools import plan as planning
from data_tools.compose import parse
from data_tools.config import CaptionConfig, CaptionSource, DataConfig, plain
from data_tools.plan import Packed, Plan, Rows
from data_tools.pool import Function
from data_tools.sources import SOURCES_SCHEMA, Source
from data_tools.state import Table, Unit, complete, read_table, stage_hash, write_table
from sora_lite.data.files import replace_file
from sora_lite.data.index import Index
from sora_lite.data.manifest import MANIFEST, Manifest
from sora_lite.data.shards import DamagedSample, ShardReader
from sora_lite.errors import UserError

STAGES = ("probe", "split", "score", "filter", "dedupe", "caption", "pack")
"""All stages, in their order. filter and dedupe are arithmetic on what the others found, and keep no rows."""

SCHEMAS: dict[str, pa.Schema] = {
    "probe": probe.SCHEMA,
    "split": split.SCHEMA,
    "score": look.SCORE_SCHEMA,
    "caption": look.CAPTION_SCHEMA,
    "encode": pa.schema([]),
}
FUNCTIONS: dict[str, Function] = {
    "probe": probe.work,
    "split": split.work,
    "score": look.score_work,
    "caption": look.caption_work,
    "encode": pack.work,
}
"""What a worker does for a stage."""


class Job:
    """A folder of shards, the work folder that goes with it, and the settings."""

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self.folder, self.config = folder, config
        self.own = folder / ".work"
        """What is of this folder alone: settings, sources."""
        self.work = (Path(config.work) if config.work else self.own).absolute()

    @classmethod
    def resume(cls, folder: Path, overrides: list[str]) -> Self:
        """With the settings that an earlier call left, changed by `overrides`. Raises UserError if there are none."""
        path = folder / ".work" / "settings.json"
        try:
            saved = json.loads(path.read_bytes())
            if not isinstance(saved, dict):
                raise ValueError("it holds no settings")
            parse(DataConfig, [], base=saved)
        except FileNotFoundError:
            raise UserError(
                f"{path}: not found; begin with `sora-data run VIDEOS {folder}` or `sora-data probe VIDEOS {folder}`."
            ) from None
        except (ValueError, TypeError, RecursionError, UserError) as error:
            what = str(error).partition("\n")[0]
            raise UserError(f"{path}: is damaged ({what}); remove it and begin with `sora-data probe`.") from None
        # Shards of others may come with settings: what they would have run, or asked, must be said by the caller.
        saved.get("caption", {}).update(command=[], url=CaptionConfig().url, key_env="")
        if saved.get("caption", {}).get("source") == "command" and not any(
            "caption.command" in one for one in overrides
        ):
            raise UserError(f"caption.command: {path} does not say which program may run; give caption.command again.")
        return cls(folder, parse(DataConfig, overrides, base=saved))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep a second call out of all folders."""
        if self.own.is_symlink():
            raise UserError(f"{self.own}: is a link, and files would be written elsewhere; use work=FOLDER instead.")
        with ExitStack() as stack:
            for folder in sorted({path.absolute() for path in (self.folder, self.own, self.work)}):
                stack.enter_context(locked(folder))
            for leftover in self.work.rglob("*.partial"):
                leftover.unlink(missing_ok=True)
            yield

    def save_settings(self) -> None:
        """Leave them for the stages that are called alone."""
        replace_file(self.own / "settings.json", json.dumps(plain(self.config), indent=1).encode() + b"\n")

    def table(self, stage: str) -> Table:
        """The rows of a stage under the present settings."""
        return Table(self.work / stage / stage_hash(self.config, stage), SCHEMAS[stage])

    # ------------------------------------------------------------------------------------------------ stages

    def save_sources(self, sources: list[Source]) -> None:
        """Write them where all stages look for them: `.work/sources.parquet`."""
        table = pa.Table.from_pylist([source.to_row() for source in sources], schema=SOURCES_SCHEMA)
        write_table(self.own / "sources.parquet", table)

    def run(self, upto: str, wanted: Collection[str] = STAGES) -> Plan:
        """Go through the stages as far as `upto`, doing what is missing of those that are wanted; return the plan.

        Raises UserError if one that is not wanted has not finished.
        """
        if upto == "pack":
            self._manifest()  # before hours of work that would be in vain
        packed = self.packed()
        sources = self.sources()
        units = {one.name: probe.probe_unit(one, self.config.probe) for one in sources if not one.reason}
        rows = self._rows("probe", list(units.values()), wanted)
        keys = {name: unit.keys[0] for name, unit in units.items()}
        plan = planning.choose(sources, keys, rows, packed, self.config)
        if upto == "probe":
            return plan
        shots = [split.shots_unit(source, one, self.config.split) for source, one in plan.good]
        planning.cut(plan, self._rows("split", shots, wanted), packed, self.config)
        if upto == "split":
            return plan
        alive = [
            clip for clip in plan.clips if (fate := plan.clip_fates.get(clip.key)) is None or fate.kind == "packed"
        ]
        scores = self._rows("score", list(look.score_units(split.stretches(alive), self.config.score)), wanted)
        if upto == "score":
            return plan
        planning.sieve(plan, scores, self.config)
        if upto == "filter":
            return plan
        planning.thin(plan, packed, self.config)
        if upto == "dedupe":
            for stage in ("caption", "encode"):  # as far as they came in earlier calls
                planning.quarantine(plan, self.table(stage).read(), stage)
            return plan
        captions = self._captions(plan, wanted)
        if upto == "pack":
            self._pack(plan, captions)
        return plan

    def _captions(self, plan: Plan, wanted: Collection[str]) -> dict[str, list[str]]:
        """Key -> captions of the clips that are to be packed; those that cannot be had are quarantined."""
        left = plan.left()
        if self.config.caption.source is CaptionSource.metadata:
            return {clip.key: clip.media.source.row.captions for clip in left}
        done = self.table("caption").keys()
        missing = split.stretches(clip for clip in left if clip.key not in done)
        rows = self._rows("caption", list(look.caption_units(missing, self.config.caption)), wanted)
        planning.quarantine(plan, rows, "caption")
        return {clip.key: rows[clip.key]["captions"] for clip in plan.left()}

    def _pack(self, plan: Plan, captions: dict[str, list[str]]) -> None:
        manifest = self._manifest()
        if plan.left() or manifest.pending:
            pack.pack(plan, captions, self.folder, manifest, self.table("encode"), self.config)
        planning.finish(plan)
        manifest.shards += sorted(manifest.pending, key=lambda entry: entry.path)
        manifest.pending, manifest.counts = [], plan.count()
        if manifest.shards:
            manifest.save(self.folder)

    def packed_anything(self) -> bool:
        """Whether there are finished shards."""
        return (self.folder / MANIFEST).exists() and bool(Manifest.load(self.folder).shards)

    def _manifest(self) -> Manifest:
        """The manifest that an earlier call left, or a new one. Raises UserError if it is one of other settings."""
        if not (self.folder / MANIFEST).exists():
            return Manifest(config_hash=self.config.hash())
        manifest = Manifest.load(self.folder)
        manifest.refuse_others(self.folder)
        if manifest.config_hash != self.config.hash():
            raise UserError(
                f"{self.folder}: holds shards that were made with other settings; give the same settings, or name "
                f"another folder for the shards, with work={self.work} to use again what was found."
            )
        return manifest

    def _rows(self, stage: str, units: list[Unit], wanted: Collection[str]) -> Rows:
        """The rows of a stage, after its missing work is done if it is wanted."""
        table = self.table(stage)
        if stage in wanted:
            complete(
                table, stage, FUNCTIONS[stage], units, self.config, "file" if stage in ("probe", "split") else "clip"
            )
        rows = table.read()
        missing = [key for unit in units for key in unit.keys if key not in rows]
        if missing:
            total = sum(len(unit.keys) for unit in units)
            raise UserError(
                f"{self.folder}: {stage} has not finished ({len(missing)} of {total} are missing); "
                f"`sora-data {stage} {self.folder}` goes on."
            )
        return rows

    # ---------------------------------------------------------------------------------------------- what there is

    def sources(self) -> list[Source]:
        """The list that the last call with VIDEOS made."""
        path = self.own / "sources.parquet"
        if not path.exists():
            raise UserError(f"{path}: not found; begin with `sora-data run VIDEOS {self.folder}`.")
        table = read_table(path, SOURCES_SCHEMA, f"make it anew with `sora-data probe VIDEOS {self.folder}`")
        return [Source.from_row(row) for row in table.to_pylist()]

    def packed(self) -> Packed:
        """What is in finished shards."""
        found = Packed()
        if not (self.folder / MANIFEST).exists():
            return found
        manifest = Manifest.load(self.folder)
        manifest.refuse_others(self.folder)
        found.removed_keys, found.removed_sources = set(manifest.removed_keys), set(manifest.removed_sources)
        found.removed_frames = set(manifest.removed_frames)
        if not manifest.shards:
            return found
        with tqdm(total=sum(manifest.splits.values()), desc="shards so far", unit="clip", mininterval=0.5) as bar:
            for split_name in manifest.splits:
                index = Index.load(self.folder, split_name)
                for number, path in enumerate(index.shard_paths):
                    with index.open_shard(number) as reader:
                        for i in (index.shard == number).nonzero()[0]:
                            meta = self._meta(reader, index, int(i))
                            try:
                                _remember(found, split_name, index.key(int(i)), meta)
                            except (ValueError, KeyError, TypeError, AttributeError) as error:
                                raise UserError(
                                    f"{path}: {index.key(int(i))}.json is none of this program's ({error!r}); "
                                    f"`sora-data verify {self.folder}` lists all that is wrong."
                                ) from None
                            bar.update()
        return found

    def _meta(self, reader: ShardReader, index: Index, i: int) -> dict[str, Any]:
        try:
            return reader.read_json(int(index.json_offset[i]), int(index.json_size[i]), int(index.json_crc32c[i]))
        except DamagedSample as error:
            cure = f"restore this shard (`sora-data verify {self.folder}` lists all that is wrong)"
            raise UserError(f"{self.folder}: {error}; {cure}.") from None


def _remember(found: Packed, split_name: str, key: str, meta: dict[str, Any]) -> None:
    source = meta["source"]["sha256"][:16]
    found.clips[key] = split_name
    found.sources[source] = split_name
    found.frames[meta["source"]["frames_hash"]] = source
    if "group" in meta:
        found.groups[source] = meta["group"]
    found.phashes[key] = [int(text, 16) for text in meta.get("phash", [])]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and keep a second call out of it; the kernel drops the lock with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # never through a link, whose target would be made or emptied
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); name another folder.") from None
    with open(descriptor, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another sora-data is at work in it; wait for its end or stop it.") from None
        yield
