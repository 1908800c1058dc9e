"""From prompts to what a model reads of them: bytes, or the features of a frozen text encoder.

"No text" is the empty prompt, whoever reads it: BEGIN alone in bytes, and what the encoder makes of "" in features, as
Wan and Stable Diffusion 3 have it. It is what a dropped condition, a clip without a caption and the unguided side of a
generation are given.

Shapes: B prompts, M tokens of the longest of them, C features of a token, P pooled features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from sora_lite.errors import UserError
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.pretrained import FrozenTextEncoder, TextFeatures
from sora_lite.models.text import ByteTextEncoder, tokenize


class TextReader(Protocol):
    """B prompts -> the conditions that a model reads of text, on its device."""

    def __call__(self, prompts: Sequence[str]) -> Conditions: ...


class ByteReader:
    """Prompts as bytes, for `ByteTextEncoder`."""

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self._max_bytes, self._device = max_bytes, device

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        return Conditions(text=tokenize(prompts, self._max_bytes).to(self._device))


class FrozenReader:
    """Prompts as features of a frozen encoder, pooled ones, or both. Equal prompts are encoded once."""

    def __init__(self, encoder: FrozenTextEncoder, *, features: bool, pooled: bool) -> None:
        self._encoder, self._features, self._pooled = encoder, features, pooled

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        unlike = list(dict.fromkeys(prompts))
        return self._read(self._encoder(unlike)).rows([unlike.index(prompt) for prompt in prompts])

    def complete(self, made: TextFeatures, prompts: Sequence[str]) -> Conditions:
        """The same, where the features of some prompts exist: of those whose row in `made` has a real token."""
        there = made.mask.any(1)
        missing = [prompt for prompt, is_there in zip(prompts, there.tolist(), strict=True) if not is_there]
        held = self._read(made.to(self._encoder.model.device))
        if not missing:
            return held
        rows = torch.arange(len(there))
        rows[~there] = len(there) + torch.arange(len(missing))
        return held.cat(self(missing)).rows(rows.tolist())

    def _read(self, made: TextFeatures) -> Conditions:
        """What the model reads of features."""
        return Conditions(
            text=made.features if self._features else None,
            text_mask=made.mask if self._features else None,
            pooled=made.pooled if self._pooled else None,
        )


def make_reader(dit: VideoDiT, encoder: FrozenTextEncoder | None, device: torch.device) -> TextReader | None:
    """What reads text for a model. None if it reads none, or its encoder is not given."""
    if isinstance(dit.text, ByteTextEncoder):
        return ByteReader(dit.text.max_bytes, device)
    if encoder is None:
        return None
    return FrozenReader(encoder, features=dit.text is not None, pooled=dit.pooled_features > 0)


def reads_features(architecture: Mapping[str, Any]) -> bool:
    """Whether a `VideoDiT` of these arguments needs a frozen text encoder."""
    return architecture["text_features"] > 0 or architecture["pooled_features"] > 0


def reads_text(architecture: Mapping[str, Any]) -> bool:
    """Whether a `VideoDiT` of these arguments reads text."""
    return bool(architecture["text"]) or reads_features(architecture)


def open_encoder(
    architecture: Mapping[str, Any],
    text_from: str | None,
    device: torch.device,
    expected: Mapping[str, Any] | None = None,
) -> FrozenTextEncoder | None:
    """The frozen text encoder of a `VideoDiT` of these arguments, on a device; None for one that needs none.

    expected: its identity, where the model was trained with one.

    Raises:
        UserError: it is not given or not needed, or is not the one that the model reads.
    """
    if not reads_features(architecture):
        if text_from is not None:
            raise UserError(f"text_from: the model reads no features of a text encoder; leave {text_from} out")
        return None
    if text_from is None:
        which = f" of {_described(expected)}" if expected else ""
        raise UserError(f"text_from: the model reads text features{which}; name the folder of the encoder")
    encoder = FrozenTextEncoder(Path(text_from), architecture["text_tokens"], device)
    check_widths(encoder, architecture)
    if expected and encoder.fingerprint() != expected["fingerprint"]:
        raise UserError(
            f"text_from: {text_from} is not the encoder that the model was trained with, which is "
            f"{_described(expected)}; this one is {_described(encoder.identity())}"
        )
    return encoder


def check_widths(encoder: FrozenTextEncoder, architecture: Mapping[str, Any]) -> None:
    """Raise UserError if the features of an encoder are not what a `VideoDiT` of these arguments reads."""
    width = encoder.width
    for name in ("text_features", "pooled_features"):
        wanted = architecture[name]
        if wanted and name == "pooled_features" and not encoder.pools:
            raise UserError(
                f"text_from: {encoder.folder} has no pooled features, of which the model reads {wanted} "
                "(model.pooled_features); take a CLIP, or set model.pooled_features=0"
            )
        if wanted and wanted != width:
            raise UserError(
                f"text_from: {encoder.folder} gives features {width} wide, and model.{name}={wanted}; take the encoder "
                f"that the model is for, or set model.{name}={width}"
            )


def _described(identity: Mapping[str, Any]) -> str:
    return "{encoder} with at most {max_tokens} tokens (fingerprint {fingerprint:.12})".format(**identity)
