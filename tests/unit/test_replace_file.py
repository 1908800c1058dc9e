"""Files that several write at once, while others tidy up."""

import threading
from pathlib import Path

import pytest

from sora_lite.data.files import replace_file

ROUNDS = 60


def test_writers_of_one_file_and_a_tidier_do_not_hurt_each_other(tmp_path: Path) -> None:
    path = tmp_path / "part.tar"
    failed: list[OSError] = []

    def write(letter: int) -> None:
        try:
            for _ in range(ROUNDS):
                replace_file(path, bytes([letter]) * 100_000)
        except OSError as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in b"ab"]
    for writer in writers:
        writer.start()
    seen = tidied = 0
    while any(writer.is_alive() for writer in writers):
        for partial in tmp_path.glob("*.partial"):
            partial.unlink(missing_ok=True)
            tidied += 1
        if path.exists():
            content = path.read_bytes()
            assert content in (b"a" * 100_000, b"b" * 100_000)
            seen += 1
    assert not failed
    assert seen and tidied, "nothing happened at the same time"
    assert [found.name for found in tmp_path.iterdir()] == ["part.tar"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "no" / "file", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "folder", b"")
    assert [found.name for found in tmp_path.iterdir()] == ["folder"]
