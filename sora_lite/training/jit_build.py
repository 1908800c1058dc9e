"""Compiling an operator at start: by one process at a time, and whatever one that was killed has left behind.

torch guards such a build by a file `lock` in the folder that it builds in. A process that is killed leaves it there,
and every later start waits for it, for ever. Here a lock of the kernel on a file beside that folder says who may build;
it ends with its process, on this machine or on another that shares the folder. Who holds it and finds torch's file
knows that its maker is dead, or is a program that does not go this way and can be seen to have the file open.
"""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch.utils.cpp_extension import _get_build_directory

Result = TypeVar("Result")


def build(name: str, load: Callable[[], Result], say: Callable[[str], None]) -> Result:
    """The result of `load`, which compiles the operator `name` by torch unless that was done before.

    Args:
        name: of the operator, and so of its folder under TORCH_EXTENSIONS_DIR.
        load: called while no other process builds in that folder.
        say: shows a line to people.

    Raises:
        OSError: the folder cannot be written to, or its file system knows no locks.
    """
    folder = Path(_get_build_directory(name, verbose=False))
    with folder.with_name(f"{name}.building").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _clear(folder, say)
        if not any(folder.glob("*.so")):
            say(f"compiling {name} in {folder}: once, some minutes")
        return load()


def _clear(folder: Path, say: Callable[[str], None]) -> None:
    """Wait while a living process builds, and take away what one that was killed has left."""
    lock, told = folder / "lock", 0
    while (holder := _holder(lock)) is not None:
        if holder != told:
            say(f"{lock}: process {holder} compiles; waiting for it")
        told = holder
        time.sleep(0.5)
    if lock.exists():
        # Compilers may outlive their process and still write into the folder that they were started in, so that one is
        # given up as a whole.
        left = folder.rename(folder.with_name(f"{folder.name}.left-{secrets.token_hex(4)}"))
        folder.mkdir()
        say(f"{lock}: was left by a process that was killed while it compiled; removed")
        shutil.rmtree(left, ignore_errors=True)  # what is written at this moment may stay


def _holder(lock: Path) -> int | None:
    """A living process of this machine that has the file open, as torch has while it builds."""
    if not lock.exists():
        return None
    wanted = os.path.realpath(lock)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == wanted:
                return int(link.parts[2])
        except OSError:  # of another user, or just closed
            continue
    return None
