"""A judge: a small classifier, trained on real clips in about half a minute, that recognises what a clip shows.

Shapes: N clips, B clips in a batch, T frames of a clip, K frames that the judge looks at, C channels, H W pixels.
Clips are uint8 (N, T, H, W, 3), NumPy or torch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

Clips = np.ndarray | Tensor

SIDE = 32
"""Clips are brought to SIDE x SIDE pixels before they are judged."""
GLANCE = 2
"""K: frames that one forward pass looks at, one from each part of the clip."""
VIEWS = 4
"""Glances at different frames whose verdicts are averaged for one clip."""


class Judge(nn.Module):
    """Classifier of clips. Each frame passes the same 2-D network; the head sees what is there and what has moved.

    What is there: the features' mean and maximum over space, averaged over the frames. What has moved: a 4 x 4 map of
    the features late in the glance minus those early in it. So one network serves attributes of shape and of motion.
    """

    def __init__(self, classes: int, width: int = 16, dropout: float = 0.3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _convolution(3, width, 5, stride=2),
            _convolution(width, 2 * width, 3, stride=2),
            _convolution(2 * width, 4 * width, 3),
            _convolution(4 * width, 4 * width, 3),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear((2 + 16) * 4 * width, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """frames: float (B, K, 3, H, W) in [-1, 1], in order of time -> logits (B, classes)."""
        clips, glance = frames.shape[:2]
        # oneDNN's convolutions are fastest with channels last
        x = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # B*K 3 H W
        x = self.trunk(x)  # B*K C H/4 W/4
        there = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)  # B*K 2C
        there = there.unflatten(0, (clips, glance)).mean(1)  # B 2C
        cells = F.adaptive_avg_pool2d(x, 4).flatten(1).unflatten(0, (clips, glance))  # B K 16C
        early, late = cells.tensor_split(2, dim=1)
        moved = late.mean(1) - early.mean(1)  # B 16C
        return self.head(self.dropout(torch.cat([there, moved], dim=1)))  # B classes


def train_judge(
    clips: Clips,
    targets: Clips,
    classes: int,
    *,
    steps: int = 600,
    batch: int = 64,
    lr: float = 4e-3,
    seed: int = 0,
    name: str = "judge",
    progress: bool = True,
) -> Judge:
    """Train a judge to tell `targets` (int (N,), 0 to classes - 1) from clips; the same judge for the same seed.

    The time it takes is set by `steps`, not by a clock, so that figures can be reproduced: 600 steps are about 33
    CPU seconds. Rotation, scale, shear, shift, elastic distortion, contrast and noise are drawn per clip; nothing is
    mirrored, since that would change directions and letters.
    """
    small = _shrink(clips)
    labels = torch.as_tensor(targets, dtype=torch.long)
    if labels.shape != (len(small),) or not len(small):
        raise ValueError(f"{len(small)} clips, but targets of shape {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"targets run from {labels.min()} to {labels.max()}, but there are {classes} classes")
    draws = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout draw from the global generator
        torch.manual_seed(seed)
        judge = Judge(classes).train()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=steps, pct_start=0.15, final_div_factor=100
        )
        order = torch.empty(0, dtype=torch.long)
        for _ in tqdm(range(steps), desc=f"training the {name}", unit="step", mininterval=0.5, disable=not progress):
            while len(order) < batch:
                order = torch.cat([order, torch.randperm(len(small), generator=draws)])
            chosen, order = order[:batch], order[batch:]
            frames = _glance(small[chosen], torch.rand(batch, GLANCE, generator=draws))
            loss = F.cross_entropy(judge(_augment(frames, draws)), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


@torch.no_grad()
def predict(judge: Judge, clips: Clips, batch: int = 256) -> np.ndarray:
    """Class probabilities, float32 (N, classes): the mean verdict over VIEWS glances at each clip."""
    small = _shrink(clips)
    verdicts = []
    for some in small.split(batch):
        views = []
        for view in range(VIEWS):
            place = torch.full((len(some), GLANCE), (view + 0.5) / VIEWS)
            views.append(judge(_glance(some, place)).log_softmax(-1))
        verdicts.append(torch.stack(views).mean(0).softmax(-1))
    return torch.cat(verdicts).numpy()


def accuracy(judge: Judge, clips: Clips, targets: Clips) -> float:
    """Fraction of the clips, in [0, 1], that are taken for what `targets` (int (N,)) says."""
    return float((predict(judge, clips).argmax(1) == np.asarray(targets)).mean())


@dataclass(kw_only=True, slots=True)
class Nearest:
    """For each of N clips the most similar one in another set."""

    distance: np.ndarray
    """float (N,): root of the mean squared difference of pixels in [0, 1]; 0 is the same clip."""
    index: np.ndarray
    """int (N,): which clip of the other set that is."""


@torch.no_grad()
def nearest_distances(clips: Clips, others: Clips, batch: int = 128) -> Nearest:
    """Find for each clip the nearest of `others`: near 0 everywhere means that a model repeats its training set.

    Compare with the same figure for real held-out clips. Both uint8 (N, T, H, W, 3) of one size.
    """
    a, b = _tensor(clips), _tensor(others)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"clips of {tuple(a.shape[1:])} cannot be compared with clips of {tuple(b.shape[1:])}")
    queries = a.flatten(1).float()
    best = torch.full((len(a),), math.inf)
    index = torch.zeros(len(a), dtype=torch.long)
    for start in range(0, len(b), batch):
        some = b[start : start + batch].flatten(1).float()
        # |q - s|^2 without |q|^2, which is the same for all s: one matrix product instead of N * N differences
        score = some.square().sum(1) - 2 * queries @ some.T  # N batch
        low, where = score.min(1)
        closer = low < best
        best = torch.where(closer, low, best)
        index = torch.where(closer, where + start, index)
    # the product has lost digits to cancellation; for the winners the difference itself is taken
    difference = queries - b[index].flatten(1).float()
    return Nearest(distance=difference.square().mean(1).sqrt().div(255).numpy(), index=index.numpy())


def psnr_db(clips: Clips, others: Clips) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of clips in dB, float (N,), over all of its pixels; inf if equal."""
    a, b = _tensor(clips), _tensor(others)
    if a.shape != b.shape:
        raise ValueError(f"clips of {tuple(a.shape)} cannot be compared with clips of {tuple(b.shape)}")
    error = [(x.float() - y.float()).square().mean() for x, y in zip(a, b, strict=True)]
    return (20 * math.log10(255) - 10 * torch.stack(error).double().log10()).numpy()


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _tensor(clips: Clips) -> Tensor:
    clips = torch.as_tensor(clips)
    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[-1] != 3:
        raise ValueError(f"clips must be uint8 (N, T, H, W, 3), not {clips.dtype} {tuple(clips.shape)}")
    return clips


