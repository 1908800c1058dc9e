"""The folder of checkpoints on disk: what is complete, what the pointer names, what is damaged, what is kept.

    checkpoints/
      latest                        the pointer: the name of one directory beside it, and only ever of a complete one
      step_00000500/                complete: appeared under this name with all its files, by one rename
        manifest.json               size and SHA-256 of every other file
        state.json                  step, optimizer steps, and the caller's own JSON
        ENGINE-rank_00000.safetensors
      step_00000400.aside-TOKEN/    damaged, or of a branch that was left: kept for a while, never read
      step_00000600.tmp-TOKEN/      being written, by the attempt of that token; or left by one that died

Nothing here knows tensors or processes: `training.checkpoint` sees to it that one process at a time works here.

Files are hashed in chunks of 32 MiB, so that several threads can share one file; a file of at most one chunk has the
hash that `sha256sum` prints.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_lite.data.files import flush_folder
from sora_lite.errors import UserError

FORMAT_VERSION = 2
POINTER = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
CHUNK = 32 * 2**20
"""Bytes of a file under one hash."""
THREADS = min(8, os.cpu_count() or 1)
"""That hash and read at a time."""
HEADROOM = 2
"""How many times the size of a checkpoint must be free before it is written."""

_DIRECTORY = re.compile(r"step_(\d{8,})(?:-(\d+))?")
_ASIDE = re.compile(r"step_(\d{8,})(?:-\d+)?\.aside-[0-9a-f]+")
_READ = 2**20

Files = dict[str, dict[str, Any]]
"""By file name: `bytes`, and `sha256` as one hash for each chunk."""


class Damaged(UserError):
    """A checkpoint whose files are not those that were written."""


# ---------------------------------------------------------------------------------------------------- writing


def write_hashed(path: Path, parts: Iterable[memoryview]) -> dict[str, Any]:
    """Write a new file and sync it to disk; other threads hash it meanwhile. Its `bytes` and `sha256`."""
    total, hashes = 0, []
    with ThreadPoolExecutor(THREADS) as pool, path.open("xb") as file:
        for chunk in _chunks(parts):
            hashes.append(pool.submit(_hash, chunk))
            for view in chunk:
                total += file.write(view)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": total, "sha256": [one.result() for one in hashes]}


def _chunks(parts: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes in lists of views that make CHUNK bytes each; the last may make fewer."""
    chunk: list[memoryview] = []
    room = CHUNK
    for part in parts:
        while len(part) > 0:
            chunk.append(part[:room])
            part = part[room:]
            room -= len(chunk[-1])
            if room == 0:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk


