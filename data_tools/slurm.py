"""The work of a stage as a Slurm job array. Slurm is the engine; what is finished stands in files, as it always does.

    WORK/STAGE/HASH/lists/LIST.parquet    units of work, never changed; row group I is for task I
    WORK/STAGE/HASH/lists/LIST.json       the stage and the settings
    WORK/STAGE/HASH/logs/JOB_I.log        what task I printed

LIST is a hash, and the array bears it in its name: so an array that is still at work is found again in the queue.
Tasks append rows and write parts as local workers do. Two attempts of one task may even overlap (on a node that Slurm
takes for dead): every file appears whole, under a name of its own or with the same content.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_tools import encode
from data_tools import job as stages
from data_tools.compose import parse
from data_tools.config import DataConfig, WorkConfig, plain
from data_tools.pack import PARTS
from data_tools.pool import Rows
from data_tools.state import Table, Unit, work
from sora_lite.cli.compose import assets
from sora_lite.cli.submit import job_command, submit
from sora_lite.data.files import replace_file
from sora_lite.data.manifest import ENCODED
from sora_lite.errors import UserError

FUNCTIONS = stages.FUNCTIONS | dict.fromkeys(ENCODED, encode.work)
SCHEMAS = stages.SCHEMAS | dict.fromkeys(ENCODED, encode.SCHEMA)
SETTINGS: dict[str, type[WorkConfig]] = {
    **dict.fromkeys(stages.FUNCTIONS, DataConfig),
    **dict.fromkeys(ENCODED, encode.EncodeConfig),
}
"""What a task does for a stage, the columns of its rows, and the class of its settings."""

LIST_SCHEMA = pa.schema([("keys", pa.list_(pa.string())), ("task", pa.large_string())])
"""A unit per row; task: JSON in ASCII, since names of files need not be UTF-8."""

NAME = "sora-data-{}"
"""Name of the array that does a list."""

MOST_LOG = 4096
"""Bytes at the end of a log in which an error is looked for."""


# ------------------------------------------------------------------------------------------------------- submitting


def run_array(
    table: Table, stage: str, units: list[Unit], config: WorkConfig, progress: Callable[[int], object]
) -> None:
    """Have units done by a job array, and wait for it; units that an array is at work on already are only waited for.

    progress: called with the number of further keys that are finished.
    Raises UserError if Slurm refuses the array, or if it leaves the queue with units missing.
    """
    arrays = _at_work(table)
    covered = {key for array in arrays for chunk in array.chunks for key in chunk}
    if fresh := [unit for unit in units if not covered.issuperset(unit.keys)]:
        arrays.append(_submit(table, stage, fresh, config))
    jobs = " ".join(array.job for array in arrays)
    wanted = {key for unit in units for key in unit.keys}
    try:
        missing = _wait(arrays, wanted, Finished(table, stage), progress)
    except KeyboardInterrupt:
        _say(f"job {jobs} goes on; the same command waits for it again, and `scancel {jobs}` ends it")
        raise
    if missing:
        raise UserError(
            f"{stage}: job {jobs} has left Slurm's queue with {len(missing)} of {len(wanted)} missing{_error(arrays)}; "
            f"see its logs in {_log_folder(table)}; the same command submits just what is missing."
        )


@dataclass(kw_only=True, slots=True)
class _Array:
    """A job array in the queue."""

    job: str
    chunks: list[list[str]]
    """Keys that each task is to finish."""
    logs: Path
    queue: dict[int, str] | None = None
    """Task -> its state, of those in the queue when it was last seen; None if that is not known."""
    given_up: set[int] = field(default_factory=set)
    """Tasks that left the queue with units missing."""

    def look(self) -> None:
        """Ask Slurm again. Without an answer nothing is known; an array that Slurm has forgotten is gone."""
        answer = _ask("squeue", "--noheader", "--array", f"--jobs={self.job}", "--format=%K %T %r")
        if answer.returncode == 0:
            rows = [line.split(maxsplit=1) for line in answer.stdout.splitlines()]
            self.queue = {int(number): state.replace(" None", "") for number, state in rows}
        else:
            self.queue = {} if "Invalid job id" in answer.stderr else None

    def report(self, finished: set[str]) -> None:
        """Say, once, which tasks have left with units missing."""
        for number, keys in enumerate(self.chunks):
            if self.queue is None or number in self.queue or number in self.given_up:
                continue
            if missing := len(set(keys) - finished):
                self.given_up.add(number)
                what = f"task {number} of job {self.job} has left the queue with {missing} of {len(keys)} missing"
                _say(f"{what}; its log is {self.log(number)}")

    def log(self, number: int) -> Path:
        return self.logs / f"{self.job}_{number}.log"

    def summary(self) -> str:
        """Such as `job 17: 3 RUNNING, 2 PENDING Resources`."""
        if self.queue is None:
            return f"job {self.job}: squeue does not answer"
        states = Counter(self.queue.values())
        return f"job {self.job}: {', '.join(f'{count} {state}' for state, count in states.items()) or 'has ended'}"


def _submit(table: Table, stage: str, units: list[Unit], config: WorkConfig) -> _Array:
    tasks = min(config.slurm.tasks, len(units))
    path, logs = _write_list(table, stage, units, config, tasks), _log_folder(table)
    command = job_command(
        config.slurm,
        NAME.format(path.stem),
        {"array": f"0-{tasks - 1}", "cpus-per-task": config.slurm.cpus_per_task}
        | ({"gpus-per-task": gpus} if (gpus := config.slurm.gpus_per_task) else {}),
        assets("slurm").absolute() / "data.sbatch",
        logs,
        "%A_%a.log",
        ["-m", "data_tools", "work", str(path)],
    )
    job = submit(command, logs)
    _say(f"submitted job {job}: {stage}, {tasks} tasks; logs: {logs}/{job}_*.log")
    return _Array(job=job, chunks=_chunks(path), logs=logs)


def _write_list(table: Table, stage: str, units: list[Unit], config: WorkConfig, tasks: int) -> Path:
    """Every task gets each `tasks`-th unit, so that sources that lie together and are alike are shared out evenly."""
    content = pa.BufferOutputStream()
    with pq.ParquetWriter(content, LIST_SCHEMA, compression="zstd") as writer:
        for number in range(tasks):
            rows = [{"keys": unit.keys, "task": json.dumps(unit.task)} for unit in units[number::tasks]]
            writer.write_table(pa.Table.from_pylist(rows, schema=LIST_SCHEMA), row_group_size=len(rows))
    written = content.getvalue().to_pybytes()
    folder = _list_folder(table)
    folder.mkdir(parents=True, exist_ok=True)
    # the folder is part of the name, since another one may want the same work, and must get its own array
    path = folder / f"{hashlib.sha256(os.fsencode(folder) + written).hexdigest()[:16]}.parquet"
    note = {"stage": stage, "settings": plain(config)}
    replace_file(path, written)
    replace_file(path.with_suffix(".json"), json.dumps(note, indent=1).encode() + b"\n")
    return path


def _at_work(table: Table) -> list[_Array]:
    """The arrays of a table that are in the queue. Lists of others are deleted: what is missing gets a new one."""
    lists = {NAME.format(path.stem): path for path in _list_folder(table).glob("*.json")}
    if not lists:
        return []
    answer = _ask("squeue", "--noheader", f"--name={','.join(lists)}", "--format=%F %j %T")
    if answer.returncode != 0:
        raise UserError(f"squeue does not answer ({answer.stderr.strip()}); try again when Slurm is well.")
    tasks = [line.split() for line in answer.stdout.splitlines()]
    jobs = {name: job for job, name, state in tasks if state != "COMPLETING"}  # which may have been cancelled
    found = []
    for name, path in lists.items():
        listed = path.with_suffix(".parquet")
        if not any(name == other for _, other, _ in tasks):
            path.unlink()
            listed.unlink(missing_ok=True)
        if name not in jobs:
            continue
        found.append(_Array(job=jobs[name], chunks=_chunks(listed), logs=_log_folder(table)))
        _say(f"job {jobs[name]} is at work on this already; waiting for it")
    return found


def _chunks(path: Path) -> list[list[str]]:
    """The keys that each task of a list is to finish."""
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(number, columns=["keys"]) for number in range(file.num_row_groups)]
    return [[key for keys in group["keys"].to_pylist() for key in keys] for group in groups]


def _wait(arrays: list[_Array], wanted: set[str], done: "Finished", progress: Callable[[int], object]) -> set[str]:
    """Wait until everything is finished, or no task is left in the queue; return the keys that are missing."""
    begun = time.monotonic()
    shown, said = 0, set[str]()
    with tqdm(total=0, bar_format="{desc}", position=1, leave=False, disable=None) as line:
        while True:
            for array in arrays:
                array.look()  # before the files, so that what a task did last is seen with its end
            finished = done.update()
            count = len(wanted & finished)
            progress(count - shown)
            shown = count
            if count == len(wanted):
                return set()
            for array in arrays:
                array.report(finished)
            if all(array.queue == {} for array in arrays):
                return wanted - finished
            summary = "; ".join(array.summary() for array in arrays)
            line.set_description_str(summary)
            states = {state for array in arrays for state in (array.queue or {}).values()}
            if line.disable and states != said:  # no terminal: a line when something changes
                _say(summary)
            said = states
            time.sleep(min(10.0, 1.0 + 0.02 * (time.monotonic() - begun)))


def _error(arrays: list[_Array]) -> str:
    """What a task that gave up said last, if it was an error."""
    for array in arrays:
        for number in sorted(array.given_up):
            try:
                text = array.log(number).read_bytes()[-MOST_LOG:].decode(errors="replace")
            except FileNotFoundError:
                continue
            if errors := re.findall(r"^(?:slurmstepd\S*: )?error: (.+)$", text, re.MULTILINE):
                return f" ({errors[-1].rstrip('.')})"
    return ""


def _list_folder(table: Table) -> Path:
    return table.folder.absolute() / "lists"


def _log_folder(table: Table) -> Path:
    return table.folder.absolute() / "logs"


def _say(text: str) -> None:
    """Print a line without breaking the bars."""
    tqdm.write(text, file=sys.stderr)


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """What one of Slurm's commands says. Raises UserError if there is none of this name."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; use a login node of the cluster, or executor=local.") from None


