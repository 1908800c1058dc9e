"""What the stages found, as Parquet tables in the work folder, and the one way in which a stage's missing work is done.

    SHARDS/.work/settings.json      the settings in force
    SHARDS/.work/sources.parquet    the list of sources
    WORK/STAGE/HASH/*.parquet       rows with a key and, where there is nothing else to say, a reason
    WORK/encode/HASH/parts/*.tar    encoded clips that are in no shard yet

HASH is that of the stage's settings and of the stages that it builds on, so other settings never meet old rows, and
returning to earlier settings finds their rows again. Every file appears whole or not at all.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_tools.config import DataConfig, Executor, WorkConfig, digest, plain
from data_tools.pool import Function, Outcome, Rows, Task, run_tasks
from sora_lite.data.files import replace_file
from sora_lite.errors import UserError

PARENTS = {"probe": None, "split": "probe", "score": "split", "caption": "split", "encode": "score"}
"""Stages that keep what they found, each with the one whose results it uses."""

VERSIONS = {"probe": 1, "split": 1, "score": 1, "caption": 1, "encode": 1}
"""Raised when a stage's results change with the same settings."""

ENCODE_SETTINGS = ("max_side", "crop", "crf", "preset")
SHOT_SETTINGS = ("detector", "weights")


def stage_hash(config: DataConfig, stage: str) -> str:
    """16 hex digits that stand for everything in the settings that a stage's rows depend on."""
    settings = plain(config)
    own = {
        "split": {name: settings["split"][name] for name in SHOT_SETTINGS},
        "encode": {name: settings["pack"][name] for name in ENCODE_SETTINGS},
    }.get(stage) or settings[stage]
    # a clip's key does not say at which rate its frames were taken
    tiling = {"score": settings["split"]["fps"], "caption": settings["split"]["fps"], "encode": settings["split"]}
    parent = PARENTS[stage]
    return digest([stage, VERSIONS[stage], own, tiling.get(stage), parent and stage_hash(config, parent)])[:16]


@dataclass(kw_only=True, slots=True)
class Unit:
    """What a worker does at a time: a task that gives at least one row for each of its keys."""

    keys: list[str]
    task: Task


class Table:
    """Rows of one stage, by key. Columns: those of `schema`, after `key` and `reason` (empty where all is well)."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = pa.schema([("key", pa.string()), ("reason", pa.string()), *schema])
        self._written = 0
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, dict[str, Any]]:
        """key -> row, of all parts."""
        rows: dict[str, dict[str, Any]] = {}
        for path in self._parts():
            rows.update((row["key"], row) for row in _read(path, self.schema).to_pylist())
        return rows

    def keys(self) -> set[str]:
        """All keys that have a row."""
        return {key for path in self._parts() for key in _read(path, self.schema, ["key"])["key"].to_pylist()}

    def append(self, rows: Rows) -> None:
        """Add rows, on the disk when this returns."""
        if not rows:
            return
        name = f"{time.time_ns()}-{os.uname().nodename}-{os.getpid()}-{self._written}.parquet"
        self._written += 1
        write_table(self.folder / name, pa.Table.from_pylist(rows, schema=self.schema))

    def forget(self, keys: set[str]) -> None:
        """Drop the rows of these keys, so that their work is done again."""
        for path in self._parts():
            rows = _read(path, self.schema).to_pylist()
            kept = [row for row in rows if row["key"] not in keys]
            if not kept:
                path.unlink()
            elif len(kept) < len(rows):
                write_table(path, pa.Table.from_pylist(kept, schema=self.schema))

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))


def rows_of(outcome: Outcome, unit: Unit) -> Rows:
    """An outcome as rows of a table: one with the reason for each key of a unit that failed."""
    if outcome.reason:
        return [{"key": key, "reason": outcome.reason} for key in unit.keys]
    return [{"reason": "", **row} for row in outcome.rows]


def complete(table: Table, stage: str, function: Function, units: list[Unit], config: WorkConfig, what: str) -> None:
    """Do the work of all keys that have no row in the table yet. what: the word for a key, under the bar.

    Raises UserError if somebody has to mend something before it can be done.
    """
    done = table.keys()
    missing = [unit for unit in units if not done.issuperset(unit.keys)]
    total = sum(len(unit.keys) for unit in missing)
    if not missing:
        return
    with tqdm(total=total, desc=stage, unit=what, mininterval=0.5) as bar:
        if config.executor is Executor.slurm:
            from data_tools.slurm import run_array

            run_array(table, stage, missing, config, bar.update)
        else:
            work(table, function, missing, config, bar.update)


def work(
    table: Table,
    function: Function,
    units: list[Unit],
    config: WorkConfig,
    progress: Callable[[int], object],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Do units in processes of this machine and write their rows, every few seconds and at the end, come what may.

    stopped: asked before each unit; once it says so no further unit begins.
    """
    seconds, share = (0.0, 0.0) if config.costly_units else (2.0, 0.05)
    buffer: Rows = []
    begun = written = time.monotonic()
    try:
        for unit, outcome in outcomes(function, units, config, stopped):
            buffer += rows_of(outcome, unit)
            progress(len(unit.keys))
            # at most a twentieth of the work is lost to a kill, and the number of parts grows with the logarithm
            if time.monotonic() - written > max(seconds, share * (written - begun)):
                table.append(buffer)
                buffer, written = [], time.monotonic()
    finally:
        table.append(buffer)


def outcomes(
    function: Function, units: list[Unit], config: WorkConfig, stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Unit, Outcome]]:
    """Units with what became of them, as they finish, in processes of this machine."""

    def tasks() -> Iterator[tuple[str, Task]]:
        for i, unit in enumerate(units):
            if stopped():
                return
            yield str(i), unit.task

    for outcome in run_tasks(
        function,
        tasks(),
        workers=0 if config.workers == 0 else min(config.workers or os.cpu_count() or 1, len(units)),
        stall_seconds=config.stall_seconds,
        memory_mb=config.memory_mb,
    ):
        yield units[int(outcome.unit)], outcome


def _read(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    return read_table(path, schema, "remove it, and its work is done again", columns)


def read_table(path: Path, schema: pa.Schema, cure: str, columns: list[str] | None = None) -> pa.Table:
    """A table that `write_table` wrote. Raises UserError, with the cure, if it is damaged or holds other columns."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(schema):
                raise ValueError("its columns are others")
            return file.read(columns=columns)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).partition(chr(10))[0]}); {cure}.") from None


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table so that it appears whole or not at all, and damage shows."""
    content = pa.BufferOutputStream()
    pq.write_table(table, content, compression="zstd", write_page_checksum=True)
    replace_file(path, content.getvalue().to_pybytes())
