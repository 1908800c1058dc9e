"""No rank waits for another: in every pass of every step all ranks have the same bucket and as many tokens."""

import numpy as np
import pytest
from tiny_inputs import Tiny

from sora_lite.data.buckets import Budget, Row
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipLoader
from sora_lite.data.order import rank_positions
from sora_lite.generation.export import load_vae
from sora_lite.models.vae import CausalVAE

SHAPES = [(1, 32, 32), (9, 16, 16), (17, 32, 16), (17, 32, 32)]
STEPS = 24


def tokens(vae: CausalVAE, shape: tuple[int, int, int]) -> int:
    """Latent cells: in patches of whatever size there are as many for one bucket as for itself on another rank."""
    _, frames, height, width = vae.latent_shape(*shape)
    return frames * height * width


def loaders(tiny: Tiny, vae: CausalVAE, world_size: int, accumulation: int, workers: int) -> list[ClipLoader]:
    def cost(*shape: int) -> int:
        return tokens(vae, (shape[0], shape[1], shape[2]))

    batches = Budget(cost=cost, tokens=cost, batch_tokens=640, divisor=8).batches(SHAPES)
    assert len(set(batches)) > 2
    rows = [Row(shape=one, keep=0.4, batch=batch) for one, batch in zip(SHAPES, batches, strict=True)]
    return [
        ClipLoader(
            Index.load(tiny.shards, "train"), rows,
            seed=5, block_shards=2, flip=True, rank=rank, world_size=world_size, accumulation=accumulation,
            workers=workers, cache_bytes=0, pin=False,
        )
        for rank in range(world_size)
    ]  # fmt: skip


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (4, 2), (8, 1)])
def test_over_the_order(tiny: Tiny, world_size: int, accumulation: int) -> None:
    vae, _ = load_vae(tiny.vae)
    order = loaders(tiny, vae, 1, 1, 0)[0].order
    seen = set()
    for step in range(500):
        (micro,) = order.step(step)
        places = [
            rank_positions(len(micro.samples), rank=rank, world_size=world_size, accumulation=accumulation)
            for rank in range(world_size)
        ]
        for one in range(accumulation):
            assert len({len(mine[one]) * tokens(vae, micro.shape) for mine in places}) == 1
        everything = np.concatenate([mine[one] for mine in places for one in range(accumulation)])
        assert np.array_equal(np.sort(everything), np.arange(len(micro.samples)))
        seen.add(micro.shape)
    assert seen == set(SHAPES)


@pytest.mark.parametrize(("world_size", "accumulation", "workers"), [(2, 1, 0), (4, 2, 0), (4, 1, 2)])
def test_over_real_batches(tiny: Tiny, world_size: int, accumulation: int, workers: int) -> None:
    vae, _ = load_vae(tiny.vae)
    ranks = [loader.steps(0, STEPS) for loader in loaders(tiny, vae, world_size, accumulation, workers)]
    shapes = set()
    for step in range(STEPS):
        for together in zip(*[next(rank) for rank in ranks], strict=True):  # of one pass
            assert {batch.step for batch in together} == {step}
            assert len({(batch.bucket, batch.shape) for batch in together}) == 1
            held = {len(batch.video) * tokens(vae, batch.shape) for batch in together}
            assert len(held) == 1 and held.pop() > 0
            shapes.add(together[0].shape)
    assert len(shapes) > 2