def _hash(chunk: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for view in chunk:
        digest.update(view)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write JSON into a new file as `write_hashed` does."""
    return write_hashed(path, [memoryview(json.dumps(value, indent=1, allow_nan=False).encode())])


def open_folder(folder: Path) -> None:
    """Make the folder of checkpoints, without whatever an attempt that ended had begun in it.

    What is taken away here cannot be renamed any more: an attempt that still runs somewhere, though another took the
    run over, fails when it comes to that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob("step_*.tmp-*"), *folder.glob(f"{POINTER}.tmp-*")]:
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, or a directory, which first gets another name.

    Half a directory must not carry the name of a complete one; and a process that still writes into a temporary one
    finds no more room for new files there.
    """
    if path.is_dir():
        shutil.rmtree(path.rename(path.with_name(f"{path.name.partition('.')[0]}.tmp-{secrets.token_hex(4)}")))
    else:
        path.unlink(missing_ok=True)


def prepare(folder: Path, step: int, token: str, size: int, files: int) -> list[str]:
    """Make the temporary directory of a checkpoint of `size` bytes in so many files.

    Returns the name that it will have in the end (a step that was saved before gets a number, as nothing complete is
    ever written over), and the one that it has now.

    Raises:
        UserError: there is no room.
    """
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < HEADROOM * size:
        raise UserError(
            f"{folder}: a checkpoint has {_bytes(size)}, and {_bytes(HEADROOM * size)} must be free for it, but "
            f"{_bytes(free)} are: make room on that disk, or lower run.keep_last"
        )
    if room.f_files and room.f_favail < files + 4:
        raise UserError(
            f"{folder}: its file system can take {room.f_favail} more files: remove some that are not needed"
        )
    revision = max([r for s, r, _ in complete(folder) if s == step], default=0) + 1
    name = f"step_{step:08d}" + (f"-{revision}" if revision > 1 else "")
    temporary = f"{name}.tmp-{token}"
    remove(folder / temporary)  # of a save that failed
    (folder / temporary).mkdir()
    return [name, temporary]


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def commit(temporary: Path, name: str, state: dict[str, Any], files: Files, check: Callable[[], None]) -> Path:
    """Make a complete checkpoint out of a temporary directory, and let the pointer name it.

    Args:
        temporary: as from `prepare`, with the data files in it.
        name: as from `prepare`.
        state: becomes state.json.
        files: the data files.
        check: raises where this attempt may not change the run any more; called before each of the two renames.
    """
    files = {**files, STATE: write_json(temporary / STATE, state)}
    manifest = {"format_version": FORMAT_VERSION, "step": state["step"], "files": dict(sorted(files.items()))}
    write_json(temporary / MANIFEST, {**manifest, "sha256": manifest_hash(manifest)})
    flush_folder(temporary)
    check()
    final = temporary.with_name(name)
    temporary.rename(final)
    flush_folder(final.parent)
    move_pointer(final, temporary.name.rpartition("-")[2], check)
    return final


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Hash of the manifest's content, kept inside it: the manifest itself is checked too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def move_pointer(target: Path, token: str, check: Callable[[], None]) -> None:
    """Let the pointer name a complete checkpoint."""
    # The new pointer lies there before `check`: whoever takes the run over after `check` removes it (`open_folder`),
    # and the rename fails.
    pointer = target.parent / f"{POINTER}.tmp-{token}"
    pointer.unlink(missing_ok=True)
    write_hashed(pointer, [memoryview(f"{target.name}\n".encode())])
    check()
    pointer.replace(target.parent / POINTER)
    flush_folder(target.parent)


def prune(newest: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove checkpoints up to `newest` that need not be kept, and what lies aside from before all that are kept last.

    Kept are the `keep_last` newest steps and, with `keep_every` above 0, its multiples. Of a step that was saved
    several times the last counts.
    """
    # A complete checkpoint of a later step, left by an attempt that died before it set the pointer, stays until the
    # run comes past it.
    every = complete(newest.parent)
    at = next((step, revision) for step, revision, path in every if path == newest)
    past = [(step, path) for step, revision, path in every if (step, revision) <= at]
    by_step = dict(past)
    last = list(by_step)[-keep_last:]
    kept = {path for step, path in by_step.items() if step in last or (keep_every > 0 and step % keep_every == 0)}
    for _, path in past:
        if path not in kept:
            remove(path)
    for path in newest.parent.iterdir():
        if (match := _ASIDE.fullmatch(path.name)) and int(match[1]) < min(last):
            remove(path)


def set_aside(path: Path) -> Path:
    """Give a checkpoint a name under which it is not read; `prune` removes it once the run is well past it."""
    return path.rename(path.with_name(f"{path.name}.aside-{secrets.token_hex(4)}"))


def explain(error: OSError, path: Path) -> UserError:
    """An error of the file system, as people can mend it."""
    cures = {
        errno.ENOSPC: "make room there (`df -h` and `df -i`), or lower run.keep_last",
        errno.EDQUOT: "make room there, or have the quota raised",
        errno.EROFS: "mount it for writing, or give another run.root",
        errno.EACCES: "have the folder's owner allow it, or give another run.root",
        errno.EPERM: "have the folder's owner allow it, or give another run.root",
    }
    cure = cures.get(error.errno or 0, "check that disk")
    return UserError(f"{error.filename or path}: cannot be written ({error.strerror or error}): {cure}")


# ---------------------------------------------------------------------------------------------------- looking


def complete(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, revision, directory) of every complete checkpoint, oldest first: temporary names do not match."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _DIRECTORY.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), int(match[2] or 1), path))
    return sorted(found)