def _shrink(clips: Clips) -> Tensor:
    """uint8 (N, T, H, W, 3) -> uint8 (N, T, 3, SIDE, SIDE), a view where the size is right already."""
    frames = _tensor(clips).permute(0, 1, 4, 2, 3)
    if frames.shape[-2:] == (SIDE, SIDE):
        return frames
    small = [F.interpolate(clip.float(), (SIDE, SIDE), mode="area").round().to(torch.uint8) for clip in frames]
    return torch.stack(small)


def _glance(clips: Tensor, place: Tensor) -> Tensor:
    """Take from each of the K equal parts of a clip the frame at `place` (B, K) in [0, 1) of that part.

    clips: uint8 (B, T, 3, H, W) -> float (B, K, 3, H, W) in [-1, 1].
    """
    count, parts = place.shape
    when = ((torch.arange(parts) + place) / parts * clips.shape[1]).long()  # B K
    return clips[torch.arange(count)[:, None], when].float().div_(127.5).sub_(1)


def _augment(frames: Tensor, draws: torch.Generator) -> Tensor:
    """Distort each clip at random, all its frames alike. frames: float (B, K, 3, H, W) in [-1, 1]."""
    count, _, _, height, width = frames.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draws) * 2 - 1

    angle = uniform(count) * math.radians(12)
    scale = torch.exp(uniform(2, count) * 0.15)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() * scale[0], uniform(count) * 0.15 - angle.sin() * scale[1]
    affine[:, 1, 0], affine[:, 1, 1] = angle.sin() * scale[0], angle.cos() * scale[1]
    affine[:, :, 2] = uniform(count, 2) * 4 / width  # the picture is 2 units wide: up to 2 pixels at SIDE = 32
    grid = F.affine_grid(affine, [count, 1, height, width], align_corners=False)  # B H W 2
    bend = torch.randn(count, 2, 5, 5, generator=draws) * 1.6 / width  # elastic: 0.8 pixels at 5 x 5 knots
    grid = grid + F.interpolate(bend, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    x = F.grid_sample(frames.flatten(1, 2), grid, padding_mode="border", align_corners=False).view_as(frames)
    x = x * (1 + 0.2 * uniform(count, 1, 1, 1, 1)) + 0.1 * uniform(count, 1, 1, 1, 1)
    return x + 0.05 * torch.rand(count, 1, 1, 1, 1, generator=draws) * torch.randn(x.shape, generator=draws)