# ---------------------------------------------------------------------------------------------------- what is finished


class Finished:
    """The keys of a stage that are finished, kept up to date by reading only files that are new."""

    def __init__(self, table: Table, stage: str) -> None:
        self.rows, self.parts = table.folder, table.folder / PARTS
        self.encode = stage == "encode"
        self._keys: set[str] = set()
        self._seen: set[str] = set()

    def update(self) -> set[str]:
        """All keys with a row, or for encoded clips, with a reason or a place in a part."""
        for path in self._new(self.rows, ".parquet"):
            try:
                rows = pq.read_table(path, columns=["key", "reason"]).to_pylist()
            except FileNotFoundError:
                continue  # its keys were taken out of quarantine a moment ago
            self._keys.update(row["key"] for row in rows if row["reason"] or not self.encode)
        if self.encode:
            self.parts.mkdir(exist_ok=True)
            for path in self._new(self.parts, ".tar"):
                try:
                    with tarfile.open(path, "r:") as tar:
                        self._keys.update(name.rpartition(".")[0] for name in tar.getnames())
                except (tarfile.TarError, FileNotFoundError):
                    continue  # damaged, or in a shard by now
        return self._keys

    def _new(self, folder: Path, suffix: str) -> list[Path]:
        # A file made here is what lets NFS look at the folder anew, instead of believing what it saw a minute ago.
        with tempfile.TemporaryFile(dir=folder):
            names = {name for name in os.listdir(folder) if name.endswith(suffix)} - self._seen
        self._seen |= names
        return [folder / name for name in names]


