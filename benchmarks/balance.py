"""How much longer the slowest bucket's step takes than the quickest's, with batches by tokens and by FLOPs.

CPU time of a training step (encode, forward, backward) of a small DiT on a small VAE at four quite different clip
sizes, each with a batch of at least 5 granules (a granule is `divisor` clips; rounding to whole granules alone may put
a batch 1/11 off).
"""

import torch

from benchmarks.measure import take_turns
from sora_lite.data.buckets import Budget
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.vae import CausalVAE
from sora_lite.training.metrics import count_flops

SHAPES = [(17, 64, 64), (33, 64, 96), (9, 48, 80), (1, 128, 128)]
BATCH_TOKENS = 4_800
DIT = {"channels": 16, "width": 384, "depth": 3, "heads": 6, "num_classes": 10}
VAE = {"latent_channels": 16, "patch": 4, "widths": [16, 32, 32], "strides": [[2, 2], [2, 1]]} | {
    "encoder_blocks": [0, 1, 1],
    "decoder_blocks": [0, 1, 1],
}
PART = 4
"""A batch divided by this goes through the models at once: enough that fixed costs are small."""


def step_of(vae: CausalVAE, dit: VideoDiT, shape: tuple[int, int, int], clips: int) -> None:
    """Encode some clips, and train on them."""
    with torch.no_grad():
        latents = vae.encode(torch.zeros(clips, 3, *shape)).mean
    dit(latents, torch.full((clips,), 0.5), Conditions(labels=torch.zeros(clips, dtype=torch.int64))).mean().backward()


def main() -> None:
    """Print the table."""
    vae, dit = CausalVAE(**VAE), VideoDiT(**DIT)
    with torch.device("meta"):
        meta_vae, meta_dit = CausalVAE(**VAE), VideoDiT(**DIT)

    def tokens(t: int, h: int, w: int) -> int:
        _, frames, rows, columns = vae.latent_shape(t, h, w)
        return frames * rows * columns // 4

    def flops(t: int, h: int, w: int) -> float:
        clip = torch.empty(1, 3, t, h, w, device="meta")
        latent = torch.empty(1, *vae.latent_shape(t, h, w), device="meta")
        labels = Conditions(labels=torch.zeros(1, dtype=torch.int64, device="meta"))
        forward = count_flops(lambda: meta_dit(latent, torch.empty(1, device="meta"), labels))
        return count_flops(lambda: meta_vae.encode(clip)) + 3 * forward

    by_flops = Budget(cost=flops, tokens=tokens, batch_tokens=BATCH_TOKENS, divisor=1).batches(SHAPES)
    clips = {str(shape): batch // PART for shape, batch in zip(SHAPES, by_flops, strict=True)}
    calls = {str(shape): (lambda shape=shape: step_of(vae, dit, shape, clips[str(shape)])) for shape in SHAPES}
    seconds = {
        name: value / clips[name] for name, value in take_turns(calls, rounds=5, pick=min).items()
    }  # of one clip
    print(f"steps of four buckets, by the CPU time of a clip of each; budget {BATCH_TOKENS:,} tokens of the first")
    costs = {"by tokens": tokens, "by FLOPs": flops, "by time": lambda *shape: seconds[str(shape)]}
    for name, cost in costs.items():
        budget = Budget(cost=cost, tokens=tokens, batch_tokens=BATCH_TOKENS, divisor=1)
        batches = budget.batches(SHAPES)
        times = [batch * seconds[str(shape)] for batch, shape in zip(batches, SHAPES, strict=True)]
        mean = sum(times) / len(times)
        off = max(abs(time / mean - 1) for time in times)
        shown = "  ".join(f"{batch:>4} x {time / batch:5.3f} s" for batch, time in zip(batches, times, strict=True))
        print(f"  {name:<10} {shown}   slowest / quickest {max(times) / min(times):.2f}, off the mean {off:.1%}")
