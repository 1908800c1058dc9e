"""What a model is told besides the noisy latent and the time.

Shapes: B batch, M text tokens, C_text features of a text encoder, P features of pooled text, C latent channels,
T H W latent frames and cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(kw_only=True, slots=True, frozen=True)
class Conditions:
    """Conditions of a batch; None is a condition that the model does not have.

    labels: B int64 in [0, num_classes], where num_classes itself is "no label".
    text: of the encoder over bytes int64 B M from `models.text.tokenize`; of a frozen encoder its features, B M C_text.
    text_mask: B M bool, True where a token is real; of features only, since padding shows in bytes. Without it all
        features are attended to as they are.
    pooled: B P, pooled features of a text encoder such as CLIP.
    frames: B C T H W normalised latents of given frames, zero where none is given.
    frame_mask: B 1 T 1 1 float, 1 where a frame is given.

    Raises:
        ValueError: shapes or batch sizes do not go together.
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    frames: Tensor | None = None
    frame_mask: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {len(tensor) for tensor in self._given().values()}
        if len(sizes) > 1:
            raise ValueError(f"conditions of one batch have different sizes: {sorted(sizes)}")
        if self.text_mask is not None and (
            self.text is None or self.text.ndim != 3 or self.text_mask.shape != self.text.shape[:2]
        ):
            shape = None if self.text is None else tuple(self.text.shape)
            raise ValueError(f"text_mask {tuple(self.text_mask.shape)} is not that of text features {shape}")
        if (self.frames is None) != (self.frame_mask is None):
            raise ValueError("frames and frame_mask go together")

    def _given(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __len__(self) -> int:
        """Batch size; 0 where there is no condition at all."""
        return next((len(tensor) for tensor in self._given().values()), 0)

    def cat(self, other: "Conditions") -> "Conditions":
        """Both along the batch; the shorter text is padded.

        Raises:
            ValueError: one of them has a condition that the other lacks, or text cannot be padded for want of a mask.
        """
        return Conditions(**{name: torch.cat(pair) for name, pair in self._beside(other).items()})

    def rows(self, numbers: Sequence[int]) -> "Conditions":
        """Some of the batch, in this order."""
        return Conditions(**{name: tensor[numbers] for name, tensor in self._given().items()})

    def replaced(self, other: "Conditions", where: Mapping[str, Tensor]) -> "Conditions":
        """Conditions of another batch of this size, by name, in the rows where B bool is True. A text has its mask.

        Raises:
            ValueError: one of them has a condition that the other lacks.
        """
        values = {}
        for name, (mine, theirs) in self._beside(other).items():
            rows = where.get("text" if name == "text_mask" else name)
            values[name] = mine if rows is None else torch.where(_as_rows(rows, mine), theirs, mine)
        return Conditions(**values)

    def _beside(self, other: "Conditions") -> dict[str, tuple[Tensor, Tensor]]:
        """Each condition of both; the shorter text is padded."""
        mine, theirs = self._given(), other._given()
        if mine.keys() != theirs.keys():
            raise ValueError(f"conditions {sorted(mine)} cannot be joined with {sorted(theirs)}")
        if "text" in mine:  # 0 is padding in bytes, in features (masked) and, as False, in the mask
            lengths = mine["text"].shape[1], theirs["text"].shape[1]
            if len(set(lengths)) > 1 and mine["text"].ndim == 3 and "text_mask" not in mine:
                raise ValueError("text features of different lengths need a text_mask: padding would be attended to")
            for name in ("text", "text_mask") if "text_mask" in mine else ("text",):
                mine[name], theirs[name] = _padded(mine[name], max(lengths)), _padded(theirs[name], max(lengths))
        return {name: (mine[name], theirs[name]) for name in mine}


def _as_rows(where: Tensor, like: Tensor) -> Tensor:
    """B bool on a tensor's device, with as many axes."""
    return where.to(like.device).view(-1, *[1] * (like.ndim - 1))


def _padded(text: Tensor, tokens: int) -> Tensor:
    """B M ... with zeros after its tokens, so that there are `tokens`."""
    after = (0, tokens - text.shape[1])
    return F.pad(text, after if text.ndim == 2 else (0, 0, *after))