# -------------------------------------------------------------------------------------------------- a task of the array


def work_chunk(list_path: Path) -> None:
    """Do the units of one array task that are not finished yet.

    SIGTERM (from preemption or scancel) and SIGUSR2 (shortly before the time limit) end this early: no further unit is
    begun, and if Slurm does not end the job itself, it is put into the queue again.
    Raises UserError outside of an array task, if the list is not there, or if a unit's settings are wrong.
    """
    note, units = _read_chunk(list_path)
    stage = note["stage"]
    here = parse(SETTINGS[stage], ["executor=local"], base=note["settings"])
    # One model on a GPU; a decoder on each core.
    workers = here.slurm.gpus_per_task or int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    config = replace(here, workers=workers)
    table = _Careful(list_path.parent.parent, SCHEMAS[stage], drain := _Drain())
    done = Finished(table, stage)
    todo = _left(units, done)
    print(f"{stage}: {len(todo)} of {len(units)} units are missing; {workers} processes", flush=True)
    if not todo:
        return
    try:
        with drain:
            work(table, FUNCTIONS[stage], todo, config, lambda _: None, drain.asked.is_set)
    except _Late:
        print("what was still at work is left to the next attempt", flush=True)
    left = _left(units, done)
    print(f"{stage}: {len(todo) - len(left)} units done, {len(left)} left", flush=True)
    if left:
        _again(drain, progress=len(left) < len(todo))


