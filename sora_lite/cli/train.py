"""`sora-lite train` and `sora-lite train-vae`."""

from pathlib import Path

import torch

from sora_lite.config import TrainConfig, TrainVAEConfig
from sora_lite.generation.export import load_vae
from sora_lite.parallel.env import Rank, init_rank, shutdown
from sora_lite.training.objective_dit import DiTObjective
from sora_lite.training.objective_vae import VAEObjective
from sora_lite.training.trainer import Trainer


def main(config: TrainConfig | TrainVAEConfig) -> None:
    """Train a DiT or a VAE, as one process of however many were launched."""
    rank = init_rank(threads=config.parallel.threads)
    try:
        train(config, rank)
    finally:
        shutdown()


def train(config: TrainConfig | TrainVAEConfig, rank: Rank) -> None:
    """Build the objective and run the trainer."""
    torch.manual_seed(config.run.seed)
    objective: DiTObjective | VAEObjective
    if isinstance(config, TrainVAEConfig):
        objective = VAEObjective(config.vae, config.loss, seed=config.run.seed, rank=rank)
    else:
        vae, _ = load_vae(Path(config.vae_from))
        objective = DiTObjective(config.model, config.diffusion, vae, seed=config.run.seed, rank=rank)
    Trainer(config, objective, rank).run()
