"""From prompts to what a model reads of them: bytes, or the features of frozen text encoders.

"No text" is the empty prompt, whoever reads it: BEGIN alone in bytes, and what the encoder makes of "" in features, as
Wan and Stable Diffusion 3 have it. It is what a dropped condition, a clip without a caption and the unguided side of a
generation are given.

Shapes: B prompts, M tokens of the longest of them, C features of a token, P pooled features.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from sora_lite.config import EvaluateConfig, GenerateConfig, TrainConfig
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
    """Prompts as features of a frozen encoder, as pooled features of the same or another one, or both.

    Equal prompts are encoded once.
    """

    def __init__(self, text: FrozenTextEncoder | None, pooled: FrozenTextEncoder | None) -> None:
        self._text, self._pooled = text, pooled

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        unlike = list(dict.fromkeys(prompts))
        told = Conditions()
        if self._text is not None:
            told = self._told(self._text(unlike))
        if self._pooled is not None and told.pooled is None:
            told = replace(told, pooled=self._pooled(unlike).pooled)
        return told.rows([unlike.index(prompt) for prompt in prompts])

    def complete(self, made: TextFeatures, prompts: Sequence[str]) -> Conditions:
        """The same, where the features of some prompts exist: of those whose row in `made` has a real token.

        made: by the encoder of the features. Pooled features of another one are always encoded.
        """
        assert self._text is not None
        if self._pooled is not None and self._pooled is not self._text:
            pooled = FrozenReader(None, self._pooled)(prompts).pooled
            return replace(FrozenReader(self._text, None).complete(made, prompts), pooled=pooled)
        there = made.mask.any(1).tolist()
        missing = [prompt for prompt, is_there in zip(prompts, there, strict=True) if not is_there]
        held = self._told(made.to(self._text.model.device))
        if not missing:
            return held
        behind = itertools.count(len(there))
        rows = [number if is_there else next(behind) for number, is_there in enumerate(there)]
        return held.cat(self(missing)).rows(rows)

    def _told(self, made: TextFeatures) -> Conditions:
        """What the model reads of what the encoder of the features made."""
        pooled = made.pooled if self._pooled is self._text else None
        return Conditions(text=made.features, text_mask=made.mask, pooled=pooled)


STREAMS = {"text_from": "text_features", "pooled_from": "pooled_features"}
"""Setting that names a frozen encoder, and the argument of `VideoDiT` that says how wide what it gives is."""


def make_reader(dit: VideoDiT, encoders: Mapping[str, FrozenTextEncoder], device: torch.device) -> TextReader | None:
    """What reads text for a model. None if it reads none, or its encoders (`open_encoders`) are not given."""
    if isinstance(dit.text, ByteTextEncoder):
        return ByteReader(dit.text.max_bytes, device)
    return FrozenReader(encoders.get("text_from"), encoders.get("pooled_from")) if encoders else None


def reads_text(architecture: Mapping[str, Any]) -> bool:
    """Whether a `VideoDiT` of these arguments reads text."""
    return bool(architecture["text"]) or any(architecture[name] > 0 for name in STREAMS.values())


def open_encoders(
    config: TrainConfig | GenerateConfig | EvaluateConfig,
    architecture: Mapping[str, Any],
    device: torch.device,
    expected: Mapping[str, Mapping[str, Any]],
) -> dict[str, FrozenTextEncoder]:
    """The frozen text encoders of a `VideoDiT` of these arguments, on a device, by the setting that names them.

    expected: the identities of those that it was trained with, by setting; empty where it is trained now.

    Raises:
        UserError: one is not given or not needed, or is not the one that the model reads.
    """
    given = {"text_from": config.text_from, "pooled_from": config.pooled_from}
    encoders: dict[str, FrozenTextEncoder] = {}
    for key, name in STREAMS.items():
        folder, width, known = given[key], architecture[name], expected.get(key)
        if not width and folder is not None:
            raise UserError(f"{key}: the model has no {name}; leave {folder} out")
        if not width:
            continue
        if folder is None:
            which = f" of {_described(known)}" if known else ""
            raise UserError(f"{key}: the model reads {name}{which}; name the folder of the encoder")
        again = next((one for one in encoders.values() if one.folder.resolve() == Path(folder).resolve()), None)
        encoder = again or FrozenTextEncoder(Path(folder), architecture["text_tokens"], device)
        _check_width(encoder, key, name, width)
        if known and encoder.identity["fingerprint"] != known["fingerprint"]:
            raise UserError(
                f"{key}: {folder} is not the encoder that the model was trained with, which is {_described(known)}; "
                f"this one is {_described(encoder.identity)}"
            )
        encoders[key] = encoder
    return encoders


def _check_width(encoder: FrozenTextEncoder, key: str, name: str, width: int) -> None:
    """Raise UserError unless an encoder gives what a model reads, so wide."""
    if key == "pooled_from" and not encoder.pools:
        raise UserError(
            f"{key}: {encoder.folder} has no pooled features, and model.{name}={width} reads such of a CLIP; name one"
        )
    if width != encoder.width:
        raise UserError(
            f"{key}: {encoder.folder} gives features {encoder.width} wide, and model.{name}={width}; take the encoder "
            f"that the model is for, or set model.{name}={encoder.width}"
        )


def _described(identity: Mapping[str, Any]) -> str:
    return "{encoder} with at most {max_tokens} tokens (fingerprint {fingerprint:.12})".format(**identity)
