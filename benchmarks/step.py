"""Optimizer steps per CPU second, one process: the engine at each ZeRO stage against a bare PyTorch loop."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measure import table, take_turns
from sora_lite.config import OptimConfig, ParallelConfig
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.parallel.env import init_rank, shutdown
from sora_lite.training.engine import Engine

BATCH, STEPS = 8, 2
OPTIM = OptimConfig(lr=1e-4, clip=1.0)


def make_model() -> VideoDiT:
    """10 M parameters; the latent below makes 80 tokens of it."""
    torch.manual_seed(0)
    return VideoDiT(channels=16, width=256, depth=8, heads=4, num_classes=10)


def loss_of(model: Callable[..., torch.Tensor]) -> torch.Tensor:
    """One forward pass on fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(BATCH, 16, 5, 8, 8, generator=generator)
    prediction = model(latent, torch.linspace(0, 1, BATCH), Conditions(labels=torch.arange(BATCH)))
    return (prediction - latent).square().mean()


def bare_loop() -> Callable[[], None]:
    """The plain way: fused AdamW and clipping, nothing else."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, weight_decay=0.0, fused=True)

    def steps() -> None:
        for _ in range(STEPS):
            loss_of(model).backward()
            nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def main() -> None:
    """Print the table."""
    rank = init_rank("cpu", threads=1)
    engines = [
        Engine(make_model(), optim=OPTIM, parallel=ParallelConfig(zero_stage=stage), rank=rank, global_batch=BATCH)
        for stage in range(4)
    ]

    def steps_of(engine: Engine) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(STEPS):
                engine.backward(loss_of(engine))
                engine.step(OPTIM.lr)

        return steps

    def deterministic(steps: Callable[[], None]) -> Callable[[], None]:
        def switched() -> None:
            torch.use_deterministic_algorithms(True)
            steps()
            torch.use_deterministic_algorithms(False)

        return switched

    candidates = {"bare PyTorch": bare_loop()}
    candidates |= {f"engine, ZeRO {engine.stage}": steps_of(engine) for engine in engines}
    candidates["engine, ZeRO 2, run.deterministic"] = deterministic(steps_of(engines[2]))
    size = sum(parameter.numel() for parameter in make_model().parameters()) / 1e6
    print(table(f"steps of a DiT of {size:.1f} M parameters, batch {BATCH}", "steps", take_turns(candidates), STEPS))
    for engine in engines:
        engine.destroy()
    shutdown()
