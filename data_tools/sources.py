"""Which files are sources, what is known of them beforehand, and how they are opened.

Sources are the media files of a folder, or the rows of a list (.csv, .parquet, .jsonl), on this machine or behind a
URL. A folder may hold metadata.jsonl, which follows the videofolder convention of the Hugging Face `datasets` library:
one JSON object per line with `file_name` (relative to the folder). A list has the same columns; its file's column may
also be called `path`, `url` or `video`. Known columns: `caption` or `captions`, `label` (an integer), `group` (sources
of one group are never in both train and validation). All others are kept with each clip under `extra`.
"""

import codecs
import csv
import hashlib
import io
import json
import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, Self
from urllib.parse import quote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.pool import beat
from sora_lite.data import web
from sora_lite.data.remote import check_protocol
from sora_lite.data.video import BadVideo
from sora_lite.errors import UserError

EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".m2ts", ".mts"}
    | {".gif", ".png", ".jpg", ".jpeg", ".webp"}
)
METADATA = "metadata.jsonl"
LISTS = (".csv", ".parquet", ".jsonl")
LARGEST_LIST = 4 << 30
"""Bytes."""
LARGEST_ROW = 1 << 20
"""Bytes of what a list says of one file, all of which is kept with each of its clips."""
DEEPEST_ROW = 32
"""Lists and objects inside each other."""
FILE_COLUMNS = ("file_name", "path", "url", "video")
"""Columns of a list that may name the file; the first of them that a row has does."""

SOURCES_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("location", pa.binary()),
        ("reason", pa.string()),
        ("seen", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("label", pa.int64()),
        ("group", pa.string()),
        ("extra", pa.string()),
    ]
)
"""Columns of `Source.to_row`. location: bytes, since names of files need not be UTF-8; extra: JSON."""

_LOCAL = ("file", "local")
_ELSEWHERE = ("http", "https", "s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "adl", "oci", "oss")
"""Protocols that a list which itself comes from elsewhere may name: none of them reads this machine's files."""
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"} | {
    stat.S_IFDIR: "a folder"
}


