"""What stages keep on disk, damaged: it is named, or made anew, and never believed."""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hostile_files as hostile
import numpy as np
import pytest
from data_runs import printed_by

from data_tools import pack
from data_tools.cli import main
from data_tools.job import Job
from data_tools.pool import run_tasks
from sora_lite.errors import UserError

SETTINGS = ("workers=0", "dedupe.near=false", "split.detector=none", "validation_fraction=0.3", "pack.preset=ultrafast")


@dataclass(kw_only=True)
class State:
    """Folders to copy and damage."""

    videos: Path
    done: Path
    """A data set that is finished."""
    half: Path
    """The same with everything encoded, and no shard yet."""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> State:
    root = tmp_path_factory.mktemp("state")
    found = State(videos=root / "videos", done=root / "done", half=root / "half")
    found.videos.mkdir()
    for kind in ("mp4", "gif", "png", "avi"):
        (found.videos / f"a.{kind}").write_bytes(hostile.good(kind))
    assert main(["run", str(found.videos), str(found.done), *SETTINGS]) == 0
    assert main(["probe", str(found.videos), str(found.half), *SETTINGS]) == 0
    for stage in ("split", "score"):
        assert main([stage, str(found.half)]) == 0
    job = Job.resume(found.half, [])
    plan, parts = job.run("caption"), job.table("encode").folder / pack.PARTS
    parts.mkdir(parents=True)
    for unit in pack.units(plan.left(), plan.scores, parts, job.config):
        pack.work(unit.task)
    return found


def damages(content: bytes, flips: int) -> Iterator[bytes]:
    """What a disk, a hasty hand or another program makes of a file."""
    rng = np.random.default_rng(len(content))
    yield from (b"", content[: len(content) // 2], rng.bytes(len(content)), b"PAR1" + rng.bytes(99) + b"PAR1")
    if flips > 1:
        yield from (content[:-1], content[8:], bytes(len(content)))
    for _ in range(flips):
        flipped = bytearray(content)
        flipped[rng.integers(0, len(content))] ^= 1 << int(rng.integers(0, 8))
        yield bytes(flipped)


OTHER_JSON = [
    *("[]", "3", '"x"', "null", "[" * 50_000, '{"a": 1}', '{"schema_version": 2}', '{"probe": 3}'),
    '{"split": {"fps": "x"}}',
    '{"workers": [1]}',
    '{"caption": {"command": 3}}',
    '{"shards": [1]}',
    "\0",
]


def shards_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".parquet")}


def damaged_states(state: State, flips: int) -> Iterator[tuple[str, Path, bytes, list[str]]]:
    """(what, file in a copy, its damaged content, command)"""
    for base, command in ((state.half, ["pack"]), (state.done, ["run", str(state.videos)])):
        for path in sorted(path for path in base.rglob("*") if path.is_file() and path.name != ".lock"):
            if path.name == "report.json" or (base is state.done and ".work" in path.parts):
                continue
            others = [text.encode() for text in OTHER_JSON] if path.suffix == ".json" else []
            # a flipped bit may make of settings others that are as good
            for content in [*damages(path.read_bytes(), 0 if path.name == "settings.json" else flips), *others]:
                yield base.name, path.relative_to(base), content, command


def check_damaged_states(state: State, tmp_path: Path, capsys: pytest.CaptureFixture, flips: int) -> Counter[str]:
    """Each is mended without a word, or named with its cure, which helps. Returns how often it went which way."""
    expected, ways, cured = shards_in(state.done), Counter[str](), set[Path]()
    for name, path, content, (verb, *words) in damaged_states(state, flips):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(state.done.parent / name, folder)
        (folder / path).write_bytes(content)
        status, text = printed_by(capsys, verb, *words, folder, *(SETTINGS if verb == "run" else ()))
        what = f"{name}/{path} {content[:30]!r} {len(content)}"
        ways[f"{path.suffix} {status}"] += 1
        if status == 0:
            if path.suffix != ".tar" or name == "half":  # `run` reads finished tars where it has to, and no more
                assert shards_in(folder) == expected, what
            continue
        line = text.splitlines()[-1]
        assert status == 2 and line.startswith("error: ") and path.name in line, (what, line)
        if name == "half" and path not in cured:
            cured.add(path)
            (folder / path).unlink()
            assert main(["run", str(state.videos), str(folder), *SETTINGS]) == 0
            assert shards_in(folder) == expected, what
    return ways


def test_a_damaged_state_is_named_or_mended(state: State, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ways = check_damaged_states(state, tmp_path, capsys, flips=1)
    assert min(ways[f"{suffix} 2"] for suffix in (".json", ".parquet", ".tar")) > 3 and ways[".tar 0"] > 3


@pytest.mark.slow
def test_flipped_bits_of_the_state(state: State, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert check_damaged_states(state, tmp_path, capsys, flips=40).total() > 500


def test_a_full_disk_is_no_fault_of_a_video(state: State, tmp_path: Path) -> None:
    job = Job.resume(state.half, [])
    plan = job.run("caption")
    unit = pack.units(plan.left(), plan.scores, tmp_path / "gone", job.config)[0]
    with pytest.raises(UserError, match=r"gone/.*\.tar: cannot be written \(No such file or directory\)"):
        list(run_tasks(pack.work, [("a", unit.task)], workers=0, stall_seconds=1, memory_mb=64))
