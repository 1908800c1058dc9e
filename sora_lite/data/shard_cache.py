"""Remote shards on a disk of this machine: fetched whole, verified, bounded in size, shared by all processes.

FOLDER/SHA256.tar               a whole shard that had this SHA-256; its time of modification is when it was last opened
FOLDER/SHA256.BYTES.partial     one that is being fetched, or that a killed process has left: the next goes on there
FOLDER/SHA256.failed            why the last try to fetch it was given up: those who waited for that try need none more
FOLDER/lock                     held while room is made

All marks of what is in use are locks on these files (flock), so they end with the process that held them, however it
ended. A reader holds a shared lock on its shard, and only what nobody holds is deleted, least recently opened first.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from sora_lite.data.remote import CANNOT_WRITE, PATIENCE, Patience, ReadCounts, Url, WrongBytes, fetch
from sora_lite.data.shards import DamagedSample, ShardReader
from sora_lite.data.web import Busy
from sora_lite.errors import UserError

DEFAULT_FOLDER = Path("~/.cache/sora_lite")
_NAME = re.compile(r"[0-9a-f]{64}(?:\.tar|\.(\d+)\.partial)")
_CHUNK = 1 << 20


class RemoteShard(NamedTuple):
    """A shard as its manifest names it. size: bytes."""

    url: Url
    sha256: str
    size: int


class ShardCache:
    """The cache in one folder.

    Args:
        folder: on a disk of this machine.
        limit_bytes: what the folder may hold. What is in use stays, even above that.
        patience: with the servers.
    """

    def __init__(self, folder: Path, limit_bytes: int, patience: Patience = PATIENCE) -> None:
        self.folder, self.limit_bytes, self.patience = folder, limit_bytes, patience

    def open(self, url: Url, sha256: str, size: int, counts: ReadCounts) -> "CachedShardReader":
        """A reader of a shard, which stays in the cache until it is closed. Raises UserError if it cannot be had."""
        return CachedShardReader(self, url, sha256, size, counts)

    def hold(self, url: Url, sha256: str, size: int, counts: ReadCounts, *, force: bool = True) -> int | None:
        """A descriptor of the verified shard, which stays in the cache while it is open.

        force: whether to go above the limit where all else is in use; if not, the answer is None then.
        Raises UserError if the shard cannot be had.
        """
        waited = False
        with self._writing():
            while (held := self._open_held(sha256)) is None:
                if size > self.limit_bytes:
                    raise UserError(
                        f"data.shard_cache_gb: {self.limit_bytes / 2**30:.2g} is less than {url} alone; give it more"
                    )
                waited = True
                if not self._fetch(url, sha256, size, counts, force):
                    return None
        if waited:
            counts.cache_misses += 1
        else:
            counts.cache_hits += 1
        return held

    def drop(self, sha256: str) -> None:
        """Forget a shard whose file turned out to be damaged."""
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _open_held(self, sha256: str) -> int | None:
        """A descriptor under a shared lock, or None where the shard is not there."""
        try:
            descriptor = os.open(self._path(sha256), os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits no longer than it takes another process to delete the file
        if os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def _fetch(self, url: Url, sha256: str, size: int, counts: ReadCounts, force: bool) -> bool:
        """Bring a shard in, or wait for another process that does. Returns whether there was room."""
        partial, failed = self.folder / f"{sha256}.{size}.partial", self.folder / f"{sha256}.failed"
        with self._sole(partial, failed) as file:
            if self._path(sha256).exists():  # another process has just finished it
                partial.unlink(missing_ok=True)
                return True
            if not self._make_room(force):
                partial.unlink()
                return False
            try:
                fetch(url, _PartialShard(file, sha256, size), self.patience, counts)
            except FileNotFoundError as error:
                raise UserError(f"{url}: the shard is missing ({error}); restore it or pack the videos again") from None
            except UserError as error:
                failed.write_text(str(error))
                raise
            os.replace(partial, self._path(sha256))
        return True

    @contextmanager
    def _sole(self, partial: Path, failed: Path) -> Iterator[IO[bytes]]:
        """The partial file of a shard, opened by this process alone. UserError if who had it before has given up."""
        begun = time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=_CHUNK) as file:
                self._wait_for(file, partial, failed, begun)
                if _is_at(file, partial):
                    yield file
                    return

    def _wait_for(self, file: IO[bytes], partial: Path, failed: Path, begun: float) -> None:
        """Lock a partial file, or return when it has been finished: as a shard it is locked by those who read it.

        Whoever holds it is waited for as long as it grows, or may be pausing between tries.
        """
        seen, since = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            if not _is_at(file, partial):
                return
            if failed.exists() and failed.stat().st_mtime > begun:
                raise UserError(failed.read_text())
            if (now := os.fstat(file.fileno()).st_size) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > 2 * self.patience.timeout + 600:
                raise UserError(f"{partial}: a process that fetches it makes no progress; end that process")
            time.sleep(0.05)

    def _make_room(self, force: bool) -> bool:
        """Delete what was not opened for longest and nobody holds, until all that is there fits the limit."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for entry in os.scandir(self.folder):
                if name := _NAME.fullmatch(entry.name):
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:
                        continue
                    found.append((stat.st_mtime, entry.path, int(name[1] or stat.st_size)))
            excess = sum(size for _, _, size in found) - self.limit_bytes
            for _, path, size in sorted(found):
                if excess <= 0:
                    break
                if _delete_unused(path):
                    excess -= size
            return force or excess <= 0

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            raise UserError(
                f"data.shard_cache: {self.folder} cannot be written ({os.strerror(error.errno)}); "
                "name a folder that can, with enough space for data.shard_cache_gb"
            ) from None


