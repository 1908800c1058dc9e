"""`sora-lite submit VERB`: check a training job here, then hand it to Slurm."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sora_lite.cli.compose import assets, compose, help_text
from sora_lite.config import BaseTrainConfig, QueueConfig, SlurmConfig, TrainConfig
from sora_lite.data.manifest import MANIFEST
from sora_lite.data.remote import locate
from sora_lite.errors import UserError

ROOTS = {"train": "train", "train-vae": "train_vae"}
"""Verbs that can run as a job, with the config root of each."""

USAGE = """usage: sora-lite submit train|train-vae [--dry-run] [GROUP=CHOICE ...] [KEY=VALUE ...]

Checks the configuration, then submits the verb with the same settings as a Slurm job of `slurm.nodes` x
`slurm.tasks_per_node` processes; its log goes to the run folder. Submitting again goes on with the same run.

  --dry-run   print the sbatch command and stop
"""


def main(verb: str, argv: list[str]) -> None:
    """Run `sora-lite submit`.

    Raises:
        UserError: a setting is wrong, a file that the job would need is missing, or Slurm refuses the job.
    """
    options = [word for word in argv if word.startswith("-")]
    words = [word for word in argv if not word.startswith("-")]
    target = words[0] if words else None
    if "-h" in options or "--help" in options:
        print(help_text(f"{verb} {target}", ROOTS[target]) if target in ROOTS else USAGE)
        return
    if unknown := [option for option in options if option != "--dry-run"]:
        raise UserError(f"{unknown[0]}: no such option of `sora-lite submit`; there are --dry-run and --help")
    if target not in ROOTS:
        what = f"{target} cannot run as a job" if target else "which verb shall run"
        raise UserError(f"sora-lite submit: {what}; use `sora-lite submit {'|'.join(ROOTS)} KEY=VALUE ...`")

    overrides = words[1:]
    config: BaseTrainConfig = compose(ROOTS[target], overrides)
    _check_sizes(config)
    log_dir = (Path(config.run.root) / config.run.name / "slurm").absolute()
    script = assets("slurm") / "train.sbatch"
    command = sbatch_command(config.slurm, config.run.name, target, overrides, script.absolute(), log_dir)
    if "--dry-run" in options:
        print(shlex.join(command))
        return
    _check_inputs(config)
    job_id = submit(command, log_dir)
    print(f"submitted job {job_id}: {config.run.name}\nlog: {log_dir / f'{job_id}.log'}")


def sbatch_command(
    slurm: SlurmConfig, run_name: str, verb: str, overrides: list[str], script_path: Path, log_dir: Path
) -> list[str]:
    """The argument list that submits `sora-lite VERB OVERRIDES` as a job. Nothing is run, and no shell is meant to.

    Args:
        slurm: sizes and limits of the job.
        run_name: becomes the job's name.
        verb: "train" or "train-vae".
        overrides: settings of the verb, handed on unchanged.
        script_path: the batch script, which runs its arguments once per task.
        log_dir: folder of the job's log, `JOBID.log`; it must exist when the job starts.

    Raises:
        UserError: an argument has a line break or another control character.
    """
    sizes = {
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.tasks_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node or None,
    }
    words = ["-m", "sora_lite.cli", verb, *overrides]
    return job_command(slurm, run_name, sizes, script_path, log_dir, "%j.log", words)


def job_command(
    queue: QueueConfig,
    name: str,
    sizes: Mapping[str, object],
    script_path: Path,
    log_dir: Path,
    log_name: str,
    words: list[str],
) -> list[str]:
    """The argument list that submits Python with `words` as a job, through a batch script.

    Args:
        queue: what the job asks Slurm for.
        name: becomes the job's name.
        sizes: further options of sbatch, without their dashes; None leaves one out.
        script_path: the batch script, which runs its arguments.
        log_dir: folder of the job's logs; it must exist when the job starts.
        log_name: sbatch's pattern for the name of a log.
        words: arguments of Python.

    Raises:
        UserError: an argument has a line break or another control character.
    """
    options = {
        "job-name": name,
        "partition": queue.partition,
        "account": queue.account,
        "qos": queue.qos,
        "constraint": queue.constraint,
        "mem": queue.memory,
        "time": queue.time,
        "output": f"{str(log_dir).replace('%', '%%')}/{log_name}",
        "open-mode": "append",
        **sizes,
    }
    command = ["sbatch", "--parsable", "--requeue"]
    command += [f"--{option}={value}" for option, value in options.items() if value is not None]
    command += [str(script_path), queue.python or sys.executable, *words]
    for argument in command:
        # A line break would end a line of Slurm's own files and of every tool that parses its output.
        if not argument.isprintable():
            raise UserError(f"{argument!r}: line breaks and control characters cannot go to Slurm; take them out")
    return command


def submit(command: list[str], log_dir: Path) -> str:
    """Run a `job_command` and return the job's id.

    Raises:
        UserError: there is no `sbatch` here, or it refuses the job.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("sbatch: not found; submit from a login node of the cluster, or look at --dry-run") from error
    if done.returncode != 0:
        complaints = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip()]
        reason = "; ".join(complaints) or f"exit status {done.returncode}"
        raise UserError(f"sbatch refuses the job: {reason}; change the slurm.* settings to what this cluster offers")
    return done.stdout.strip().split(";")[0]  # JOBID[;CLUSTER]


