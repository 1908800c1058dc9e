"""Files of lines that grow while a run goes on, and that never end it."""

from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from tqdm import tqdm


class Lines:
    """A file that lines are added to; it is there from the first call of `add` on.

    What its disk does not take is said once, kept, and written before the next lines: whether a run ends because its
    disk is full is decided where its checkpoint is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._waiting, self._told = b"", False

    def add(self, lines: Iterable[str]) -> None:
        """Write more lines, each without its end."""
        self._waiting += "".join(f"{line}\n" for line in lines).encode()
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._told:
                tqdm.write(f"warning: {self._path}: cannot be written ({error.strerror}); its lines wait until it can")
            self._told = True

    def close(self) -> None:
        """Write what waits, as far as that is possible."""
        if self._waiting:
            self.add(())
            if self._waiting:
                tqdm.write(f"warning: {self._path}: its last {self._waiting.count(10)} lines are lost")
        if self._file is not None:
            self._file.close()
