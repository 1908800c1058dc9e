"""What a user gets for a mistake: one line that says the cure and exit status 2, never a traceback."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_inputs import Tiny, call, make_vae

from sora_lite.data.index import Index
from sora_lite.data.manifest import Manifest

Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture) -> Refused:
    """Call `sora-lite` in this process, where it must fail as it should; returns the line."""

    def fails(*argv: str) -> str:
        capfd.readouterr()
        assert call(*argv) == 2
        captured = capfd.readouterr()
        lines = [line for line in captured.err.splitlines() if "error: " in line and "ld returned" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
        assert "Traceback" not in captured.err + captured.out
        return lines[0].removeprefix("error: ")

    return fails


def train_words(tiny: Tiny, root: Path, *extra: str) -> list[str]:
    return [
        "train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={root}",
        "run.steps=2", "run.validate_every=0", "logging.peak_tflops=1", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the runs, in which `tiny` is trained for two steps and exported."""
    root = tmp_path_factory.mktemp("runs")
    assert call(*train_words(tiny, root)) == 0
    assert call("export", f"run={root / 'tiny'}") == 0
    return root


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of the runs to damage."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture(scope="module")
def other_vae(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("other") / "vae", tiny.shards, seed=1)


def checkpoint(runs: Path) -> Path:
    return runs / "tiny/checkpoints" / (runs / "tiny/checkpoints/latest").read_text().strip()


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