def latest(folder: Path) -> Path | None:
    """The checkpoint that the pointer names, or None where nothing was saved yet.

    Raises:
        Damaged: the pointer is damaged, missing beside checkpoints, or names what is not there.
    """
    pointer = folder / POINTER
    try:
        name = pointer.read_text(errors="replace").strip()
    except FileNotFoundError:
        if complete(folder):
            raise Damaged(f"{pointer} is missing: {_CURE}") from None
        return None
    if not _DIRECTORY.fullmatch(name):  # also keeps the pointer from leading out of the folder
        raise Damaged(f"{pointer} is damaged: {_CURE}")
    if not (folder / name).is_dir():
        raise Damaged(f"{pointer} names {name}, which does not exist: {_CURE}")
    return folder / name


_CURE = "write into it the name of one of the step_... directories beside it, or let training find the newest good one"


def candidates(folder: Path) -> tuple[list[Path], str | None]:
    """Where a run may go on from, best first, and what is wrong with the pointer, if anything is.

    The pointer's own checkpoint comes first, then older ones: what is later was left behind. Where the pointer says
    nothing, all count.
    """
    every = [path for _, _, path in reversed(complete(folder))]
    try:
        named = latest(folder)
    except Damaged as error:
        return every, str(error)
    return (every[every.index(named) :] if named else []), None


def read_manifest(path: Path) -> Files:
    """The files of a checkpoint.

    Raises:
        Damaged: the manifest is not there or not as it was written.
        UserError: it is of another version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        stated = manifest.pop("sha256")
        files = manifest["files"]
        right = stated == manifest_hash(manifest) and STATE in files and all(Path(n).name == n for n in files)
        version = manifest["format_version"]
    except FileNotFoundError as error:
        raise Damaged(f"{path / MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path / MANIFEST} is damaged") from error
    if not right:
        raise Damaged(f"{path / MANIFEST} is damaged: its content does not match its hash")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has checkpoint format {version}, this version reads {FORMAT_VERSION}: update sora_lite"
        )
    return files


def verify(path: Path, index: int = 0, count: int = 1) -> Files:
    """Check every `count`-th file of a checkpoint, beginning with file `index`, against the manifest; returns all.

    Raises:
        Damaged: names the first file that is missing, short or changed.
    """
    files = read_manifest(path)
    for name in sorted(files)[index::count]:
        _verify_file(path / name, files[name])
    return files


def _verify_file(path: Path, facts: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise Damaged(f"{path} has {size} bytes instead of {facts['bytes']}")
    starts = range(0, size, CHUNK)
    try:
        with ThreadPoolExecutor(min(THREADS, max(len(starts), 1))) as pool:
            found = list(pool.map(lambda start: _hash_range(path, start), starts))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise Damaged(f"{path} cannot be read ({error.strerror})") from error
    if found != facts["sha256"]:
        raise Damaged(f"{path} is damaged: its SHA-256 is not the manifest's")


def _hash_range(path: Path, start: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        for _ in range(0, CHUNK, _READ):
            digest.update(buffer[: file.readinto(buffer)])
    return digest.hexdigest()


@dataclass(kw_only=True, frozen=True, slots=True)
class Entry:
    """One checkpoint in a folder: state is complete, damaged, aside or unfinished; note says what is wrong with it."""

    name: str
    step: int
    bytes: int
    state: str
    latest: bool
    note: str = ""


def inventory(folder: Path, *, hashes: bool) -> list[Entry]:
    """Every checkpoint in a folder, oldest first. Without `hashes` only the presence and sizes of files are checked."""
    pointer = folder / POINTER
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    entries = []
    for path in sorted(folder.glob("step_*")):
        if not path.is_dir():
            continue
        number = re.match(r"step_(\d+)", path.name)
        state = (
            "aside" if _ASIDE.fullmatch(path.name) else "complete" if _DIRECTORY.fullmatch(path.name) else "unfinished"
        )
        note = _damage(path, hashes=hashes) if state == "complete" else ""
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        entries.append(
            Entry(
                name=path.name,
                step=int(number[1]) if number else 0,
                bytes=size,
                state="damaged" if note else state,
                latest=path.name == named,
                note=note,
            )
        )
    return sorted(entries, key=lambda entry: entry.step)


def _damage(path: Path, *, hashes: bool) -> str:
    try:
        if hashes:
            verify(path)
            return ""
        for name, facts in read_manifest(path).items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
    except UserError as error:
        return str(error).removeprefix(f"{path}/")
    return ""
