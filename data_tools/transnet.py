"""Shot boundaries by TransNet V2, a small network that has learned cuts and dissolves; its weights come as a file.

Souček and Lokoč, TransNet V2: An effective deep network architecture for fast shot transition detection, 2020
(arXiv 2008.04838). Parameters have the names of the published PyTorch weights, so that these load unchanged.

Letters: T frames of a window, C channels, H W height and width.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from data_tools import shots
from data_tools.shots import Transition, untouched
from sora_lite.errors import UserError

SIZE = (27, 48)
"""Height and width of the frames that the network looks at."""
WINDOW, BORDER = 100, 25
"""Frames that it sees at once, and how many of them at each end are only there to be seen."""
KEPT = WINDOW - 2 * BORDER
REACH = 50
"""A frame is compared with so many frames before it and after it."""
THRESHOLD = 0.3
"""Chance from which a frame counts. The paper has 0.5; for dissolves less finds more, and is hardly ever wrong."""
SHORT, GAP = 3, 5
"""Frames of a run that is a cut and no dissolve; frames between two runs that are one."""


class Branch(nn.Module):
    """A 3-D convolution that is split into space and, without activation between them, time."""

    def __init__(self, inputs: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(inputs, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False),
            nn.Conv3d(2 * filters, filters, (3, 1, 1), padding=(dilation, 0, 0), dilation=(dilation, 1, 1), bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Cell(nn.Module):
    """Branches side by side that look 1, 2, 4 and 8 frames around them."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.Conv3D_1 = Branch(inputs, filters, 1)
        self.Conv3D_2 = Branch(inputs, filters, 2)
        self.Conv3D_4 = Branch(inputs, filters, 4)
        self.Conv3D_8 = Branch(inputs, filters, 8)
        self.bn = nn.BatchNorm3d(4 * filters, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [branch(x) for branch in (self.Conv3D_1, self.Conv3D_2, self.Conv3D_4, self.Conv3D_8)]
        return self.bn(torch.cat(seen, dim=1))


class Stack(nn.Module):
    """Two cells with a shortcut around the second, then half the height and width."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([Cell(inputs, filters), Cell(4 * filters, filters)])

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.DDCNN[0](x))
        return F.avg_pool3d(F.relu(self.DDCNN[1](first)) + first, (1, 2, 2))


class Likeness(nn.Module):
    """How alike each frame and its neighbours are, by some feature of length `inputs`; None takes it as it is."""

    def __init__(self, inputs: int | None) -> None:
        super().__init__()
        self.projection = nn.Linear(inputs, 128) if inputs else None
        self.fc = nn.Linear(2 * REACH + 1, 128)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.projection(x) if self.projection else x, dim=1)  # T C
        alike = F.pad(x @ x.T, (REACH, REACH))  # T T+2R
        index = torch.arange(len(x))[:, None] + torch.arange(2 * REACH + 1)
        return F.relu(self.fc(alike.gather(1, index)))  # T 128


class TransNet(nn.Module):
    """(T, 27, 48, 3) RGB in [0, 255] -> (T,) chance that a transition's middle is here, (T,) that it is part of one."""

    def __init__(self) -> None:
        super().__init__()
        self.SDDCNN = nn.ModuleList([Stack(3, 16), Stack(64, 32), Stack(128, 64)])
        self.frame_sim_layer = Likeness(64 + 128 + 256)
        self.color_hist_layer = Likeness(None)
        self.fc1 = nn.Linear(256 * 3 * 6 + 2 * 128, 1024)
        self.cls_layer1 = nn.Linear(1024, 1)
        self.cls_layer2 = nn.Linear(1024, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        x, means = frames.permute(3, 0, 1, 2)[None] / 255.0, []  # 1 3 T H W
        for stack in self.SDDCNN:
            x = stack(x)
            means.append(x.mean(dim=(3, 4))[0].T)  # T C
        near = [self.color_hist_layer(histograms(frames)), self.frame_sim_layer(torch.cat(means, dim=1))]
        x = x[0].permute(1, 2, 3, 0).flatten(1)  # T 4608
        x = F.relu(self.fc1(torch.cat([*near, x], dim=1)))  # T 1024
        return self.cls_layer1(x)[:, 0].sigmoid(), self.cls_layer2(x)[:, 0].sigmoid()


def histograms(frames: Tensor) -> Tensor:
    """Pixels of each of 8 x 8 x 8 colours: uint8 (T, H, W, 3) -> (T, 512)."""
    bins = ((frames.long() >> 5) * torch.tensor([64, 8, 1])).sum(3).flatten(1)  # T HW
    return torch.zeros(len(frames), 512).scatter_add_(1, bins, torch.ones(bins.shape))


def load(weights: Path) -> TransNet:
    """The network with the weights of a file: the published one (.pth), or the same tensors as .safetensors.

    Raises UserError if there is no such file, or if it holds something else.
    """
    model = TransNet()
    if not weights.is_file():
        raise UserError(f"split.weights={weights}: no such file; it must hold the weights of TransNet V2.")
    try:
        if weights.suffix == ".safetensors":
            tensors = load_file(weights)
        else:
            tensors = torch.load(weights, map_location="cpu", weights_only=True)
        model.load_state_dict(tensors)
    except Exception as error:  # each of torch's readers has its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"split.weights={weights}: not the weights of TransNet V2: {reason}") from error
    return model.eval()


def find_transitions(frames: Iterable[np.ndarray], model: TransNet) -> list[Transition]:
    """All transitions of a video, in order. frames: uint8 RGB (27, 48, 3), every frame of the video.

    Cuts and fades are those of `shots.find_transitions`, which finds more of them, at their exact frames, and is rarely
    wrong. The network finds the dissolves.
    """
    chances: list[np.ndarray] = []
    found = shots.find_transitions(watched(frames, model, chances))
    sure = [one for one in found if one.kind != "dissolve"]
    middle, part = np.concatenate([*chances, np.zeros((2, 0))], axis=1)
    return untouched(sure + _dissolves(middle, part), len(middle))


def watched(frames: Iterable[np.ndarray], model: TransNet, chances: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames as they come; what the network says of them, (2, frames) in all, is added to `chances`."""
    window: list[np.ndarray] = []
    count = 0
    for count, frame in enumerate(frames, start=1):  # noqa: B007
        window += [frame] * (1 if window else 1 + BORDER)
        if len(window) == WINDOW:
            chances.append(_predict(window, model))
            window = window[KEPT:]
        yield frame
    while (left := count - KEPT * len(chances)) > 0:
        window += window[-1:] * (WINDOW - len(window))
        chances.append(_predict(window, model)[:, :left])
        window = window[KEPT:]


def _predict(window: list[np.ndarray], model: TransNet) -> np.ndarray:
    """What the network says of the frames of a window that are not its borders: (2, KEPT)."""
    with torch.inference_mode():
        return torch.stack(model(torch.from_numpy(np.stack(window))))[:, BORDER:-BORDER].numpy()


def _dissolves(middle: np.ndarray, part: np.ndarray) -> list[Transition]:
    """Runs of frames that are likely in a transition and hold a likely middle of one. Both (frames,), in [0, 1]."""
    likely = np.zeros(len(part), bool)
    for first, last in _runs(part > THRESHOLD):
        likely[first:last] = middle[first:last].max() > THRESHOLD
    gaps = [(first, last) for first, last in _runs(~likely) if last - first <= GAP and first > 0 and last < len(part)]
    for first, last in gaps:
        likely[first:last] = True
    return [Transition("dissolve", first, last) for first, last in _runs(likely) if last - first > SHORT]


def _runs(true: np.ndarray) -> list[tuple[int, int]]:
    """Half-open stretches of what is true."""
    edges = np.flatnonzero(np.diff(true, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
