"""What a rank holds of one parameter: the piece of it whose optimizer state is here."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True, frozen=True, slots=True)
class Fragment:
    """The piece of one parameter whose optimizer state this rank holds.

    `master`, `exp_avg` and `exp_avg_sq` are fp32 views of shape (n,): elements `offset` to `offset + n` of the
    flattened parameter `name` of full shape `shape`. Writing into them writes into the optimizer; the module's own
    weights follow by `Engine.refresh_weights`.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def __post_init__(self) -> None:
        n = self.master.numel()
        if not self.master.shape == self.exp_avg.shape == self.exp_avg_sq.shape == (n,):
            raise ValueError(f"{self.name}: views of one fragment differ in shape")
        if self.master.dtype != torch.float32:
            raise TypeError(f"{self.name}: master weights are {self.master.dtype}, not float32")
        if self.offset < 0 or self.offset + n > math.prod(self.shape):
            raise ValueError(f"{self.name}: elements {self.offset} to {self.offset + n} exceed shape {self.shape}")
