"""The whole way as `make demo` takes it, with a model that learns nothing in its few steps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

FIGURES = {
    "digit_accuracy",
    "direction_accuracy",
    "unguided_digit_accuracy",
    "unguided_direction_accuracy",
    "classifier_digit_accuracy",
    "classifier_direction_accuracy",
    "reconstruction_digit_accuracy",
    "reconstruction_direction_accuracy",
    "vae_psnr_db",
    "nearest_training_distance_median",
    "nearest_training_distance_min",
}


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sora_lite.cli", "demo", "experiment=tiny", "clips=200"]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_interrupted_then_whole_then_done(tmp_path: Path) -> None:
    first = start(tmp_path)
    deadline = time.monotonic() + 300
    while not (tmp_path / "runs/tiny_vae/checkpoints/latest").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert not (tmp_path / "runs/tiny/export").exists()

    second = start(tmp_path)
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert "render digits: done before" in said
    figures = json.loads((tmp_path / "runs/tiny/evaluation.json").read_text())
    assert set(figures) >= FIGURES
    assert all(0 <= value <= 1 for name, value in figures.items() if name.endswith("_accuracy"))
    assert figures["generations"] == 200
    out = tmp_path / "runs/tiny/generations"
    assert len(list(out.glob("generation_*.mp4"))) == 10
    assert Image.open(out / "contact_sheet.png").size[0] > 300
    assert "loss.png" in (out / "index.html").read_text()

    third = start(tmp_path)
    said, _ = third.communicate(timeout=120)
    assert third.returncode == 0, said
    assert said.count("done before") >= 6
