"""`sora-data` that is killed, called again, or given other sources: not a byte differs, and nothing leaks."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from data_runs import files_of, noise, records_of, samples_of, sora_data

from sora_lite.data.manifest import Manifest
from sora_lite.data.video import write_mp4


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Videos that fill several shards of 1 MiB, and the files that an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "videos").mkdir()
    for i in range(16):
        write_mp4(folder / "videos" / f"{i}.mp4", noise(i, frames=34), 8, crf=10)
    assert sora_data(*many_run(folder / "videos", folder / "shards"), "workers=0") == 0
    assert len(Manifest.load(folder / "shards").shards) >= 4
    return folder / "videos", files_of(folder / "shards")


def many_run(videos: Path, shards: Path) -> tuple[object, ...]:
    return (
        "run",
        videos,
        shards,
        "pack.shard_mb=1",
        "split.clip_frames=17",
        "split.detector=none",
        "validation_fraction=0.2",
        "pack.crf=10",
        "pack.preset=ultrafast",
    )


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_tools", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_workers_do_not_change_a_byte(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    videos, expected = many
    assert sora_data(*many_run(videos, tmp_path / "s"), "workers=2") == 0
    assert files_of(tmp_path / "s") == expected


def test_kill_9_at_any_time_does_not_change_a_byte(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    videos, expected = many
    shards = tmp_path / "s"

    def committed() -> int:
        path = shards / "manifest.json"
        return len(json.loads(path.read_text())["pending"]) if path.exists() else 0

    for state in ("probing", "packing", "one shard", "three shards"):
        job = start(*many_run(videos, shards), "workers=0")
        reached = {
            "probing": lambda: any((shards / ".work").glob("probe/*/*.parquet")),
            "packing": lambda: any(shards.glob("*.tar.partial")),
            "one shard": lambda: committed() >= 1,
            "three shards": lambda: committed() >= 3,
        }[state]
        while not reached() and job.poll() is None:
            time.sleep(0.002)
        job.kill()
        job.wait()
    assert 3 <= committed() < len(json.loads(expected["manifest.json"])["shards"]), "killed too late to show anything"
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("*.tar") if committed()}
    assert sora_data(*many_run(videos, shards), "workers=0") == 0
    assert files_of(shards) == expected
    assert sum(path.stat().st_mtime_ns == then for path, then in kept.items()) >= 3, "committed shards were rewritten"


def test_a_killed_parent_leaves_no_workers_and_a_second_run_is_kept_out(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    videos, expected = many
    job = start(*many_run(videos, tmp_path / "s"), "workers=2")
    while not any((tmp_path / "s").glob("*.tar.partial")):
        assert job.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(job.pid).children(recursive=True)
    assert sora_data(*many_run(videos, tmp_path / "s"), "workers=0") == 2
    assert "another sora-data" in capsys.readouterr().err
    os.kill(job.pid, 9)
    job.wait()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert sora_data(*many_run(videos, tmp_path / "s"), "workers=0") == 0
    assert files_of(tmp_path / "s") == expected


def test_verify_finds_any_flipped_byte(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    _, expected = many
    rng = np.random.default_rng(0)
    names = sorted(name for name in expected if name.endswith((".tar", ".parquet")))
    for name, content in expected.items():
        (tmp_path / name).write_bytes(content)
    assert sora_data("verify", tmp_path, "workers=0") == 0
    for name in (names[0], names[1], names[-1], names[-2]):
        bad = bytearray(expected[name])
        bad[rng.integers(0, len(bad))] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / name).write_bytes(bad)
        assert sora_data("verify", tmp_path, "workers=0") == 2
        (tmp_path / name).write_bytes(expected[name])


def test_stages_alone_add_up_to_a_run(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    videos, expected = many
    words = many_run(videos, tmp_path / "s")[3:]
    assert sora_data("probe", videos, tmp_path / "s", *words, "workers=0") == 0
    assert sora_data("score", tmp_path / "s") == 2
    for stage in ("split", "score", "filter", "dedupe", "caption", "pack"):
        assert sora_data(stage, tmp_path / "s") == 0
    assert files_of(tmp_path / "s") == expected


def records(folder: Path) -> set[tuple[str, str]]:
    """(source, key) of all samples that readers see."""
    return {
        (meta["source"]["id"], key)
        for split in Manifest.load(folder).splits
        for key, (_, meta) in samples_of(folder, split).items()
    }


def test_new_sources_become_new_shards_and_what_is_taken_down_stays_away(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    videos, _ = many
    (tmp_path / "v").mkdir()
    for path in sorted(videos.iterdir())[:6]:
        shutil.copy2(path, tmp_path / "v")
    run = (*many_run(tmp_path / "v", tmp_path / "s"), "workers=0")
    assert sora_data(*run) == 0
    first = Manifest.load(tmp_path / "s")
    splits = {name: split for split in first.splits for name, _ in records_of(tmp_path / "s", split)}

    for path in sorted(videos.iterdir())[6:]:
        shutil.copy2(path, tmp_path / "v")
    shutil.copy2(tmp_path / "v" / "0.mp4", tmp_path / "v" / "copy.mp4")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.tar")}
    assert sora_data(*run) == 0
    assert "copy.mp4" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    second = Manifest.load(tmp_path / "s")
    assert second.shards[: len(first.shards)] == first.shards and len(second.shards) > len(first.shards)
    assert {name for name, _ in records(tmp_path / "s")} == {path.name for path in videos.iterdir()}
    now = {name: split for split in second.splits for name, _ in records_of(tmp_path / "s", split)}
    assert {name: now[name] for name in splits} == splits
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0

    all_of_them = sorted(records(tmp_path / "s"))
    key = all_of_them[0][1]
    other = next(key for name, key in all_of_them if name == "5.mp4")
    assert sora_data("remove", tmp_path / "s", "nonsense", key) == 2
    assert "nonsense" in capsys.readouterr().err
    assert sora_data("remove", tmp_path / "s", key, other[:16]) == 0
    left = {(one, k) for one, k in all_of_them if k != key and one != "5.mp4"}
    assert records(tmp_path / "s") == left
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0
    size = sum(path.stat().st_size for path in (tmp_path / "s").glob("*.tar"))
    assert sora_data("compact", tmp_path / "s") == 0
    assert records(tmp_path / "s") == left
    assert sum(path.stat().st_size for path in (tmp_path / "s").glob("*.tar")) < size
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0
    assert sora_data(*run) == 0
    assert records(tmp_path / "s") == left
    counts = Manifest.load(tmp_path / "s").counts
    assert (counts["sources_removed"], counts["clips_removed"], counts["sources_duplicate"]) == (1, 1, 1)


def killed_while_packing(*words: object) -> None:
    """Run until the first shard is committed, then kill -9."""
    manifest = Path(str(words[2])) / "manifest.json"
    job = start(*words)
    while job.poll() is None and not (manifest.exists() and json.loads(manifest.read_text())["pending"]):
        time.sleep(0.002)
    job.kill()
    job.wait()
    assert json.loads(manifest.read_text())["pending"], "it ended before it could be killed"


def test_sources_that_change_after_a_kill_leak_nothing(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """The one source that is held out, as nothing else is, may be another one with more sources."""
    videos, _ = many
    (tmp_path / "v").mkdir()
    for path in sorted(videos.iterdir())[:8]:
        shutil.copy2(path, tmp_path / "v")
    words = ("run", tmp_path / "v", tmp_path / "s", "pack.shard_mb=1", "split.clip_frames=17", "split.detector=none")
    words += ("validation_fraction=0.000001", "pack.crf=10", "pack.preset=ultrafast", "workers=0")
    killed_while_packing(*words)
    for path in sorted(videos.iterdir())[8:]:
        shutil.copy2(path, tmp_path / "v")
    assert sora_data(*words) == 0
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0
    assert {name for name, _ in records(tmp_path / "s")} == {path.name for path in videos.iterdir()}


def test_another_rate_after_a_kill_packs_the_right_frames(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    for i in range(8):
        write_mp4(tmp_path / "v" / f"{i}.mp4", noise(i, frames=64), 24, crf=4)
    words = ("run", tmp_path / "v", tmp_path / "s", "split.clip_frames=64", "split.min_frames=2", "pack.crf=4")
    words += ("split.detector=none", "pack.shard_mb=1", "workers=0")
    killed_while_packing(*words, "split.fps=24")
    (tmp_path / "s" / "manifest.json").unlink()  # as if it had been killed before the first shard
    assert sora_data(*words, "split.fps=8") == 0
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0
    assert (
        not list((tmp_path / "s" / ".work").glob("encode/*/parts/*.tar"))
        or len(list((tmp_path / "s" / ".work").glob("encode/*"))) == 2
    )


def test_groups_and_what_was_taken_down_are_remembered(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By later runs that list none of the sources that are in the shards already."""
    words = (tmp_path / "s", "split.detector=none", "validation_fraction=0.3", "workers=0", "pack.preset=ultrafast")
    for turn in range(2):
        folder = tmp_path / f"{turn}"
        folder.mkdir()
        rows = []
        for i in range(6):
            write_mp4(folder / f"{turn}_{i}.mp4", noise(10 * turn + i), 8, crf=30)
            rows.append(json.dumps({"file_name": f"{turn}_{i}.mp4", "group": f"g{i}"}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(rows))
        assert sora_data("run", folder, *words) == 0
    sides = {
        split: {meta["group"] for _, meta in samples_of(tmp_path / "s", split).values()}
        for split in ("train", "validation")
    }
    assert sides["train"] and sides["validation"] and not sides["train"] & sides["validation"]

    _, meta = next(iter(samples_of(tmp_path / "s", "train").values()))
    name = meta["source"]["id"]
    assert sora_data("remove", tmp_path / "s", meta["source"]["sha256"][:16]) == 0
    (tmp_path / "twin").mkdir()
    with av.open(str(tmp_path / name[0] / name)) as old, av.open(str(tmp_path / "twin" / "a.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    write_mp4(tmp_path / "twin" / "b.mp4", noise(99), 8, crf=30)
    assert sora_data("run", tmp_path / "twin", *words) == 0
    counts = Manifest.load(tmp_path / "s").counts
    assert (counts["sources_removed"], counts["sources_packed"]) == (1, 1)
