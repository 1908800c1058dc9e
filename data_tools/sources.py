"""Which files are sources, and what metadata.jsonl says of them.

metadata.jsonl follows the videofolder convention of the Hugging Face `datasets` library: one JSON object per line with
`file_name` (relative to the folder). Known columns: `caption` or `captions`, `label` (an integer), `group` (sources of
one group are never in both train and validation). All others are kept with each clip under `extra`.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_lite.errors import UserError

EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".m2ts", ".mts"}
    | {".gif", ".png", ".jpg", ".jpeg", ".webp"}
)
METADATA = "metadata.jsonl"


@dataclass(kw_only=True, slots=True)
class Row:
    """What metadata.jsonl says of one file."""

    captions: list[str] = field(default_factory=list)
    label: int | None = None
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Source:
    """One file that may become clips."""

    path: Path
    name: str
    """Path relative to the folder, with forward slashes."""
    row: Row


def find_sources(folder: Path) -> list[Source]:
    """All media files under `folder`, by name, with their metadata. Hidden files and other types are passed over.

    Raises UserError if there are none, or if metadata.jsonl is wrong.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the first argument is the folder that holds the videos.")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
        ]
    rows = read_metadata(folder)
    found = sorted({*found, *rows})
    if not found:
        raise UserError(f"{folder}: holds no videos; these are looked for: {' '.join(sorted(EXTENSIONS))}.")
    return [Source(path=folder / name, name=name, row=rows.get(name, Row())) for name in found]


def read_metadata(folder: Path) -> dict[str, Row]:
    """Rows of FOLDER/metadata.jsonl by file name; none without that file. Raises UserError with the line's number."""
    path = folder / METADATA
    if not path.exists():
        return {}
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, row = _parse(json.loads(line))
            if name in rows:
                raise ValueError(f"file_name {name!r} stands in an earlier line too")
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"file_name {name!r} leads out of the folder")
            if not (folder / name).is_file():
                raise ValueError(f"file_name {name!r} does not exist in {folder}")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; mend or remove this line.") from None
        rows[name] = row
    return rows


def _parse(content: Any) -> tuple[str, Row]:
    if not isinstance(content, dict) or not isinstance(content.get("file_name"), str):
        raise ValueError('needs a JSON object with a text "file_name"')
    name = Path(content.pop("file_name")).as_posix()
    captions = content.pop("captions", None) or content.pop("caption", None) or []
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("caption must be a text, captions a list of texts")
    label, group = content.pop("label", None), content.pop("group", None)
    if label is not None and type(label) is not int:
        raise ValueError(f"label must be an integer, not {label!r}")
    return name, Row(captions=captions, label=label, group=None if group is None else str(group), extra=content)
