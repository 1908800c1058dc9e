"""Shards, indexes and manifests of others that mean harm: they are refused in one line, or read for what they are."""

import contextlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files as hostile
import pytest
from data_runs import printed_by, snapshot
from hostile_shards import Shards

from data_tools.cli import main
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipReader
from sora_lite.data.shards import DamagedSample
from sora_lite.data.video import BadVideo
from sora_lite.errors import UserError


def broken(change: Callable[[Shards], None]) -> Callable[[], Shards]:
    def make() -> Shards:
        shards = Shards(removed=["gone"])
        for key in ("gone", "kept"):
            shards.add(key, hostile.good("mp4"))
        change(shards)
        return shards

    return make


def add_member(shards: Shards, name: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/hostname"
    member.size = 3 if kind == tarfile.REGTYPE else 0
    shards.members.append((member, b"abc" if member.size else b""))


def keyed(key: str, **how: Any) -> Callable[[Shards], None]:
    return lambda shards: shards.add(key, hostile.good("mp4"), **how)


def placed(**place: Any) -> Callable[[Shards], None]:
    return lambda shards: shards.rows[1].update(place)


OF_OTHERS = {
    "up": keyed("../../escaped"),
    "absolute": keyed("/escaped"),
    "dots": keyed(".."),
    "nothing": keyed(""),
    "long": keyed("k" * 200),
    "newline": keyed("a\nerror: b"),
    "terminal": keyed("\x1b]0;title\x07\x1b[2J"),
    "twice": keyed("kept"),
    "ext": keyed("other", ext="mp4/../../../escaped"),
    "program": keyed("other", ext="sh"),
    "link": keyed("other", kind=tarfile.SYMTYPE),
    "hard link": keyed("other", kind=tarfile.LNKTYPE),
    "device": keyed("other", kind=tarfile.CHRTYPE),
    "pipe": keyed("other", kind=tarfile.FIFOTYPE),
    "folder": keyed("other", kind=tarfile.DIRTYPE),
    "more": lambda shards: add_member(shards, "../../escaped", tarfile.REGTYPE),
    "more links": lambda shards: add_member(shards, "escaped", tarfile.SYMTYPE),
    "before": placed(media_offset=-512),
    "beyond": placed(media_offset=2**62),
    "backwards": placed(media_size=-1),
    "endless": placed(media_size=2**62, json_size=2**40),
    "no frames": placed(frames=0),
    "negative": placed(frames=-5, height=-1),
    "many frames": placed(frames=2**31 - 1),
    "no rate": placed(fps=float("nan")),
    "nothing known": placed(frames=None, crc32c=None),
    "captions": keyed("other", captions=7, label="x"),
    "deep": keyed("other", extra=json.loads("[" * 600 + "]" * 600)),
    "no source": keyed("other", source=3),
    "playlist": lambda shards: shards.add("other", hostile.playlists(Path("/etc/hostname"), "http://a")["concat"]),
    "bomb": lambda shards: shards.add("other", hostile.BOMBS["frames 1e8.mp4"][0]()),
    "split": lambda shards: setattr(shards, "split", "../../escaped"),
    "path": lambda shards: setattr(shards, "name", "../../escaped"),
    "name": lambda shards: setattr(shards, "name", "\x1b[2J-000000"),
    "editions": lambda shards: setattr(shards, "name", "train-000000.x"),
}


HARMLESS = (None, "deep")


@pytest.mark.parametrize("what", [None, *OF_OTHERS])
def test_shards_of_others(what: str | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever a consistent folder of shards holds: it is found, and nothing leaves the folder."""
    shards = broken(OF_OTHERS[what] if what else lambda _: None)()
    root = tmp_path / "a/b"
    shards.write(root / "shards")
    before = snapshot(tmp_path)
    whole = [printed_by(capsys, "verify", root / "shards", "workers=1")]
    whole += [
        printed_by(capsys, "compact", root / "shards"),
        printed_by(capsys, "verify", root / "shards", "workers=0"),
    ]
    statuses = [status for status, _ in whole]
    assert statuses == [0, 0, 0] if what in HARMLESS else statuses[0] == 2 and set(statuses) <= {0, 2}, whole
    for _, text in whole:
        assert all(line.isprintable() for line in text.replace("\r", "\n").splitlines()), text
    assert snapshot(tmp_path) == before
    with contextlib.suppress(UserError):
        index = Index.load(root / "shards", "train")
        reader = ClipReader(index, cache_bytes=0)
        for sample in range(len(index)):
            with contextlib.suppress(DamagedSample, BadVideo):
                assert reader.read(sample, (hostile.FRAMES, 48, 64)).frames.shape == (hostile.FRAMES, 48, 64, 3)
    assert snapshot(tmp_path) == before


def test_links_where_files_are_written_are_not_followed(tmp_path: Path) -> None:
    shards = broken(lambda _: None)()
    shards.write(tmp_path / "shards")
    for name in (".lock", "train-000000.1.tar.partial", "train-000000.1.tar", "manifest.json.partial"):
        (tmp_path / "shards" / name).symlink_to(tmp_path / "canary.txt")
    for content in (None, "a secret"):
        if content is not None:
            (tmp_path / "canary.txt").write_text(content)
        assert main(["compact", str(tmp_path / "shards")]) in (0, 2)
        assert (tmp_path / "canary.txt").exists() == (content is not None)
    assert (tmp_path / "canary.txt").read_text() == "a secret"
