"""Files that appear whole or not at all, and that are on the disk once they are written."""

import os
import secrets
from pathlib import Path
from typing import Any

from sora_lite.errors import UserError


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that under its name there is always either the old or the new content, whole.

    Several processes, of several machines too, may write the same file at once: the last one's content stays.
    """
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        try:
            with partial.open("xb") as file:
                file.write(content)
                flush(file)
            try:
                os.replace(partial, path)
                break
            except FileNotFoundError:
                continue  # another process took it for what a dead one had left behind
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    flush_folder(path.parent)


def flush(file: Any) -> None:
    """Bring what was written to a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_folder(out: Path) -> None:
    """Raise UserError if a file stands where the folder of the setting `out` is, or will be."""
    for path in (out, *out.parents):
        if path.is_file():
            raise UserError(f"out: {path} is a file; name a folder")