@dataclass(kw_only=True, slots=True)
class Row:
    """What metadata.jsonl or a list says of one file."""

    captions: list[str] = field(default_factory=list)
    label: int | None = None
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Source:
    """One file that may become clips."""

    location: str
    """Absolute path as the operating system has it, or a URL; for `open_source`."""
    name: str
    """What people read: the path relative to the folder (or the list's folder), escaped by `printable`; a URL without
    passwords. Different locations have different names."""
    row: Row
    reason: str = ""
    """Why it must not be opened; empty if it may."""
    seen: str = ""
    """For URLs: version of the file (size and ETag or time) when it was listed."""

    def stamp(self) -> str:
        """Changes when the file does; "-" where there is none."""
        if is_url(self.location):
            return self.seen
        try:
            status = os.stat(self.location)
        except OSError:
            return "-"
        return f"{status.st_size}-{status.st_mtime_ns}"

    def to_row(self) -> dict[str, Any]:
        """As a row of SOURCES_SCHEMA."""
        return {
            "name": self.name,
            "location": os.fsencode(self.location),
            "reason": self.reason,
            "seen": self.seen,
            "captions": self.row.captions,
            "label": self.row.label,
            "group": self.row.group,
            "extra": json.dumps(self.row.extra, ensure_ascii=False),
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """The inverse of `to_row`."""
        known = Row(captions=row["captions"], label=row["label"], group=row["group"], extra=json.loads(row["extra"]))
        location = os.fsdecode(row["location"])
        return cls(location=location, name=row["name"], row=known, reason=row["reason"], seen=row["seen"])


# ------------------------------------------------------------------------------------------------------------ finding


def find_sources(where: str) -> list[Source]:
    """All sources of a folder or a list, by name.

    where: a folder or list of this machine, or a URL of one (s3://, gs://, hf://, https://, file://, ... as fsspec
    has them). In a folder, hidden files and other types are passed over, and links to folders are not followed.
    Raises UserError if there are none, or if a list or metadata.jsonl is wrong.
    """
    try:
        where = _local_or_url(where)
    except ValueError as error:
        raise UserError(f"{where}: {error}; name a folder, a list or a plain URL.") from None
    suffix = posixpath.splitext(urlsplit(where).path if is_url(where) else where)[1].lower()
    if is_url(where):
        sources = _in_list(where) if suffix in LISTS else _in_remote_folder(where)
    elif os.path.isdir(where):
        sources = _in_folder(Path(os.path.abspath(where)))
    elif os.path.isfile(where) and suffix in LISTS:
        sources = _in_list(os.path.abspath(where))
    elif os.path.lexists(where):
        raise UserError(
            f"{printable(where)}: neither a folder nor a list ({' '.join(LISTS)}); name the videos' folder."
        )
    else:
        raise UserError(f"{printable(where)}: no such folder or list; the first argument names what holds the videos.")
    if not sources:
        raise UserError(f"{_public(where)}: holds no videos; these are looked for: {' '.join(sorted(EXTENSIONS))}.")
    return sorted(sources, key=lambda source: source.name)


def is_url(location: str) -> bool:
    """Whether a location is a URL; all else is a path, whatever it looks like."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


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


def _in_folder(folder: Path) -> list[Source]:
    found = dict(_media_under(folder))
    rows = read_metadata(folder, {name for name, reason in found.items() if not reason})
    found.update((name, "") for name in rows)
    return [
        Source(
            location=os.path.join(folder, name), name=printable(name), row=rows.get(name) or Row(), reason=found[name]
        )
        for name in found
    ]


def _media_under(folder: Path) -> Iterator[tuple[str, str]]:
    """(relative path, why it must not be opened) of everything that may be a video."""
    root = os.path.realpath(folder)
    waiting = [""]
    while waiting:
        parent = waiting.pop()
        try:
            with os.scandir(os.path.join(folder, parent)) as entries:
                inside = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            if not parent:
                raise UserError(f"{printable(str(folder))}: cannot be listed: {error.strerror}.") from None
            yield parent, f"a folder that cannot be listed: {error.strerror}"
            continue
        for entry in inside:
            name = os.path.join(parent, entry.name)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(name)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                if not _is_inside(entry.path, root):
                    yield name, "a link to a folder elsewhere, which is not followed; name that folder itself"
            elif os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield name, _why_not(entry, root)


def _why_not(entry: os.DirEntry[str], root: str) -> str:
    if entry.is_file(follow_symlinks=False):
        return ""
    if entry.is_symlink() and not _is_inside(entry.path, root):
        return "a link that leads out of the folder"
    if os.path.isfile(entry.path):
        return ""
    return "a link that leads nowhere" if entry.is_symlink() else "a pipe, a socket or a device, which is not opened"


def _is_inside(path: str, root: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), root]) == root


def read_metadata(folder: Path, found: Container[str] = ()) -> dict[str, Row]:
    """Rows of FOLDER/metadata.jsonl by file name; none without that file. Raises UserError with the line's number.

    found: relative paths that are known to be good; others are looked at.
    """
    path = folder / METADATA
    if not path.exists():
        return {}

    def check(name: str) -> str:
        if name in found:
            return name
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"file_name {name!r} leads out of the folder")
        if not (folder / name).is_file():
            raise ValueError(f"file_name {name!r} does not exist in {folder}")
        return os.path.relpath(os.path.normpath(folder / name), folder)

    return _rows(str(path), check, FILE_COLUMNS[:1])


def _in_list(where: str) -> list[Source]:
    folder = (where.split("?")[0] if is_url(where) else where).rpartition("/")[0]
    rows = _rows(where, lambda name: _located(name, folder), FILE_COLUMNS)
    remote = [location for location in rows if is_url(location)]
    for protocol in {location.partition("://")[0] for location in remote if not _is_http(location)}:
        check_protocol(protocol, _public(where))
    seen = dict(zip(remote, _side_by_side(_version, remote), strict=True))
    return [
        Source(location=location, name=_name_of(location, folder), row=row, seen=seen.get(location, ""))
        for location, row in rows.items()
    ]


def _in_remote_folder(url: str) -> list[Source]:
    url = url.rstrip("/")
    try:
        with _naming(url):
            system, root = _filesystem(url)
            found = {
                path.removeprefix(root.rstrip("/") + "/"): info for path, info in system.find(root, detail=True).items()
            }
    except OSError as error:
        raise UserError(f"{error}; check the URL and your access to it.") from None
    rows: dict[str, Row] = {}
    if METADATA in found:

        def check(name: str) -> str:
            if posixpath.normpath(name) not in found:
                raise ValueError(f"file_name {name!r} does not exist in {_public(url)}")
            return posixpath.normpath(name)

        rows = _rows(f"{url}/{METADATA}", check, FILE_COLUMNS[:1])
    names = [name for name in found if name in rows or _is_media(name)]
    known = {name: _version_in(found[name]) for name in names}
    fresh = [name for name in names if not known[name]]
    known.update(zip(fresh, _side_by_side(_version, [f"{url}/{name}" for name in fresh]), strict=True))
    return [
        Source(
            location=f"{url}/{name}", name=_name_of(f"{url}/{name}", url), row=rows.get(name) or Row(), seen=known[name]
        )
        for name in names
    ]


def _is_media(name: str) -> bool:
    hidden = name.startswith((".", "/")) or "/." in name
    return not hidden and not is_url(name) and posixpath.splitext(name)[1].lower() in EXTENSIONS


def _located(name: str, folder: str) -> str:
    """Location of a file that a list in `folder` (a path or a URL) names. Raises ValueError."""
    os.fsencode(name)  # half a surrogate pair is no part of any name
    if not name or "\0" in name:
        raise ValueError(f"{name!r} cannot be the name of a file")
    if is_url(name):
        name = _local_or_url(name)
    if not is_url(folder):
        return name if is_url(name) else os.path.normpath(os.path.join(folder, name))
    if is_url(name):
        if name.partition("://")[0].lower() not in _ELSEWHERE:
            raise ValueError(f"{name!r}: a list from elsewhere may name only {', '.join(_ELSEWHERE)}")
        return name
    name = posixpath.normpath(name)
    if name.startswith(("/", "..")):
        raise ValueError(f"{name!r} leads out of the list's folder, which one from elsewhere may not")
    return f"{folder}/{quote(name) if folder.startswith('http') else name}"


def _local_or_url(where: str) -> str:
    """A path for what fsspec calls file:// and local://, all else as it is. Raises ValueError for chains of URLs."""
    if not is_url(where):
        return where
    if "::" in where:
        raise ValueError("chains of URLs (::) are not read")
    protocol, _, path = where.partition("://")
    if protocol.lower() not in _LOCAL:
        return where
    if not path.startswith("/"):
        raise ValueError(f"{where!r}: an absolute path begins after {protocol}://, with a third slash")
    return os.path.normpath(path)


def _name_of(location: str, folder: str) -> str:
    inside = location.removeprefix(folder + "/")
    return _public(location) if is_url(inside) or _is_private(location) else printable(inside)


def _public(location: str) -> str:
    """Without passwords and signatures; a digest in their place tells such URLs apart."""
    if not _is_private(location):
        return printable(location)
    parts = urlsplit(location)
    digest = hashlib.sha256(os.fsencode(location)).hexdigest()[:16]
    return printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}?{digest}")


