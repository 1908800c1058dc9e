"""The record of a run: `metrics.jsonl`, one JSON object per line, each with its `step`."""

import json
from pathlib import Path
from typing import Any

RECORD = "metrics.jsonl"


def read_record(path: Path) -> list[dict[str, Any]]:
    """All lines of a record; none if there is no file. A last line that a kill cut off is left out."""
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]
