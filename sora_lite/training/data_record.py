"""What a run's data did: figures for the record, and the list of samples that could not be read.

RUN/quarantine.jsonl    one line for each sample that was replaced: key, shard, reason, step, position, replaced_by
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from sora_lite.config import DataConfig
from sora_lite.data.batch import BadSample, ClipBatch
from sora_lite.data.loader import ClipLoader
from sora_lite.data.remote import ReadCounts
from sora_lite.errors import UserError
from sora_lite.parallel.env import Rank
from sora_lite.training.lines import Lines

QUARANTINE = "quarantine.jsonl"
A_HANDFUL = 10
"""Damaged samples that are no ground to stop, whatever their part."""
_READS = [one.name for one in fields(ReadCounts)]


class Quarantine:
    """The list of a run, over all its attempts. A step that comes again after a kill is listed once."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self._known: set[tuple[int, int, str]] = set()
        self.by_shard: Counter[str] = Counter()
        """Replaced samples of each shard."""
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith("\n"):  # a killed attempt may have left a piece of one
                self._remember(BadSample(**json.loads(line)))
        if lines and not lines[-1].endswith("\n"):
            path.write_text("".join(lines[:-1]))

    def add(self, samples: Sequence[BadSample]) -> None:
        """List samples that are not there yet."""
        self._lines.add([json.dumps(asdict(one)) for one in samples if self._remember(one)])

    def _remember(self, one: BadSample) -> bool:
        identity = (one.step, one.position, one.key)
        if identity in self._known:
            return False
        self._known.add(identity)
        self.by_shard[one.shard] += 1
        return True


class DataRecord:
    """Counts what the batches of this rank say of themselves, and joins it with the other ranks' at each log line.

    Raises UserError where the limits of `data` are broken.
    """

    def __init__(self, folder: Path, data: DataConfig, loader: ClipLoader, rank: Rank) -> None:
        self._path, self._data, self._loader, self._rank = folder / QUARANTINE, data, loader, rank
        self._quarantine: Quarantine | None = None
        self._reads = ReadCounts()
        self._seconds = 0.0
        self._clips = [0] * len(loader.order.buckets)
        self._bad: list[BadSample] = []
        self._restarts = 0
        self.seen = self.bad = 0
        """Samples of all ranks in this attempt, and those of them that were replaced."""

    def count(self, batches: Sequence[ClipBatch]) -> None:
        """Count a step's batches in."""
        for batch in batches:
            self._reads.add(batch.reads)
            self._seconds += batch.seconds
            self._clips[batch.bucket] += len(batch.keys)
            self._bad += batch.bad

    def line(self, step: int) -> dict[str, Any]:
        """Figures since the last line, over all ranks; `step` steps are done. A collective.

        Raises UserError, on all ranks, if more than `data.max_bad_fraction` of the samples were damaged.
        """
        reads = self._reads.take()
        mine = [getattr(reads, name) for name in _READS]
        mine += [self._seconds, self._loader.workers.restarts - self._restarts, len(self._bad), *self._clips]
        total = self._rank.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        seconds, restarts, bad, *clips = total[len(_READS) :]
        self._restarts, self._seconds = self._loader.workers.restarts, 0.0
        self._clips = [0] * len(clips)
        self.seen += int(sum(clips))
        self.bad += int(bad)
        listed = self._list_bad() if bad else None
        values: dict[str, Any] = {name: int(one) for name, one in zip(_READS, total, strict=False)}
        values |= {"decode_seconds": seconds, "worker_restarts": int(restarts), "bad_samples": int(bad), "padding": 0}
        for bucket, count in zip(self._loader.order.buckets, clips, strict=True):
            name = "clips_{}x{}x{}".format(*bucket.shape)
            values[name] = values.get(name, 0) + int(count)
        if listed:
            values["bad_by_shard"] = ", ".join(f"{shard} {count}" for shard, count in listed.most_common(5))
        passes = self._loader.order.passes(step - 1)
        for number, one in enumerate(passes):
            end = "" if len(passes) == 1 else f"_{number}"
            values |= {f"pass{end}": one, f"coverage{end}": one + 1 - math.ceil(one)}
        self._refuse_too_many()
        return values

    def _list_bad(self) -> Counter[str] | None:
        """Write down what was replaced on any rank; rank 0 knows how many of each shard."""
        together = self._rank.gather([asdict(one) for one in self._bad])
        self._last = next(one for part in reversed(together) for one in reversed(part))
        self._bad = []
        if not self._rank.is_main:
            return None
        if self._quarantine is None:
            self._quarantine = Quarantine(self._path)
        self._quarantine.add([BadSample(**one) for part in together for one in part])
        return self._quarantine.by_shard

    def _refuse_too_many(self) -> None:
        limit = self._data.max_bad_fraction
        if self.bad > A_HANDFUL and self.bad > limit * self.seen:
            given = [*self._data.folders, *self._data.latent_folders, *self._data.text_folders]
            verify = ", ".join(f"`sora-data verify {folder}`" for folder in given if folder)
            raise UserError(
                f"data.max_bad_fraction: {self.bad} of {self.seen} samples were damaged, more than {limit:.2%} (the "
                f"last: {self._last['shard']}, {self._last['reason']}); {self._path} lists them; run {verify}"
            )
