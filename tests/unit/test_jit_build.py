"""Who may compile, between real processes; what is compiled is not of interest here."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sora_lite.training.jit_build import build

BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
from torch.utils.cpp_extension import _get_build_directory
from pathlib import Path
from sora_lite.training.jit_build import build
def load():
    assert FileBaton(str(Path(_get_build_directory("op", False)) / "lock")).try_acquire()
    print("builds", flush=True)
    time.sleep(60)
load() if sys.argv[1] == "torch alone" else build("op", load, print)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "op"


@pytest.fixture
def builder(folder: Path) -> Callable[[str], subprocess.Popen]:
    """A process that builds, as torch alone does or our way."""
    started = []

    def start(how: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", BUILDER, how], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert "builds\n" in (process.stdout.readline() for _ in range(2))  # our way says first what it compiles
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("how", ["our way", "torch alone"])
def test_a_build_waits_for_a_living_one_and_clears_up_after_a_killed_one(
    folder: Path, builder: Callable[[str], subprocess.Popen], how: str
) -> None:
    other, said, results = builder(how), [], []
    (folder / "half.o").write_text("")
    waiting = threading.Thread(target=lambda: results.append(build("op", lambda: "built", said.append)))
    waiting.start()
    time.sleep(1.5)
    assert results == [] and (folder / "lock").exists()
    other.kill()
    other.wait()
    waiting.join(20)
    assert results == ["built"]
    assert list(folder.iterdir()) == []
    if how == "torch alone":
        assert said.pop(0) == f"{folder}/lock: process {other.pid} compiles; waiting for it"
    assert said[0] == f"{folder}/lock: was left by a process that was killed while it compiled; removed"
    assert said[1:] == [f"compiling op in {folder}: once, some minutes"]


def test_what_is_compiled_is_only_loaded(folder: Path) -> None:
    said: list[str] = []
    folder.mkdir()
    (folder / "op.so").write_text("")
    assert build("op", lambda: 7, said.append) == 7
    assert said == []
