"""`sora-lite train` and `sora-lite train-vae`."""

import errno
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from sora_lite.cli import run_verb
from sora_lite.config import BaseTrainConfig, BatchBy, TrainConfig, TrainVAEConfig
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipLoader
from sora_lite.errors import Interrupted, UserError
from sora_lite.generation.export import load_vae, read_contract
from sora_lite.generation.export import write as write_export
from sora_lite.generation.text import open_encoders, reads_text
from sora_lite.parallel.env import Rank, init_rank, shutdown
from sora_lite.training import store
from sora_lite.training.engine import release_groups
from sora_lite.training.init_from import RECORD, Row, by_name, differences, start_from, table
from sora_lite.training.lease import hold
from sora_lite.training.lora import describe as describe_adapted
from sora_lite.training.objective import Objective
from sora_lite.training.objective_dit import DiTObjective
from sora_lite.training.objective_vae import VAEObjective
from sora_lite.training.rank_log import rank_log
from sora_lite.training.signals import nothing_to_save
from sora_lite.training.trainer import Trainer


def main(config: TrainConfig | TrainVAEConfig) -> None:
    """Train a DiT or a VAE, as one process of however many were launched."""
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
        torch.use_deterministic_algorithms(True)
    rank = init_rank(threads=config.parallel.threads)
    try:
        with nothing_to_save():
            _train(config, rank)
    except Exception as error:
        if rank.world_size == 1:
            raise
        # Said before this rank leaves: the others fail because of it, and their errors must come after its own.
        raise SystemExit(_tell(error, rank)) from error
    finally:
        shutdown()
        release_groups()


def _train(config: TrainConfig | TrainVAEConfig, rank: Rank) -> None:
    """`train`, with what a disk refuses as people can mend it."""
    try:
        train(config, rank)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise store.explain(error, Path(config.run.root) / config.run.name) from error


def _tell(error: Exception, rank: Rank) -> int:
    """Print an error as a command line does -> exit status."""

    def again() -> None:
        raise error

    if isinstance(error, Interrupted) and not rank.is_main:
        return os.EX_TEMPFAIL  # rank 0 says it for all
    if isinstance(error, UserError | Interrupted):
        return run_verb(again)
    print(f"rank {rank.rank} failed:", file=sys.stderr)
    traceback.print_exception(error)
    return 1


def train(config: TrainConfig | TrainVAEConfig, rank: Rank) -> None:
    """Build the objective and run the trainer."""
    torch.manual_seed(config.run.seed)
    objective: DiTObjective | VAEObjective
    if isinstance(config, TrainVAEConfig):
        objective = VAEObjective(config.vae, config.loss, seed=config.run.seed, rank=rank)
    else:
        vae, vae_contract = load_vae(Path(config.vae_from))
        encoders = open_encoders(config, asdict(config.model), rank.device, {})
        objective = DiTObjective(
            config.model, config.diffusion, vae, encoders, frames=config.frames, seed=config.run.seed, rank=rank
        )
    check_buckets(config, objective)
    rows = start(config, objective, rank)
    trainer = Trainer(config, objective, rank)
    # Only now: a command that is refused above leaves no folder, and takes no run from a job that trains.
    with (
        hold(trainer.folder, rank, take_over=config.run.take_over) as lease,
        rank_log(trainer.folder, rank.rank),
    ):
        trainer.resume(lease)
        if rank.is_main:
            if isinstance(objective, DiTObjective):  # a run holds all that its export needs
                write_export(trainer.folder / "vae", vae_contract, vae.state_dict())
            if isinstance(objective, DiTObjective) and objective.adapted:
                _, base = read_contract(Path(objective.adapted.init_from), "dit")
                told = by_name(differences(base, objective.state()))
                print("\n".join([describe_adapted(objective.adapted, trainer.engine.shapes), *told]))
            elif rows is not None:
                (trainer.folder / RECORD).write_text(json.dumps([asdict(row) for row in rows], indent=2))
                print("\n".join(table(rows)))
            elif config.init_from is not None:
                print(f"init_from: not looked at, since {trainer.folder} goes on from its checkpoint")
            print("\n".join([*describe(config, trainer.loader), *missing_conditions(config, trainer.loader.index)]))
            if trainer.validation.count == 0 and config.run.validation_samples > 0:
                print("no clip that is long enough is held out, so there is no val_loss, and there are no samples")
        trainer.run()


