"""The sbatch command as data, and what `sora-lite submit` refuses before a job waits in a queue."""

import re
import shlex
from pathlib import Path

import pytest

from sora_lite.cli import main
from sora_lite.cli.compose import assets
from sora_lite.cli.submit import sbatch_command, submit
from sora_lite.config import SlurmConfig
from sora_lite.errors import UserError

JOB = [
    "train", "run.name=night", "data.shards=shards", "vae_from=runs/vae",
    "data.buckets=[{resolution: [32, 32], frames: 17, batch: 64}]",
]  # fmt: skip


def build(overrides: list[str] | None = None, log_dir: Path = Path("/runs/night/slurm"), **slurm: object) -> list[str]:
    config = SlurmConfig(**slurm)  # type: ignore[arg-type]
    return sbatch_command(config, "night", "train", overrides or [], Path("/lib/train.sbatch"), log_dir)


def test_command_has_everything_that_was_asked_for() -> None:
    command = build(
        ["run.steps=5"], partition="gpu", account="lab", qos="high", constraint="h100", memory="200G", python="/py",
        nodes=2, tasks_per_node=8, gpus_per_node=8, cpus_per_task=12, time="1:00:00",
    )  # fmt: skip
    assert command[0] == "sbatch"
    assert {
        "--requeue", "--open-mode=append", "--job-name=night", "--partition=gpu", "--account=lab", "--qos=high",
        "--constraint=h100", "--mem=200G", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8",
        "--cpus-per-task=12", "--time=1:00:00", "--output=/runs/night/slurm/%j.log",
    } <= set(command)  # fmt: skip
    assert command[-6:] == ["/lib/train.sbatch", "/py", "-m", "sora_lite.cli", "train", "run.steps=5"]


def test_null_settings_are_left_to_the_site() -> None:
    named = {argument.split("=")[0] for argument in build()}
    assert not named & {"--partition", "--account", "--qos", "--constraint", "--mem", "--gpus-per-node"}


def test_values_stay_single_arguments() -> None:
    """Nothing that a person writes into a value turns into an option or a command."""
    nasty = ["a=b c", "x='; rm -rf /'", "--wrap=evil", "$(evil)", "ü=ö"]
    command = build(nasty, partition="p --wrap=evil")
    assert command[-len(nasty) :] == nasty
    script = command.index("/lib/train.sbatch")
    assert "--wrap=evil" not in command[:script]
    assert "--partition=p --wrap=evil" in command[:script]


def test_percent_in_a_path_is_no_pattern() -> None:
    assert "--output=/runs/100%%/slurm/%j.log" in build(log_dir=Path("/runs/100%/slurm"))


@pytest.mark.parametrize("overrides, slurm", [(["a=b\nc"], {}), (["a=\0"], {}), ([], {"partition": "a\n#SBATCH"})])
def test_control_characters_are_refused(overrides: list[str], slurm: dict) -> None:
    with pytest.raises(UserError, match="line breaks"):
        build(overrides, **slurm)


@pytest.mark.parametrize("choice", ["local", "gpu_node"])
def test_dry_run_prints_the_command_and_touches_nothing(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *JOB, f"slurm={choice}", "--dry-run"]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[0] == "sbatch"
    assert command[-len(JOB) - 1 :] == [*JOB, f"slurm={choice}"]
    assert f"--output={tmp_path}/runs/night/slurm/%j.log" in command
    assert str(assets("slurm") / "train.sbatch") in command
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "extra, message",
    [
        (["slurm.nodes=0"], "slurm.nodes"),
        (["slurm.gpus_per_node=4", "slurm.tasks_per_node=2"], "one process per GPU"),
        (["slurm.nodes=3"], r"data.buckets\[0\].batch: 64 cannot be shared out"),
        (["slurm.nodse=3"], "slurm.nodes"),
        (["slurm=nowhere"], "gpu_node"),
        (["--dryrun"], "--dry-run"),
        ([], "data.shards: shards/manifest.json does not exist"),
        (["data.shards=https://host/shards", "data.latents=made"], "data.latents: made/manifest.json does not exist"),
        (["data.shards=https://host/shards", "data.latents=https://host/made"], "vae_from: the folder runs/vae does"),
        (
            [
                "data.shards=https://host/shards",
                "vae_from=.",
                "model.text=null",
                "model.text_features=9",
                "text_from=t5",
            ],
            "text_from: the folder t5 does not exist",
        ),
    ],
)
def test_refusals_are_one_line_that_names_the_cause(
    extra: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *JOB, *extra]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_only_training_verbs_are_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["submit"], ["submit", "generate"]):
        assert main(argv) == 2
        assert "train|train-vae" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out


def test_no_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="login node"):
        submit(["sbatch"], tmp_path / "logs")


def test_a_refusal_of_sbatch_is_told_in_one_line(tmp_path: Path) -> None:
    (fake := tmp_path / "sbatch").write_text(
        "#!/bin/sh\nprintf 'sbatch: error: one\\nsbatch: error: two\\n' >&2; exit 1\n"
    )
    fake.chmod(0o755)
    with pytest.raises(UserError, match="refuses the job: one; two; change"):
        submit([str(fake)], tmp_path / "logs")


def test_the_id_is_what_parsable_prints(tmp_path: Path) -> None:
    assert submit(["echo", "17;cluster"], tmp_path / "logs") == "17"