class TestConfiguration:
    def test_mistyped_key(self, tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
        line = refused(*train_words(tiny, tmp_path, "run.stepz=3"))
        assert "run.stepz: no such key" in line and "run.steps" in line
        assert not list(tmp_path.iterdir())

    def test_mistyped_choice_and_verb(self, tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
        assert "video_tiny" in refused(*train_words(tiny, tmp_path, "model=video_tinny"))
        assert "model.text is null" in refused(*train_words(tiny, tmp_path, "model.text=null", "model.text.width=3"))
        assert "did you mean train" in refused("trian")

    def test_wrong_type(self, tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
        line = refused(*train_words(tiny, tmp_path, "run.steps=many"))
        assert "run.steps" in line and "many" in line

    def test_missing_value(self, refused: Refused) -> None:
        line = refused("train", "experiment=tiny", "vae_from=x")
        assert "data.shards=..." in line

    def test_batch_that_does_not_divide(self, tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
        line = refused(*train_words(tiny, tmp_path, "parallel.accumulation=3"))
        assert "parallel.accumulation" in line and "1, 2, 4, 8" in line


class TestData:
    def test_missing_shards(self, tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
        line = refused(*train_words(tiny, tmp_path, "data.shards=nowhere"))
        assert "nowhere/manifest.json" in line and "sora-data run" in line

    def test_deleted_tar(self, tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
        shards = Path(shutil.copytree(tiny.shards, tmp_path / "shards"))
        gone = Index.load(shards, "train").shard_paths[0]
        gone.unlink()
        line = refused(*train_words(tiny, tmp_path, f"data.shards={shards}"))
        assert str(gone) in line and "missing; restore it" in line

    @pytest.mark.parametrize("workers", [0, 1])
    def test_too_much_damage(self, tiny: Tiny, tmp_path: Path, refused: Refused, workers: int) -> None:
        shards = Path(shutil.copytree(tiny.shards, tmp_path / "shards"))
        index = Index.load(shards, "train")
        for sample in range(0, len(index), 2):
            with index.shard_paths[index.shard[sample]].open("r+b") as file:
                file.seek(int(index.media_offset[sample]))
                file.write(b"damage!!")
        line = refused(*train_words(tiny, tmp_path, f"data.shards={shards}", f"data.workers={workers}", "run.steps=9"))
        assert "data.max_bad_fraction" in line and f"sora-data verify {shards}" in line

    def test_one_of_several_data_sets(self, tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
        def with_sets(rows: str) -> str:
            words = [word for word in train_words(tiny, tmp_path) if not word.startswith("data.shards=")]
            return refused(*words, f"data.sets={rows}")

        assert "nowhere/manifest.json" in with_sets(f"[{{shards: {tiny.shards}}}, {{shards: nowhere}}]")
        shards = Path(shutil.copytree(tiny.shards, tmp_path / "shards"))
        manifest = Manifest.load(shards)
        manifest.shards = [entry for entry in manifest.shards if entry.split != "train"]
        manifest.save(shards)
        line = with_sets(f"[{{shards: {tiny.shards}}}, {{shards: {shards}}}]")
        assert line.startswith(f"data.sets[1].shards: {shards} has no train samples")
        line = with_sets("[{shards: a, wieght: 2}]")
        assert "wieght" in line and "data.sets.weight" in line
        assert "data.sets[0].shards=..." in with_sets("[{weight: 2}]")

    def test_frames_that_no_clip_has(self, tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
        bucket = "data.buckets=[{resolution: [32, 32], frames: 21, batch: 8}]"
        line = refused(*train_words(tiny, tmp_path, bucket))
        assert "data.buckets[0]" in line and "the longest has 17 frames" in line

    def test_clips_that_the_vae_does_not_take(self, tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
        bucket = "data.buckets=[{resolution: [32, 32], frames: 16, batch: 8}]"
        line = refused(*train_words(tiny, tmp_path, bucket))
        assert "data.buckets[0]" in line and "4k+1" in line


class TestCheckpoint:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (["model.width=96"], "model.width was 48, is 96"),
            (["model.text.depth=2"], "model.text.depth was 1, is 2"),
            (["run.seed=1"], "run.accept=[run.seed]"),
            (["data.flip=true", "data.block_shards=1"], "run.accept=[data.block_shards,data.flip]"),
        ],
    )
    def test_of_other_settings(
        self, tiny: Tiny, trained: Path, refused: Refused, change: list[str], named: str
    ) -> None:
        line = refused(*train_words(tiny, trained, *change, "run.steps=4"))
        assert named in line and "give run.name another name" in line

    def test_of_another_verb(self, tiny: Tiny, trained: Path, refused: Refused) -> None:
        words = ["experiment=tiny_vae", f"data.shards={tiny.shards}", f"run.root={trained}", "run.name=tiny"]
        line = refused("train-vae", *words)
        assert "another kind of model" in line and "give run.name another name" in line

    def test_of_another_vae(self, tiny: Tiny, trained: Path, other_vae: Path, refused: Refused) -> None:
        line = refused(*train_words(tiny, trained, f"vae_from={other_vae}", "run.steps=4"))
        assert "vae_from leads to another one" in line and "run.accept=[vae_from]" in line

    def test_of_other_shards(self, tiny: Tiny, runs: Path, tmp_path: Path, refused: Refused) -> None:
        shards = Path(shutil.copytree(tiny.shards, tmp_path / "shards"))
        manifest = Manifest.load(shards)
        for entry in manifest.shards:
            entry.sha256 = "0" * 64
        manifest.save(shards)
        line = refused(*train_words(tiny, runs, f"data.shards={shards}", "run.steps=4"))
        assert "data.shards: leads to other shards" in line and "run.accept=[data.shards]" in line

    @pytest.mark.parametrize("name", ["dit-rank_00000.safetensors", "state.json", "manifest.json"])
    def test_damaged(self, tiny: Tiny, runs: Path, refused: Refused, name: str) -> None:
        flip_byte(checkpoint(runs) / name)
        damage = f"{checkpoint(runs) / name} is damaged"
        line = refused(*train_words(tiny, runs, "run.steps=4"))
        assert damage in line and "no checkpoint of this run is good" in line
        assert damage in refused("export", f"run={runs / 'tiny'}")

    def test_short_or_missing_file(self, tiny: Tiny, runs: Path, refused: Refused) -> None:
        file = checkpoint(runs) / "dit-rank_00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        assert f"{file} has" in refused(*train_words(tiny, runs, "run.steps=4"))
        file.unlink()
        assert f"{file} is missing" in refused(*train_words(tiny, runs, "run.steps=4"))

    def test_pointer_to_nothing(self, tiny: Tiny, runs: Path, refused: Refused) -> None:
        shutil.rmtree(checkpoint(runs))
        line = refused(*train_words(tiny, runs, "run.steps=4"))
        assert "latest" in line and "does not exist: write into it" in line

    def test_none_to_export(self, tmp_path: Path, refused: Refused) -> None:
        assert "holds no checkpoint yet; train it first" in refused("export", f"run={tmp_path}")

    def test_nothing_of_all_this_harmed_the_run(self, tiny: Tiny, trained: Path) -> None:
        assert call(*train_words(tiny, trained, "run.steps=4")) == 0
        assert checkpoint(trained).name == "step_00000004"


class TestExport:
    def generate(self, refused: Refused, runs: Path) -> str:
        return refused(
            "generate", f"model_from={runs / 'tiny'}", "labels=[1]", "sampling.steps=1", f"out={runs / 'out'}"
        )

    def test_vae_was_swapped(self, runs: Path, other_vae: Path, refused: Refused) -> None:
        shutil.rmtree(runs / "tiny/export/vae")
        shutil.copytree(other_vae, runs / "tiny/export/vae")
        line = self.generate(refused, runs)
        assert "is not the VAE that this DiT was trained against" in line and "export the run again" in line

    def test_vae_is_missing(self, runs: Path, refused: Refused) -> None:
        shutil.rmtree(runs / "tiny/export/vae")
        line = self.generate(refused, runs)
        assert str(runs / "tiny/export/vae") in line

    @pytest.mark.parametrize("folder", ["tiny/export", "tiny/export/vae"])
    def test_weights_are_damaged(self, runs: Path, refused: Refused, folder: str) -> None:
        flip_byte(runs / folder / "model.safetensors")
        line = self.generate(refused, runs)
        assert f"{runs / folder / 'model.safetensors'}: is damaged" in line and "export the run again" in line

    def test_contract_is_damaged(self, runs: Path, refused: Refused) -> None:
        (runs / "tiny/export/export.json").write_text("{")
        line = self.generate(refused, runs)
        assert "is no contract of an export" in line and "export the run again" in line

    def test_contract_of_another_architecture(self, runs: Path, refused: Refused) -> None:
        path = runs / "tiny/export/export.json"
        contract = json.loads(path.read_text())
        path.write_text(json.dumps({**contract, "architecture": {**contract["architecture"], "widht": 8}}))
        line = self.generate(refused, runs)
        assert f"{path}: architecture: " in line and "widht" in line and "export the run again" in line

    def test_contract_of_the_wrong_kind(self, tiny: Tiny, trained: Path, refused: Refused) -> None:
        line = refused("generate", f"model_from={tiny.vae}", "labels=[1]")
        assert "is the export of a vae, not of a dit" in line
        line = refused(*train_words(tiny, trained, f"vae_from={trained / 'tiny'}"))
        assert "is the export of a dit, not of a vae" in line

    def test_a_run_keeps_its_vae(self, runs: Path, tiny: Tiny, other_vae: Path, refused: Refused) -> None:
        vae = runs / "vae"
        shutil.copytree(tiny.vae, vae)
        assert call(*train_words(tiny, runs, f"vae_from={vae}", "run.name=changed", "run.steps=1")) == 0
        shutil.rmtree(vae)
        assert call("export", f"run={runs / 'changed'}") == 0
        kept = runs / "changed/vae"
        shutil.rmtree(kept)
        shutil.copytree(other_vae, kept)
        line = refused("export", f"run={runs / 'changed'}")
        assert f"{kept}: is not the VAE" in line and "put that one back" in line

    def test_labels_and_prompts_that_the_model_does_not_take(self, trained: Path, refused: Refused) -> None:
        model = f"model_from={trained / 'tiny'}"
        assert "the model has labels 0 to 9" in refused("generate", model, "labels=[10]")
        assert "nothing to generate" in refused("generate", model)
        assert "one per prompt" in refused("generate", model, "labels=[1]", "prompts=[a, b]")
        assert refused("generate", model, 'prompts=["a\udcffb"]').startswith("prompts: holds bytes that are no text")
        assert "frames" in refused("generate", model, "labels=[1]", "frames=18")
        line = refused("generate", model, "labels=[1]", "sampling.guidance=1e38", "sampling.steps=2")
        assert line.startswith("sampling: the latents are not finite")

    def test_places_that_cannot_be_written_to(self, trained: Path, tmp_path: Path, refused: Refused) -> None:
        run, file = trained / "tiny", tmp_path / "file"
        file.write_text("")
        line = refused("generate", f"model_from={run}", "labels=[1]", f"out={file}", "sampling.steps=999")
        assert line == f"out: {file} is a file; name a folder"
        assert line == refused("generate", f"model_from={run}", "labels=[1]", f"out={file / 'a' / 'b'}")
        assert line == refused("evaluate", f"model_from={run}", "shards=nowhere", f"out={file / 'a.json'}")
        for layout in ("sora_lite", "diffusers"):
            for out in (file, file / "a"):
                assert refused("export", f"run={run}", f"out={out}", f"layout={layout}") == line
        line = refused("evaluate", f"model_from={run}", "shards=nowhere", f"out={tmp_path}")
        assert line.startswith(f"out: {tmp_path} is a folder")

    def test_frames_of_a_model_that_reads_none(self, trained: Path, tmp_path: Path, refused: Refused) -> None:
        words = [f"model_from={trained / 'tiny'}", "shards=nowhere", f"out={tmp_path / 'out.json'}", "frames=[first]"]
        assert refused("evaluate", *words).startswith("frames: this model reads no frames")
        line = refused("evaluate", *words[:3], "sampling.sampler=ddpm")
        assert line.startswith("sampling.sampler: ddpm does not serve rectified_flow")

    def test_settings_that_would_do_nothing(self, trained: Path, refused: Refused) -> None:
        run = trained / "tiny"
        assert "trained no adapters" in refused("export", f"run={run}", "init_from=nowhere")
        line = refused("export", "run=nowhere", "layout=diffusers")
        assert "nowhere: holds no checkpoint yet" in line and not Path("nowhere").exists()
        line = refused("export", f"run={run / 'export'}", "layout=diffusers", "weights=raw")
        assert line.startswith("weights, init_from:") and "leave them out" in line


def test_as_a_command_of_its_own(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    """The whole of stderr, with whatever libraries say on the way out."""
    words = train_words(tiny, trained, "model.width=96", "run.steps=6", "data.workers=1")
    done = subprocess.run(
        [sys.executable, "-m", "sora_lite.cli", *words], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "width was 48, is 96" in line