def start(config: TrainConfig | TrainVAEConfig, objective: DiTObjective | VAEObjective, rank: Rank) -> list[Row] | None:
    """Give the module the weights of an export, as far as they fit; a row for each. A collective.

    None where it keeps its own, goes on from a checkpoint, or gets adapters on top of them.
    """
    if config.init_from is None:
        return None
    if isinstance(config, TrainConfig) and isinstance(objective, DiTObjective) and config.lora.rank > 0:
        objective.adapt(config.lora, config.init_from)
        return None
    # A run that was killed before its first checkpoint starts from these weights again.
    checkpoints = Path(config.run.root) / config.run.name / "checkpoints"
    if rank.gather(len(store.complete(checkpoints)))[0]:
        return None
    state = objective.state() if isinstance(objective, DiTObjective) else None
    return start_from(Path(config.init_from), objective.name, objective.module, state)


def check_buckets(config: BaseTrainConfig, objective: Objective) -> None:
    """Raise UserError for a clip size that the model cannot take: one that its VAE or its patches do not divide."""
    for i, rule in enumerate(config.data.buckets):
        try:
            objective.tokens(rule.frames, rule.resolution[0], rule.resolution[1])
        except ValueError as error:
            raise UserError(f"data.buckets[{i}]: {error}; change its resolution or frames") from error


def describe(config: BaseTrainConfig, loader: ClipLoader) -> list[str]:
    """A line for each bucket, for each of several data sets, and for the samples that are in no bucket."""
    buckets = loader.order.buckets
    lines = [
        "{} frames of {}x{}{}: {:,} samples, {} a batch".format(
            *bucket.shape, f" at {bucket.fps:g} fps" if bucket.fps else "", len(bucket.samples), bucket.batch
        )
        for bucket in buckets
    ]
    for number, row in enumerate(config.data.sets):
        samples, share = loader.order.set_samples[number], loader.order.set_share(number)
        lines.append(f"{row.shards}: {samples:,} samples in buckets, {share:.2%} of what is seen")
    if left := len(loader.index) - sum(len(bucket.samples) for bucket in buckets):
        by_keep = ", or by keep" if any(rule.keep < 1 for rule in config.data.buckets) else ""
        lines.append(f"left out, as too short for every bucket{by_keep}: {left:,} samples")
    if loader.latents is not None:
        cached, samples = loader.cached()
        lines.append(f"come as latents: {cached:,} of {samples:,} samples in buckets; the others are decoded")
        if cached == samples and config.data.batch_by is BatchBy.flops:
            lines.append("data.batch_by: flops counts the VAE's encoder, which is not used; model_flops leaves it out")
    if loader.text is not None:
        lines.append(
            f"come with text features: {loader.captioned():,} of {sum(loader.order.set_samples):,} samples in buckets; "
            "the captions of the others are encoded in training"
        )
    return lines


def missing_conditions(config: BaseTrainConfig, index: Index) -> list[str]:
    """A line for what the model reads and no clip of the shards has: training works, asking for it later will not."""
    if not isinstance(config, TrainConfig):
        return []
    captioned, labelled = ([one.get(f"clips_{what}") for one in index.counts] for what in ("captioned", "labelled"))
    lines = []
    if reads_text(asdict(config.model)) and set(captioned) == {0}:
        lines.append("model.text: no clip has a caption, so the model will not learn to follow prompts")
    if config.model.num_classes == 0 and any(labelled):
        lines.append("model.num_classes: is 0, so the labels of the clips are not used")
    if config.model.num_classes > 0 and set(labelled) == {0}:
        lines.append("model.num_classes: no clip has a label, so the model will not learn to follow labels")
    return lines