def default_cache() -> ShardCache:
    """The cache of commands that have no settings for one."""
    return ShardCache(DEFAULT_FOLDER.expanduser(), 64 << 30)


class CachedShardReader(ShardReader):
    """A reader of a shard in the cache. A file that its disk has spoilt is fetched again."""

    def __init__(self, cache: ShardCache, url: Url, sha256: str, size: int, counts: ReadCounts) -> None:
        self._cache, self._shard = cache, (url, sha256, size)
        self._verified = False
        super().__init__(cache.folder / f"{sha256}.tar", cache.patience, counts)

    def _open(self) -> int:
        held = self._cache.hold(*self._shard, self.counts)
        assert held is not None
        return held

    def read(self, offset: int, size: int, crc32c: int) -> bytes:
        """As `ShardReader.read`, but what does not fit is only the sample's fault if the whole shard is what it was."""
        try:
            return super().read(offset, size, crc32c)
        except DamagedSample:
            if self._verified or self._is_whole():
                raise
        _, sha256, _ = self._shard
        self._cache.drop(sha256)
        self.close()
        self._descriptor = self._open()
        self.counts.io_retries += 1
        return super().read(offset, size, crc32c)

    def _is_whole(self) -> bool:
        digest, offset = hashlib.sha256(), 0
        while part := os.pread(self._descriptor, _CHUNK, offset):
            digest.update(part)
            offset += len(part)
        self._verified = digest.hexdigest() == self._shard[1]
        return self._verified


class _PartialShard:
    """Fills a file up to a shard, from where a killed process has left it."""

    def __init__(self, file: IO[bytes], sha256: str, size: int) -> None:
        self._file, self._sha256, self._size = file, sha256, size
        self._digest = hashlib.sha256()
        while part := file.read(_CHUNK):
            self._digest.update(part)

    def tell(self) -> int:
        return self._file.tell()

    def write(self, part: bytes) -> None:
        if self.tell() + len(part) > self._size:
            self._empty()
            raise WrongBytes(f"gives more than the {self._size} bytes that it should have")
        self._file.write(part)
        self._digest.update(part)

    def finish(self) -> None:
        self._file.flush()
        if self.tell() < self._size:
            raise Busy(f"ended after {self.tell()} of {self._size} bytes")
        if self._digest.hexdigest() != self._sha256:
            self._empty()
            raise WrongBytes("its SHA-256 is not the manifest's")

    def _empty(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _delete_unused(path: str) -> bool:
    """Whether a file was deleted, because no process holds a lock on it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    finally:
        os.close(descriptor)
    return True
