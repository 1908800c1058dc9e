"""Shards that others wrote: indexed as they lie, read frame by frame, trained on; and what is wrong is named."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import stamped
import webdataset
from data_runs import sora_data
from tiny_inputs import Tiny, call

from sora_lite.data.buckets import Row
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipLoader, ClipReader
from sora_lite.data.manifest import Manifest
from sora_lite.evaluation.record import read_record

Members = Iterable[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def left_out(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    return {line["name"]: line["reason"] for line in lines}


def everything(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Captions and label of each sample, by key, in both splits."""
    found = {}
    for split in ("train", "validation"):
        index = Index.load(folder, split)
        reader = ClipReader(index, cache_bytes=0)
        found |= {index.key(i): (reader.captions(i), int(index.label[i])) for i in range(len(index))}
    return found


@pytest.fixture(scope="module")
def mp4() -> bytes:
    """As ffmpeg writes by default: open groups, B-frames, another rate."""
    return stamped.h264(":open-gop=1")


def test_what_webdataset_writes_is_trained_on(tiny: Tiny, tiny_mp4s: list[bytes], tmp_path: Path) -> None:
    """ShardWriter's own shards, read only, with the index elsewhere."""
    folder, out = tmp_path / "theirs", tmp_path / "index"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=10, verbose=0) as writer:
        for i, clip in enumerate(tiny_mp4s):
            writer.write({"__key__": f"set.v1/clip {i:03d}", "mp4": clip, "txt": f"digit é {i}", "cls": i % 10})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sora_data("index", folder, out, "validation_fraction=0.3", "workers=2") == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and len(before) == 3
    assert everything(out) == {f"set.v1/clip {i:03d}": ([f"digit é {i}"], i % 10) for i in range(24)}
    assert set(Manifest.load(out).splits) == {"train", "validation"}
    theirs = webdataset.WebDataset([str(path) for path in sorted(folder.iterdir())], shardshuffle=False)
    assert {sample["__key__"] for sample in theirs} == set(everything(out))
    assert sora_data("verify", out, "workers=0") == 0
    words = [
        "experiment=tiny",
        "run.name=others",
        f"run.root={tmp_path}",
        f"data.shards={out}",
        "run.validation_samples=2",
    ]
    assert call("train", *words, f"vae_from={tiny.vae}", "data.flip=true") == 0
    assert [record["step"] for record in read_record(tmp_path / "others/metrics.jsonl")][-1] == 4


def test_the_layout_of_video2dataset(mp4: bytes, tmp_path: Path) -> None:
    """KEY.mp4, KEY.txt, KEY.json with its own fields; two shards that number alike; clips of one video together."""
    folder = tmp_path / "v2d"
    for shard in range(2):
        members = []
        for i in range(12):
            key = f"{i:05d}_{i % 3:05d}"
            fields = {
                "url": f"https://a/{i // 3}.mp4",
                "caption": f"no {i}",
                "key": key,
                "status": "success",
                "clips": [[0, 1]],
            }
            members += [(f"{key}.mp4", mp4), (f"{key}.json", json.dumps(fields).encode())]
            members += [(f"{key}.txt", f"text {i}".encode())] if i % 2 else []
            members += [(f"{key}.m4a", b"sound")]
        write_tar(folder / f"0000{shard}.tar", members)
    assert sora_data("index", folder, "validation_fraction=0.5", "workers=0") == 0
    found = everything(folder)
    expected = {
        f"0000{shard}/{i:05d}_{i % 3:05d}": ([f"text {i}" if i % 2 else f"no {i}"], -1)
        for shard in range(2)
        for i in range(12)
    }
    assert found == expected
    parts = [set(Index.load(folder, split).source.tolist()) for split in ("train", "validation")]
    assert parts[0] and parts[1] and not parts[0] & parts[1] and len(parts[0] | parts[1]) == 4


