"""What is known of files beforehand: rows of metadata.jsonl or of a list (.csv, .parquet, .jsonl).

A row names its file by `file_name`, in a list also by `path`, `url` or `video`. Known columns: `caption` or `captions`,
`label` (an integer), `group` (sources of one group are never in both train and validation). All others are kept with
each clip under `extra`.
"""

import codecs
import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.locations import is_url, printable, public_name, read_small
from sora_lite.data.video import BadVideo
from sora_lite.errors import UserError

LISTS = (".csv", ".parquet", ".jsonl")
LARGEST_LIST = 4 << 30
"""Bytes."""
LARGEST_ROW = 1 << 20
"""Bytes of what a list says of one file, all of which is kept with each of its clips."""
DEEPEST_ROW = 32
"""Lists and objects inside each other."""
FILE_COLUMNS = ("file_name", "path", "url", "video")
"""Columns of a list that may name the file; the first of them that a row has does."""


@dataclass(kw_only=True, slots=True)
class Row:
    """What metadata.jsonl or a list says of one file."""

    captions: list[str] = field(default_factory=list)
    label: int | None = None
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read_rows(where: str, locate: Callable[[str], str], columns: tuple[str, ...]) -> dict[str, Row]:
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
        raise UserError(f"{public_name(where)}: {printable(str(error))}; check the list's name and access.") from None
    except (ValueError, RecursionError, pa.ArrowException) as error:
        where, cure = (f"{public_name(where)}, {place}", place.split()[0]) if place else (public_name(where), "list")
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
                    raise ValueError(
                        f"the first line must name columns, once each, one of {', '.join(FILE_COLUMNS)} among them"
                    )
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
