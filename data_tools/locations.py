"""Where a file is: a path of this machine or a URL. What people read of it, how it is opened, and its version."""

import hashlib
import io
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import IO, Any, BinaryIO
from urllib.parse import urlsplit

import fsspec

from data_tools.pool import beat
from sora_lite.data import web
from sora_lite.data.remote import check_protocol
from sora_lite.data.video import BadVideo
from sora_lite.errors import UserError

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"} | {
    stat.S_IFDIR: "a folder"
}
_MARKS = ("ETag", "etag", "md5Hash", "blob_id", "content_settings", "LastModified", "last_modified", "mtime", "created")
"""What the file systems of fsspec call that by which a file's versions differ; the first that is there counts."""


def is_url(location: str) -> bool:
    """Whether a location is a URL; all else is a path, whatever it looks like."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def is_http(url: str) -> bool:
    """Whether a URL is read by `sora_lite.data.web`, not by fsspec."""
    return url.lower().startswith(("http://", "https://"))


def printable(text: str) -> str:
    """A file's name or another's words, safe in tables, terminals, JSON and Parquet. Different texts stay different.

    Bytes that are not UTF-8 become \\xNN, what does not print (line breaks, controls) \\uNNNN, a backslash two.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(char if char.isprintable() and char != "\\" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    if char == "\\":
        return "\\\\"
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def public_name(location: str) -> str:
    """A location without passwords and signatures; a digest in their place tells such URLs apart."""
    if not is_private(location):
        return printable(location)
    parts = urlsplit(location)
    digest = hashlib.sha256(os.fsencode(location)).hexdigest()[:16]
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}?{digest}")


def is_private(location: str) -> bool:
    """Whether a URL may hold a password or a signature."""
    return is_url(location) and ("?" in location or "@" in urlsplit(location).netloc)


# ------------------------------------------------------------------------------------------------------------ opening


def open_source(location: str, max_bytes: int = 64 << 30) -> BinaryIO:
    """A source, open for reading from its start.

    What lies behind a URL is fetched into a file without a name in TMPDIR. The last one is kept while this process
    lives, since one video is often opened many times in a row; not for several threads.
    max_bytes: most that is fetched. Raises OSError, or BadVideo for what is no file or is too large.
    """
    if not is_url(location):
        return _open_regular(location)
    version = version_of(location, beat)
    if (location, version) not in _fetched or version == "-":
        while _fetched:
            _fetched.popitem()[1].close()
        with ExitStack() as undo:
            file = undo.enter_context(tempfile.TemporaryFile())
            _fetch(location, file, max_bytes, beat)
            file.flush()
            undo.pop_all()
        _fetched[location, version] = file
    return open(f"/proc/self/fd/{_fetched[location, version].fileno()}", "rb")  # with a position of its own


_fetched: dict[tuple[str, str], IO[bytes]] = {}
"""The last file that was fetched, by URL and version."""


def read_small(location: str, max_bytes: int) -> bytes:
    """Content of a file that accompanies videos. Raises as `open_source` does; for any thread."""
    if is_url(location):
        held = io.BytesIO()
        _fetch(location, held, max_bytes, _nothing)
        return held.getvalue()
    with _open_regular(location) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise BadVideo(f"is larger than {max_bytes} bytes")
    return content


def _open_regular(path: str) -> BinaryIO:
    """Pipes, sockets and devices are never opened: that may hang, or do something."""
    try:
        _require_regular(os.stat(path))
        with ExitStack() as undo:
            file = undo.enter_context(os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb"))
            _require_regular(os.fstat(file.fileno()))  # it may have become a pipe just now
            undo.pop_all()
    except OSError as error:
        raise type(error)(f"cannot be read: {error.strerror}") from None
    return file


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BadVideo(f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a file")


def _fetch(url: str, file: IO[bytes], max_bytes: int, beat: Callable[[], None]) -> None:
    with errors_named(url):
        if is_http(url):
            # fsspec's own HTTP gives up on a download that takes more than five minutes, and tries none again
            web.download(url, file, max_bytes, beat)
            return
        system, path = filesystem(url)
        with system.open(path, "rb") as remote:
            while part := remote.read(1 << 22):
                beat()
                file.write(part)
                if file.tell() > max_bytes:
                    raise BadVideo(f"is larger than {max_bytes} bytes")


def _nothing() -> None:
    """In the place of `beat` in threads, of which only the main one may speak for the process."""


# ------------------------------------------------------------------------------------------------------------ versions


def version_of(url: str, beat: Callable[[], None] = _nothing) -> str:
    """Size, and ETag or time, of a remote file; "-" if nothing is to be had now (opening it will say why)."""
    try:
        with errors_named(url):
            if is_http(url):
                return web.version_of(url, beat)
            system, path = filesystem(url)
            return version_in(system.info(path)) or "-"
    except OSError:
        return "-"


def version_in(info: dict[str, Any]) -> str:
    """What a file system's listing tells of a file's version; empty if nothing."""
    mark = next((info[name] for name in _MARKS if info.get(name)), None)
    return "" if info.get("size") is None else f"{info['size']}-{mark}"


def versions_of(urls: list[str]) -> list[str]:
    """The version of each, asked for side by side: what takes time is waiting for the other side."""
    with ThreadPoolExecutor(16) as threads:
        try:
            return list(threads.map(version_of, urls))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    check_protocol(url.partition("://")[0], public_name(url))
    return fsspec.core.url_to_fs(url)


@contextmanager
def errors_named(url: str) -> Iterator[None]:
    """Turn whatever a file system's library raises into OSError that names the URL."""
    try:
        yield
    except (BadVideo, UserError, MemoryError):
        raise
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        text = printable(str(error).replace(url, public_name(url))) or type(error).__name__
        raise kind(f"{public_name(url)}: {text}") from error
