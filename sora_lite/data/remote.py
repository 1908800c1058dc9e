"""Where data lies: paths of this machine, and URLs of http(s)://, s3://, gs://, hf:// and whatever fsspec knows.

Reading a URL is tried again with growing pauses when a server fails, falls silent, breaks off or gives other bytes than
it should. Every such try is counted; if they do not end, UserError stops the run: this is never a bad sample.
"""

import errno
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import fsspec

from sora_lite.data import web
from sora_lite.data.web import Busy
from sora_lite.errors import UserError

CANNOT_WRITE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
)
"""What a folder that a user names for a cache may answer: no rights, no room, a file in its place, no such disk."""
PART = 8 << 20
"""Bytes that a file system is asked for at a time."""

Answer = TypeVar("Answer")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs"} | {
    "abfs": "adlfs",
    "abfss": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
    "ssh": "paramiko",
}


@dataclass(slots=True, frozen=True)
class Url:
    """A file or folder behind a URL, with as much of a path's face as readers of data need."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text}/{quote(name) if is_http(self.text) else name}")

    @property
    def name(self) -> str:
        """Last part."""
        return self.text.rpartition("/")[2]


Location = Path | Url


@dataclass(kw_only=True, slots=True, frozen=True)
class Patience:
    """How long a read that fails is tried again.

    retries: how often in a row without progress. timeout: seconds of silence (or of less than 1 MiB) that end a try.
    """

    retries: int = 6
    timeout: float = 60.0


PATIENCE = Patience()
"""Of what has no settings of its own."""


@dataclass(kw_only=True, slots=True)
class ReadCounts:
    """What reading cost, since it was last taken."""

    bytes_read: int = 0
    """Bytes of members, from local files and cached shards."""
    cache_hits: int = 0
    """Openings of remote shards that lay in the cache."""
    cache_misses: int = 0
    """Openings of remote shards that had to wait."""
    bytes_fetched: int = 0
    """Bytes that came over the network."""
    io_retries: int = 0
    """Reads that failed and were tried again."""

    def add(self, other: "ReadCounts") -> None:
        """Count another's in."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def take(self) -> "ReadCounts":
        """A copy, and start anew."""
        taken = ReadCounts()
        taken.add(self)
        self.__init__()  # type: ignore[misc]
        return taken


class WrongBytes(Busy):
    """Other bytes came than should have: worth another try, from the beginning."""


class Sink(Protocol):
    """What `fetch` fills: knows how far it is, and can begin anew."""

    def tell(self) -> int:
        """Bytes so far."""
        ...

    def write(self, part: bytes) -> None:
        """Take more bytes."""
        ...

    def finish(self) -> None:
        """Check what came. Raises Busy if it is not all; WrongBytes, after it has dropped all, if it is not right."""
        ...


def locate(text: str, key: str) -> Location:
    """The location that a user names under a key. Raises UserError for a URL that cannot be read here."""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return Path(text).expanduser()
    protocol, _, rest = text.partition("://")
    if protocol.lower() in ("file", "local"):
        return Path("/" + rest.lstrip("/"))
    if "::" in text or "?" in text or "#" in text:
        raise UserError(f"{key}: {text.partition('?')[0]}: name a plain URL of a folder, without ::, ? and #")
    if is_http(text):
        if "@" in urlsplit(text).netloc:
            raise UserError(f"{key}: a URL with a password would be written down with the run; leave it out")
    else:
        check_protocol(protocol, key)
    return Url(text.rstrip("/"))


def is_http(url: str) -> bool:
    """Whether a URL is for `web`: fsspec's HTTP ends any download after five minutes, and tries none again."""
    return url.lower().startswith(("http://", "https://"))


def check_protocol(protocol: str, what: str) -> None:
    """Raise UserError, which begins with `what`, unless fsspec can speak a protocol."""
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        package = _PACKAGES.get(protocol, f"what fsspec needs for {protocol}")
        raise UserError(f"{what}: {protocol}:// needs another package; pip install {package}.") from None
    except ValueError:
        raise UserError(f"{what}: {protocol}:// is no protocol that fsspec knows; mend the URL.") from None


def read_file(
    location: Location,
    check: Callable[[bytes], str],
    patience: Patience = PATIENCE,
    counts: ReadCounts | None = None,
) -> bytes:
    """A small file, whole.

    check: says what is wrong with the bytes of a URL, empty for nothing; they are then asked for again.
    Raises FileNotFoundError, OSError of a path; UserError for a URL that cannot be read.
    """
    if isinstance(location, Path):
        return location.read_bytes()
    sink = _Memory(check)
    fetch(location, sink, patience, counts or ReadCounts())
    return bytes(sink.content)


def fetch(url: Url, sink: Sink, patience: Patience, counts: ReadCounts) -> None:
    """Bring what lies behind a URL into a sink; where a try ended, the next goes on.

    Raises FileNotFoundError if there is nothing; UserError if it cannot be read, or is not what it should be.
    """
    failed = wrong = 0
    while True:
        before = sink.tell()
        try:
            for part in _parts(url.text, before, patience.timeout):
                sink.write(part)
                counts.bytes_fetched += len(part)
            sink.finish()
            return
        except Busy as busy:
            counts.io_retries += 1
            wrong += isinstance(busy, WrongBytes)
            failed = 1 if sink.tell() - before >= web.SLOWEST else failed + 1
            if max(failed, wrong) > patience.retries:
                raise _gives_up(url, f"{busy}, after {max(failed, wrong)} tries") from None
            try:
                time.sleep(web.pause_seconds(busy, failed - 1))
            except Busy:
                raise _gives_up(url, f"{busy} and asks to wait {busy.seconds:g} seconds") from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _gives_up(url, str(error)) from None


def _gives_up(url: Url, reason: str) -> UserError:
    return UserError(f"{url}: cannot be read ({reason}); look at the network and the server, then start the run again")


class _Memory:
    """A sink for small files."""

    def __init__(self, check: Callable[[bytes], str]) -> None:
        self.content, self._check = bytearray(), check

    def tell(self) -> int:
        return len(self.content)

    def write(self, part: bytes) -> None:
        self.content += part

    def finish(self) -> None:
        if fault := self._check(bytes(self.content)):
            self.content.clear()
            raise WrongBytes(fault)


def _parts(url: str, start: int, timeout: float) -> Iterator[bytes]:
    """The bytes from `start` on. Raises Busy where another try is worth it, OSError where it is not."""
    if is_http(url):
        yield from web.stream(url, start, timeout)
        return
    system, path = fsspec.core.url_to_fs(url)
    size = int(_in_time(lambda: system.info(path), timeout)["size"])
    while start < size:
        end = min(start + PART, size)
        part = _in_time(lambda a=start, b=end: system.cat_file(path, start=a, end=b), timeout)  # type: ignore[misc]
        if not part:
            raise Busy(f"gives nothing at byte {start}")
        yield part
        start += len(part)


def _in_time(call: Callable[[], Answer], seconds: float) -> Answer:
    """What a file system answers; Busy if it does not in time, or for whatever its library raises but "no"."""
    answer: Future[Any] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()  # one that hangs is left behind
    try:
        return answer.result(seconds)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except TimeoutError:
        raise Busy(f"no answer in {seconds:g} seconds") from None
    except Exception as error:  # noqa: BLE001 - each library has errors of its own
        raise Busy(str(error) or type(error).__name__) from None