def _is_private(location: str) -> bool:
    """Whether a URL may hold a password or a signature."""
    return is_url(location) and ("?" in location or "@" in urlsplit(location).netloc)


# ------------------------------------------------------------------------------------------------------ rows of lists


def _rows(where: str, locate: Callable[[str], str], columns: tuple[str, ...]) -> dict[str, Row]:
    """Rows of a list by location. Raises UserError that names the line or row."""
    rows: dict[str, Row] = {}
    place = ""
    try:
        for place, read in _records(where):
            name, row = _parse(read(), columns)
            location = locate(name)
            if location in rows:
                raise ValueError(f"file_name {name!r} stands in an earlier {place.split()[0]} too")
            rows[location] = row
    except (BadVideo, OSError) as error:
        raise UserError(f"{_public(where)}: {printable(str(error))}; check the list's name and access.") from None
    except (ValueError, RecursionError, pa.ArrowException) as error:
        where, cure = (f"{_public(where)}, {place}", place.split()[0]) if place else (_public(where), "list")
        text = printable(str(error).partition("\n")[0])
        raise UserError(f"{where}: {text}; mend or remove this {cure}.") from None
    return rows


def _records(where: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(line or row, function that reads it) of everything in a list."""
    content = read_small(where, max_bytes=LARGEST_LIST).removeprefix(codecs.BOM_UTF8)
    suffix = posixpath.splitext(urlsplit(where).path if is_url(where) else where)[1].lower()
    if suffix == ".parquet":
        table = pq.read_table(pa.BufferReader(content))
        rows = (row for batch in table.to_batches(1024) for row in batch.to_pylist())
        yield from ((f"row {number}", partial(_cells_of, row)) for number, row in enumerate(rows, start=1))
    elif suffix == ".csv":
        yield from _csv_records(os.fsdecode(content))
    else:
        lines = enumerate(content.splitlines(), start=1)
        yield from ((f"line {number}", partial(json.loads, line)) for number, line in lines if line.strip())


def _csv_records(text: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """As `_records`; the place is the last line of a row, which may have several."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = cells
                if len(set(header)) < len(header) or not set(header) & set(FILE_COLUMNS):
                    raise ValueError(f"the first line must name columns, once each, {FILE_COLUMNS[0]} among them")
            elif cells:
                yield f"line {reader.line_num}", partial(_csv_cells, header, cells)
    except csv.Error as error:
        yield f"line {reader.line_num}", partial(_refuse, f"is no CSV: {error}")


def _refuse(reason: str) -> None:
    raise ValueError(reason)


def _csv_cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    """Texts by column, without empty cells; several captions are a JSON list in their cell."""
    if len(cells) != len(header):
        raise ValueError(f"has {len(cells)} cells where the first line has {len(header)}")
    row: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    if row.get("captions", "").lstrip().startswith("["):
        row["captions"] = json.loads(row["captions"])
    if re.fullmatch(r"\s*-?\d{1,18}\s*", row.get("label", "")):
        row["label"] = int(row["label"])
    return row


def _cells_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Parquet as JSON's types, without missing values. Names of files may be bytes."""
    row = {name: value for name, value in row.items() if value is not None and value == value}
    for name in FILE_COLUMNS:
        if isinstance(row.get(name), bytes):
            row[name] = os.fsdecode(row[name])
    return json.loads(json.dumps(row, default=_as_text))


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        raise ValueError("holds bytes, which cannot be kept with a clip; leave that column out")
    return str(value)


def _parse(content: Any, columns: tuple[str, ...]) -> tuple[str, Row]:
    """Name of the file and what is known of it. Raises ValueError."""
    column = next((name for name in columns if isinstance(content, dict) and content.get(name) is not None), None)
    if column is None or not isinstance(content[column], str):
        wanted = "a JSON object with a text " + " or ".join(f'"{name}"' for name in columns)
        raise ValueError(f"needs {wanted}" if len(columns) == 1 else f"needs a text in one of {', '.join(columns)}")
    name = content.pop(column)
    captions = content.pop("captions", None) or content.pop("caption", None) or []
    content.pop("caption", None)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("caption must be a text, captions a list of texts")
    label, group = content.pop("label", None), content.pop("group", None)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if label is not None and (type(label) is not int or not -(2**63) <= label < 2**63):
        raise ValueError(f"label must be an integer, not {label!r}")
    group = None if group is None else str(group)
    kept = json.dumps([captions, group, content], ensure_ascii=False, allow_nan=False).encode()
    if len(kept) > LARGEST_ROW:
        raise ValueError(f"holds {len(kept)} bytes, and so would each clip; {LARGEST_ROW} are the most")
    if _depth(content) > DEEPEST_ROW:
        raise ValueError(f"holds more than {DEEPEST_ROW} lists or objects inside each other")
    return name, Row(captions=captions, label=label, group=group, extra=content)


def _depth(content: Any) -> int:
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else None
    return 0 if inside is None else 1 + max(map(_depth, inside), default=0)


# ------------------------------------------------------------------------------------------------------------ opening


def open_source(location: str, max_bytes: int = 64 << 30) -> BinaryIO:
    """A source, open for reading from its start.

    What lies behind a URL is fetched into a file without a name in TMPDIR. The last one is kept while this process
    lives, since one video is often opened many times in a row; not for several threads.
    max_bytes: most that is fetched. Raises OSError, or BadVideo for what is no file or is too large.
    """
    if not is_url(location):
        return _open_regular(location)
    version = _version(location, beat)
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
    with _naming(url):
        if _is_http(url):
            # fsspec's own HTTP gives up on a download that takes more than five minutes, and tries none again
            web.download(url, file, max_bytes, beat)
            return
        system, path = _filesystem(url)
        with system.open(path, "rb") as remote:
            while part := remote.read(1 << 22):
                beat()
                file.write(part)
                if file.tell() > max_bytes:
                    raise BadVideo(f"is larger than {max_bytes} bytes")


def _nothing() -> None:
    """In the place of `beat` in threads, of which only the main one may speak for the process."""


def _version(url: str, beat: Callable[[], None] = _nothing) -> str:
    """Size, and ETag or time, of a remote file; "-" if nothing is to be had now (opening it will say why)."""
    try:
        with _naming(url):
            if _is_http(url):
                return web.version_of(url, beat)
            system, path = _filesystem(url)
            return _version_in(system.info(path)) or "-"
    except OSError:
        return "-"


def _version_in(info: dict[str, Any]) -> str:
    """What a file system's listing tells of a file's version; empty if nothing."""
    marks = (
        "ETag",
        "etag",
        "md5Hash",
        "blob_id",
        "content_settings",
        "LastModified",
        "last_modified",
        "mtime",
        "created",
    )
    mark = next((info[name] for name in marks if info.get(name)), None)
    return "" if info.get("size") is None else f"{info['size']}-{mark}"


def _side_by_side(work: Callable[[str], str], urls: list[str]) -> list[str]:
    """work(url) of each: what takes time is waiting for the other side."""
    with ThreadPoolExecutor(16) as threads:
        try:
            return list(threads.map(work, urls))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    check_protocol(url.partition("://")[0], _public(url))
    return fsspec.core.url_to_fs(url)


@contextmanager
def _naming(url: str) -> Iterator[None]:
    """Turn whatever a file system's library raises into OSError that names the URL."""
    try:
        yield
    except (BadVideo, UserError, MemoryError):
        raise
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        text = printable(str(error).replace(url, _public(url))) or type(error).__name__
        raise kind(f"{_public(url)}: {text}") from error