def _read_chunk(list_path: Path) -> tuple[dict[str, Any], list[Unit]]:
    """What lies beside the list, and this task's units."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise UserError("SLURM_ARRAY_TASK_ID: not set; `sora-data work` is what Slurm runs as a task of a job array.")
    number = int(os.environ["SLURM_ARRAY_TASK_ID"])
    try:
        note = json.loads(list_path.with_suffix(".json").read_bytes())
        with pq.ParquetFile(list_path) as file:
            if number >= file.num_row_groups:
                raise UserError(
                    f"{list_path}: has work for tasks 0 to {file.num_row_groups - 1}, not for task {number}."
                )
            rows = file.read_row_group(number).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{list_path}: cannot be read ({error}); submit the work again.") from None
    return note, [Unit(keys=row["keys"], task=json.loads(row["task"])) for row in rows]


def _left(units: list[Unit], done: Finished) -> list[Unit]:
    finished = done.update()
    return [unit for unit in units if not finished.issuperset(unit.keys)]


class _Late(Exception):
    """Slurm will not wait any longer."""


class _Drain:
    """Hears Slurm's signals, and raises _Late in the main thread before Slurm kills the task.

    Slurm sends signals to every process of a task. While this is open, the main thread blocks them, and so does every
    process that it starts: the workers finish what they are at.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.writing = False
        """Whether rows are being written, which is not to be interrupted."""
        self.signal: signal.Signals | None = None
        self._over = threading.Event()
        shown = re.search(r"^KillWait\s*=\s*(\d+)", _ask("scontrol", "show", "config").stdout, re.MULTILINE)
        self.grace = 0.6 * int(shown[1] if shown else 30)
        """Seconds from the signal until `_Late`. Slurm kills after KillWait, and rows have to be written in between."""

    def __enter__(self) -> Self:
        signal.signal(signal.SIGALRM, self._late)
        for one in self.SIGNALS:
            signal.signal(one, self._hear)
        # begun before they are blocked, it is a thread that the kernel can always deliver them to
        threading.Thread(target=self._over.wait, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        resource_tracker.ensure_running()  # or the first worker starts it, which unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _hear(self, number: int, frame: object) -> None:
        if not self.asked.is_set():
            self.signal = signal.Signals(number)
            self.asked.set()
            signal.setitimer(signal.ITIMER_REAL, self.grace)
            print(f"{self.signal.name}: no further unit is begun", flush=True)

    def _late(self, number: int, frame: object) -> None:
        if self.writing:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        elif not self._over.is_set():
            raise _Late


class _Careful(Table):
    """A table that takes no reasons once Slurm's signal has come: what failed since then may have failed from that."""

    def __init__(self, folder: Path, schema: pa.Schema, drain: _Drain) -> None:
        super().__init__(folder, schema)
        self.drain = drain

    def append(self, rows: Rows) -> None:
        self.drain.writing = True
        super().append([row for row in rows if not (row["reason"] and self.drain.asked.is_set())])
        self.drain.writing = False


def _again(drain: _Drain, *, progress: bool) -> None:
    """Put this task into the queue again, unless Slurm is about to end it or has done so itself."""
    if drain.signal is signal.SIGUSR2 and not progress:
        raise UserError("slurm.time: too short for even one unit of work; give the tasks more time.")
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if _ask("squeue", "--noheader", f"--jobs={job}", "--format=%T").stdout.strip() == "RUNNING":
        print(f"job {job} goes back into the queue", flush=True)
        done = _ask("scontrol", "requeue", job)
        if done.returncode != 0:
            raise UserError(f"Slurm does not requeue job {job}: {done.stderr.strip()}; submit the work again.")