def _check_sizes(config: BaseTrainConfig) -> None:
    """What would otherwise fail only after hours in the queue."""
    slurm = config.slurm
    for key in ("nodes", "tasks_per_node", "cpus_per_task"):
        if getattr(slurm, key) < 1:
            raise UserError(f"slurm.{key}: must be at least 1, not {getattr(slurm, key)}")
    if slurm.gpus_per_node not in (0, slurm.tasks_per_node):
        raise UserError(
            f"slurm.gpus_per_node: {slurm.gpus_per_node} GPUs for slurm.tasks_per_node={slurm.tasks_per_node} "
            "processes; there is one process per GPU, so make them equal (or 0 GPUs for CPU nodes)"
        )
    passes = slurm.nodes * slurm.tasks_per_node * config.parallel.accumulation
    for i, rule in enumerate(config.data.buckets):
        if rule.batch is None and config.data.divisor % passes:
            raise UserError(
                f"data.divisor: batches from data.batch_tokens are multiples of {config.data.divisor}; slurm.nodes x "
                f"slurm.tasks_per_node x parallel.accumulation = {passes} must divide that; set data.divisor={passes}"
            )
        if rule.batch is not None and rule.batch % passes:
            raise UserError(
                f"data.buckets[{i}].batch: {rule.batch} cannot be shared out over slurm.nodes x slurm.tasks_per_node "
                f"x parallel.accumulation = {passes}; make it a multiple"
            )


def _check_inputs(config: BaseTrainConfig) -> None:
    """Files that the job reads. Not for a dry run, which may happen on a machine that does not have them."""
    given = [(config.data.key_of(number), folder) for number, folder in enumerate(config.data.folders)]
    for what, made in (("latents", config.data.latent_folders), ("text", config.data.text_folders)):
        given += [(config.data.key_of(number, what), one) for number, one in enumerate(made) if one]
    for key, folder in given:
        place = locate(folder, key)
        if isinstance(place, Path) and not (place / MANIFEST).is_file():
            raise UserError(f"{key}: {place / MANIFEST} does not exist; name a folder that `sora-data` has finished")
    for key in ("vae_from", "text_from", "pooled_from") if isinstance(config, TrainConfig) else ():
        folder = getattr(config, key)
        if folder is not None and not Path(folder).is_dir():
            cure = "train a VAE first, or correct the path" if key == "vae_from" else "correct the path"
            raise UserError(f"{key}: the folder {folder} does not exist; {cure}")
