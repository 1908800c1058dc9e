"""Which files are sources.

Sources are the media files of a folder, or the rows of a list (.csv, .parquet, .jsonl), on this machine or behind a
URL. A folder may hold metadata.jsonl, which follows the videofolder convention of the Hugging Face `datasets` library:
one JSON object per line with `file_name` (relative to the folder). `data_tools.lists` has the columns.
"""

import json
import os
import posixpath
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlsplit

import pyarrow as pa

from data_tools.lists import FILE_COLUMNS, LISTS, Row, read_rows
from data_tools.locations import (
    errors_named,
    filesystem,
    is_http,
    is_private,
    is_url,
    printable,
    public_name,
    version_in,
    versions_of,
)
from sora_lite.data.remote import check_protocol
from sora_lite.errors import UserError

EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".m2ts", ".mts"}
    | {".gif", ".png", ".jpg", ".jpeg", ".webp"}
)
METADATA = "metadata.jsonl"

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
        raise UserError(f"{public_name(where)}: holds no videos; these are looked for: {' '.join(sorted(EXTENSIONS))}.")
    return sorted(sources, key=lambda source: source.name)


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

    return read_rows(str(path), check, FILE_COLUMNS[:1])


def _in_list(where: str) -> list[Source]:
    folder = (where.split("?")[0] if is_url(where) else where).rpartition("/")[0]
    rows = read_rows(where, lambda name: _located(name, folder), FILE_COLUMNS)
    remote = [location for location in rows if is_url(location)]
    for protocol in {location.partition("://")[0] for location in remote if not is_http(location)}:
        check_protocol(protocol, public_name(where))
    seen = dict(zip(remote, versions_of(remote), strict=True))
    return [
        Source(location=location, name=_name_of(location, folder), row=row, seen=seen.get(location, ""))
        for location, row in rows.items()
    ]


def _in_remote_folder(url: str) -> list[Source]:
    url = url.rstrip("/")
    try:
        with errors_named(url):
            system, root = filesystem(url)
            found = {
                path.removeprefix(root.rstrip("/") + "/"): info for path, info in system.find(root, detail=True).items()
            }
    except OSError as error:
        raise UserError(f"{error}; check the URL and your access to it.") from None
    rows: dict[str, Row] = {}
    if METADATA in found:

        def check(name: str) -> str:
            if posixpath.normpath(name) not in found:
                raise ValueError(f"file_name {name!r} does not exist in {public_name(url)}")
            return posixpath.normpath(name)

        rows = read_rows(f"{url}/{METADATA}", check, FILE_COLUMNS[:1])
    names = [name for name in found if name in rows or _is_media(name)]
    known = {name: version_in(found[name]) for name in names}
    fresh = [name for name in names if not known[name]]
    known.update(zip(fresh, versions_of([f"{url}/{name}" for name in fresh]), strict=True))
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
    return public_name(location) if is_url(inside) or is_private(location) else printable(inside)
