"""The wheel is whole: installed anywhere, the commands run from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from project_tree import PACKAGES, ROOT, name_of, project_files


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this checkout on its path; its output, or a failure that shows it."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; other libraries come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    # Only the libraries: the link to this checkout is a .pth file, and those of a folder added this way are not read.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_holds_what_the_commands_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for path in project_files():
        top = name_of(path).split("/")[0]
        if top in PACKAGES:
            expected.add(name_of(path))
        elif top in ("conf", "slurm"):
            expected.add(f"sora_lite/{name_of(path)}")
    assert packed == expected


def test_commands_run_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import sora_lite; print(sora_lite.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)

    printed = run(installed / "sora-lite", "train", "--cfg", "job", "model=video_b", "run.steps=7", cwd=tmp_path)
    assert "steps: 7" in printed and "width: 768" in printed

    assert "groups:" in run(installed / "sora-lite", "train", "--help", cwd=tmp_path)
    assert "verify" in run(installed / "sora-data", "--help", cwd=tmp_path)
    job = ("run.name=trial", "data.shards=shards", "vae_from=vae")
    assert "train.sbatch" in run(installed / "sora-lite", "submit", "train", "--dry-run", *job, cwd=tmp_path)
    assert not list(tmp_path.iterdir()), "a command that only prints has written something"
