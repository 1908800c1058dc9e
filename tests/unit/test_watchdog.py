"""A rank's watchdog where the world around it changes: the clock, the disk."""

import subprocess
import sys
import textwrap
from pathlib import Path


def run(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Python lines within a watchdog of one second."""
    script = textwrap.dedent("""
        import shutil, sys, time
        from pathlib import Path
        from sora_lite.training.watchdog import Watchdog
        folder = Path(sys.argv[1])
        with Watchdog(folder, rank=0, world_size=1, seconds=1.0) as watchdog:
    """) + textwrap.indent(textwrap.dedent(body), "    ")
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_clock_that_is_set_ends_nothing(tmp_path: Path) -> None:
    body = """
        now = time.time
        time.time = lambda: now() + 86400
        for _ in range(8):
            time.sleep(0.25)
            watchdog.beat("training")
    """
    ended = run(tmp_path, body)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_who_stops_is_ended_though_no_sign_of_life_can_be_written(tmp_path: Path) -> None:
    ended = run(tmp_path / "gone", "shutil.rmtree(folder); time.sleep(20)")
    assert ended.returncode == 70
    assert "no progress for" in ended.stderr and "rank 0 has left no sign of life" in ended.stderr
