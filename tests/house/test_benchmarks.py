"""The benchmarks still run, and print a row for each thing that they compare."""

import subprocess
import sys

import pytest
from project_tree import ROOT


def prints(rows: tuple[str, ...], *arguments: str) -> None:
    """Python, called with these arguments, prints these words."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing = [row for row in rows if row not in done.stdout]
    assert not missing, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("balance", ("by tokens", "by FLOPs")),
        ("order", ("compiling", "resident")),
        ("reading", ("webdataset", "sora_lite")),
        ("step", ("ZeRO 0", "ZeRO 3")),
        ("cuts", ("detector=luma", "detector=transnet")),
        ("packing", ("sora_lite", "together")),
        ("attention", ("2,048 tokens",)),
        ("linear", ("to weights", "1,280 x 768 x 3,072")),
        ("decoding", ("plain PyAV", "decoder=pyav")),
        pytest.param("dit", ("sora_lite", "CogVideoX"), marks=pytest.mark.timeout(600)),  # compiles four models
    ],
)
def test_benchmark_runs(table: str, rows: tuple[str, ...]) -> None:
    prints(rows, "-m", "benchmarks", table)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "rows"),
    [
        (
            "loading.main(samples=800, rounds=1, strides=[1])",
            ("sora_lite, decoder=pyav", "of stock", "KiB per 1,000 samples"),
        ),
        ("latents.main(count=32, rounds=1)", ("tarfile, seeking", "sora_lite")),
        ("saving.main(width=256, rounds=1)", ("restore, verified", "of raw", "stall")),
    ],
)
def test_long_benchmark_runs_in_short(short: str, rows: tuple[str, ...]) -> None:
    prints(rows, "-c", f"from benchmarks import loading, latents, saving; {short}")
