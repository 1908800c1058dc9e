"""What each rank says, kept in the run folder besides being shown.

RUN/logs/rank_00000.log    one file for each rank, over all attempts; progress bars are left out
"""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from sora_lite.errors import Interrupted, UserError

FOLDER = "logs"


@contextlib.contextmanager
def rank_log(run: Path, rank: int) -> Iterator[None]:
    """While the block lasts, what this rank prints goes into its file too; at last, an error that ends the block."""
    path = run / FOLDER / f"rank_{rank:05d}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", buffering=1)
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}); this rank keeps no log", file=sys.stderr)
        yield
        return
    log = _Log(file)
    log.keep(f"-- {datetime.now(UTC).isoformat(timespec='seconds')} {socket.gethostname()}, process {os.getpid()}\n")
    with file, contextlib.redirect_stdout(_Both(sys.stdout, log)), contextlib.redirect_stderr(_Both(sys.stderr, log)):
        try:
            yield
        except Exception as error:
            known = isinstance(error, UserError | Interrupted)
            log.keep(f"{error}\n" if known else "".join(traceback.format_exception(error)))
            raise


class _Log:
    """A file without which training goes on where it can no longer be written."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lost = False

    def keep(self, text: str) -> str:
        """Write to the file. Returns why that ended here, "" if it did not."""
        if self._lost:
            return ""
        try:
            self._file.write(text)
        except OSError as error:
            self._lost = True
            return f"{self._file.name}: cannot be written ({error.strerror}); the log of this rank ends here\n"
        return ""


class _Both:
    """A stream that keeps what is written to it in a log as well."""

    def __init__(self, stream: TextIO, log: _Log) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        if "\r" not in text and (lost := self._log.keep(text)):  # a progress bar goes back to where its line begins
            self._stream.write(lost)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
