"""What could not be used, with reasons; and how to try it again."""

from collections.abc import Iterator
from dataclasses import dataclass

from data_tools.job import SCHEMAS, Job
from data_tools.probe import probe_key


@dataclass(kw_only=True, slots=True)
class Held:
    """A file or clip in quarantine."""

    stage: str
    name: str
    """Of the source, or the clip's key."""
    reason: str
    key: str
    """Key of its row."""


def held(job: Job) -> Iterator[Held]:
    """Everything in quarantine under the present settings."""
    for source in job.sources():
        if source.reason:
            yield Held(stage="probe", name=source.name, reason=source.reason, key="")
    names = {probe_key(source): source.name for source in job.sources() if not source.reason}
    for stage in SCHEMAS:
        for key, row in job.table(stage).read().items():
            if stage == "probe" and key in names and not row["reason"]:
                names[row["sha256"]] = names[key]
            if row["reason"] and (stage != "probe" or key in names):
                yield Held(stage=stage, name=names.get(key, key), reason=row["reason"], key=key)


def show(job: Job) -> None:
    """Print what is in quarantine."""
    found = list(held(job))
    for one in found:
        print(f"{one.stage:<8} {one.name}: {one.reason}")
    print(f"{len(found)} in quarantine" + ("; `sora-data quarantine retry` lets them be tried again" if found else ""))


def retry(job: Job) -> None:
    """Forget why they are there, so that the next call of their stage tries again."""
    found = list(held(job))
    for stage in {one.stage for one in found}:
        job.table(stage).forget({one.key for one in found if one.stage == stage})
    print(f"{len(found)} taken out of quarantine; the next call of `sora-data run` or of their stage tries them again")