def test_stills_in_all_their_kinds(tmp_path: Path) -> None:
    kinds = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "webp": "webp"}
    members = [
        member
        for ext, kind in kinds.items()
        for member in ((f"a.b/{ext}.{ext.upper()}", stamped.still(kind)), (f"a.b/{ext}.txt", b" a picture \n"))
    ]
    write_tar(tmp_path / "deep/below/00.tar", members)
    assert sora_data("index", tmp_path / "deep", "validation_fraction=0", "workers=0") == 0
    assert everything(tmp_path / "deep") == {f"a.b/{ext}": (["a picture"], -1) for ext in kinds}
    index = Index.load(tmp_path / "deep", "train")
    clip = ClipReader(index, cache_bytes=0).read(1, (1, 48, 64))
    assert stamped.read_stamp(clip.frames[0]) == 0 and set(index.frames.tolist()) == {1}


def test_an_image_set_is_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    """`jpg` and `txt`, as sets of pictures are spread."""
    folder, index = tmp_path / "theirs", tmp_path / "index"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=5, verbose=0) as writer:
        for i in range(12):
            writer.write({"__key__": f"{i:09d}", "jpg": stamped.still("jpeg"), "txt": f"picture {i}"})
    assert sora_data("index", folder, index, "validation_fraction=0", "workers=0") == 0
    assert everything(index) == {f"{i:09d}": ([f"picture {i}"], -1) for i in range(12)}
    words = ["experiment=tiny", "run.name=stills", f"run.root={tmp_path}", f"data.shards={index}"]
    words += ["data.buckets=[{resolution: [32, 32], frames: 1, batch: 8}]", "run.steps=2", "run.validation_samples=0"]
    assert call("train", *words, f"vae_from={tiny.vae}", "model.num_classes=0") == 0
    lines = [line for line in read_record(tmp_path / "stills/metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2] and all(line["clips_1x32x32"] == 8 for line in lines)
    assert all(line["bad_samples"] == 0 and line["loss"] > 0 for line in lines)


@pytest.mark.parametrize(
    "name", ["h264_open", "edit_list_open", "vfr_mp4", "wide_pixels", "h264_open_mkv", "hevc_open"]
)
def test_frames_are_exact_from_any_start(name: str, tmp_path: Path) -> None:
    ext = "mkv" if name.endswith("mkv") else "mp4"
    write_tar(tmp_path / "0.tar", [(f"a.{ext}", stamped.MAKERS[name]())])
    assert sora_data("index", tmp_path, "validation_fraction=0", "workers=0") == 0
    index = Index.load(tmp_path, "train")
    stamps, reader, own = stamped.STAMPS[name], ClipReader(index, cache_bytes=0), float(index.fps[0])
    shape = (6, int(index.height[0]), int(index.width[0]))
    assert int(index.frames[0]) == len(stamps)
    assert shape[2] / shape[1] == pytest.approx((16 if name == "wide_pixels" else 12) / 9, rel=0.01)
    times = (
        np.cumsum([0] + np.diff(stamped.uneven()).tolist()) / 25 if name == "vfr_mp4" else np.arange(len(stamps)) / 25
    )
    for fps in (None, 5.0, 11.0):
        spare = reader.spare(0, 6, fps)
        assert spare > 0
        for start in {0, 1, spare // 2, spare - 1, spare}:
            found = [stamped.read_stamp(frame) for frame in reader.read(0, shape, fps, start).frames]
            if fps is None:
                assert found == stamps[start : start + 6]
                continue
            wanted = start / own + np.arange(6) / fps
            places = np.searchsorted(times, wanted + 1e-9, side="right") - 1
            first = int(np.searchsorted(times, start / own - 1e-4))  # nothing from before the start is shown
            assert found == [stamps[place] for place in places.clip(first)], (fps, start)


HOSTILE: dict[str, tuple[Callable[[bytes], Members], str]] = {
    "no media": (lambda mp4: [("bad.txt", b"x"), ("bad.json", b"{}")], "holds no video or still"),
    "apart": (lambda mp4: [("bad.mp4", mp4), ("good2.mp4", mp4), ("bad.txt", b"x")], "do not lie together"),
    "twice": (lambda mp4: [("bad.mp4", mp4), ("good2.mp4", mp4), ("bad.mp4", mp4)], "another has its key"),
    "two media": (lambda mp4: [("bad.mp4", mp4), ("bad.mp4", mp4)], "two members .mp4"),
    "cut video": (lambda mp4: [("bad.mp4", mp4[: len(mp4) // 2])], "mov header cannot be read"),
    "no video": (lambda mp4: [("bad.mp4", b"hello" * 100)], "not a video container"),
    "playlist": (lambda mp4: [("bad.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")], "not a video container"),
    "json": (lambda mp4: [("bad.mp4", mp4), ("bad.json", b"{")], "words cannot be read"),
    "deep json": (lambda mp4: [("bad.mp4", mp4), ("bad.json", b"[" * 100_000)], "words cannot be read"),
    "list": (lambda mp4: [("bad.mp4", mp4), ("bad.json", b"[1]")], "words cannot be read"),
    "caption": (lambda mp4: [("bad.mp4", mp4), ("bad.json", b'{"caption": 3}')], "captions are no list of texts"),
    "half a pair": (lambda mp4: [("bad.mp4", mp4), ("bad.json", b'{"caption": "\\ud800"}')], "no list of texts"),
    "text": (lambda mp4: [("bad.mp4", mp4), ("bad.txt", b"\xff")], "holds no text"),
    "label": (lambda mp4: [("bad.mp4", mp4), ("bad.cls", b"cat")], "label 'cat' is no whole number"),
    "below": (lambda mp4: [("bad.mp4", mp4), ("bad.cls", b"-1")], "is no whole number"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_wrong_is_named_and_left_out(what: str, mp4: bytes, tmp_path: Path) -> None:
    make, reason = HOSTILE[what]
    write_tar(tmp_path / "0.tar", [("good.mp4", mp4), *make(mp4), ("last.mp4", mp4)])
    assert sora_data("index", tmp_path, "validation_fraction=0", "workers=0") == 0
    found = everything(tmp_path)
    assert {"good", "last"} <= set(found) <= {"good", "good2", "last"}
    assert reason in left_out(tmp_path)["bad"] and Manifest.load(tmp_path).counts["clips_left_out"] == 1


def test_names_that_lead_elsewhere_lead_nowhere(mp4: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "a/b/shards"
    names = ["../../escaped", "/etc/escaped", "..", "a\nerror: b", "\x1b]0;title\x07", "é 漢字.v2", "k" * 600]
    path = write_tar(
        folder / "0.tar", [*((f"{name}.mp4", mp4) for name in names), ("x.pkl", b"cos\nsystem\n"), ("y.pth", b"")]
    )
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "device")):
            member = tarfile.TarInfo(f"{name}.mp4")
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
    assert sora_data("index", folder, "validation_fraction=0", "workers=0") == 0
    printed = capsys.readouterr().out
    assert "never opened: 1 members of kind pkl" in printed
    assert all(line.isprintable() for line in printed.splitlines())
    assert set(everything(folder)) == {"../../escaped", "/etc/escaped", "..", "é 漢字.v2"}
    assert len(left_out(folder)) == 6
    assert {path.name for path in (tmp_path / "a").rglob("*") if path.is_file() and ".work" not in path.parts} == {
        "0.tar", "0.train.idx.parquet", "manifest.json", "left_out.jsonl", ".lock",
    }  # fmt: skip


@pytest.mark.parametrize("cut", ["in a member", "in a header", "all"])
def test_a_tar_that_is_cut_off(cut: str, mp4: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.mp4", mp4), ("b.mp4", mp4)])
    size = len(mp4) + -len(mp4) % 512 + 512
    with path.open("r+b") as file:
        file.truncate({"in a member": 2 * size - 1000, "in a header": size + 100, "all": 100}[cut])
    assert sora_data("index", tmp_path, "validation_fraction=0", "workers=0") == (2 if cut == "all" else 0)
    if cut == "all":
        assert "none of its samples can be used" in capsys.readouterr().err
        return
    assert set(everything(tmp_path)) == {"a"}
    assert any("cut off" in why for why in left_out(tmp_path).values())
    assert sora_data("verify", tmp_path, "workers=0") == 0, "what was left out is no fault"
    with path.open("r+b") as file:
        file.truncate(600)
    assert sora_data("verify", tmp_path, "workers=0") == 2
    assert "index them again with `sora-data index`" in capsys.readouterr().err


def test_a_second_call_goes_on_and_a_changed_tar_is_seen(
    mp4: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}.mp4", mp4)])
    assert sora_data("index", tmp_path, "validation_fraction=0", "workers=0") == 0
    first = (tmp_path / "manifest.json").read_bytes()
    kept = sorted((tmp_path / ".work/index").iterdir())
    for path in kept[1:]:
        path.unlink()  # as if it had been stopped
    stamp = kept[0].stat().st_mtime_ns
    assert sora_data("index", tmp_path, "validation_fraction=0", "workers=1") == 0
    assert (tmp_path / "manifest.json").read_bytes() == first and kept[0].stat().st_mtime_ns == stamp
    assert sorted((tmp_path / ".work/index").iterdir()) == kept
    write_tar(tmp_path / "1.tar", [("new.mp4", mp4), ("1.mp4", mp4)])
    assert sora_data("index", tmp_path, "validation_fraction=0", "workers=0") == 0
    assert set(everything(tmp_path)) == {"0", "1", "2", "new"}


def test_shards_of_others_are_never_changed(
    tiny: Tiny, mp4: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs = tmp_path / "theirs"
    write_tar(theirs / "0.tar", [("a.mp4", mp4), ("b.mp4", mp4)])
    write_tar(theirs / "1.tar", [("c.mp4", mp4)])
    assert sora_data("index", theirs, "validation_fraction=0", "workers=0") == 0
    assert sora_data("remove", theirs, "a") == 0 and set(everything(theirs)) == {"b", "c"}
    assert "the tars themselves stay as they are" in capsys.readouterr().out
    (tmp_path / "v").mkdir()
    (tmp_path / "v/a.mp4").write_bytes(mp4)
    for words in (["compact", theirs], ["run", tmp_path / "v", theirs, "workers=0"]):
        assert sora_data(*words) == 2 and "others made" in capsys.readouterr().err
    assert {path.name for path in theirs.glob("*.tar")} == {"0.tar", "1.tar"}
    assert sora_data("index", theirs, "validation_fraction=0", "workers=0") == 0  # what was taken down stays so
    assert set(everything(theirs)) == {"b", "c"}
    own = Path(shutil.copytree(tiny.shards, tmp_path / "own"))
    assert sora_data("index", own, "workers=0") == 2 and "packed" in capsys.readouterr().err
    assert sora_data("index", tmp_path / "own/none", "workers=0") == 2


def test_bucket_of_others_through_the_loader(mp4: bytes, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{i}.mp4", mp4) for i in range(4)])
    assert sora_data("index", tmp_path, "validation_fraction=0", "workers=0") == 0
    loader = ClipLoader(
        Index.load(tmp_path, "train"), [Row(shape=(9, 48, 48), keep=1.0, batch=4, fps=8.0)], seed=1, block_shards=1,
        flip=False, rank=0, world_size=1, accumulation=1, workers=0, cache_bytes=0, pin=False,
    )  # fmt: skip
    ((batch,),) = loader.steps(0, 1)
    assert {view.crop for view in batch.views} == {(16.0, 0.0, 112.0, 96.0)} and not batch.bad
    assert len({view.start for view in batch.views}) > 1 and max(view.start for view in batch.views) <= 48 - 26
