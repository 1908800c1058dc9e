"""Frozen text encoders of the field (T5, UMT5, CLIP), from a local folder that transformers has saved.

Nothing is downloaded, no code of the folder runs, and weights are read from safetensors alone.

Shapes: B prompts, M tokens of the longest of them, C features of a token, P pooled features.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sora_lite.errors import UserError

KINDS = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
"""`model_type` of a folder's config.json, and the class of transformers that reads it."""
_READ = (".json", ".safetensors", ".model", ".txt")
"""Files of a folder that decide what the encoder gives: configuration, weights and tokenizer."""


@dataclass(kw_only=True, slots=True, frozen=True)
class TextFeatures:
    """features: B M C, zero at padding. mask: B M bool, True where a token is real. pooled: B P, of CLIP alone."""

    features: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or self.mask.shape != self.features.shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(f"text features {tuple(self.features.shape)} with a mask {tuple(self.mask.shape)}")
        if self.pooled is not None and (self.pooled.ndim != 2 or len(self.pooled) != len(self.features)):
            raise ValueError(f"text features {tuple(self.features.shape)} with pooled {tuple(self.pooled.shape)}")

    def to(self, device: torch.device) -> "TextFeatures":
        """The same on a device."""
        pooled = None if self.pooled is None else self.pooled.to(device, non_blocking=True)
        features, mask = (one.to(device, non_blocking=True) for one in (self.features, self.mask))
        return TextFeatures(features=features, mask=mask, pooled=pooled)


class FrozenTextEncoder(nn.Module):
    """A pretrained text encoder with its tokenizer. The empty prompt is "no text", the null condition.

    Args:
        folder: as transformers' `save_pretrained` of model and tokenizer writes it; or a pipeline of diffusers, whose
            `text_encoder` and `tokenizer` are read.
        max_tokens: longest prompt; longer ones are cut (CLIP reads 77 at most).
        device: where it computes: on CPUs in fp32, elsewhere in bf16, as Wan runs its UMT5.

    Raises:
        UserError: the folder is not one of these, lacks something, or wants to run code of its own.
    """

    def __init__(self, folder: Path, max_tokens: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name one that transformers has saved on this machine")
        self.model, self._tokenizer = _load(folder, torch.device(device))
        longest = getattr(self.model.config, "max_position_embeddings", None)  # None where positions are relative
        self.max_tokens = min(max_tokens, longest or max_tokens)
        self.width: int = self.model.config.hidden_size
        self.pools = "clip" in self.model.config.model_type
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts, on the encoder's device."""
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.model.device)
        mask = tokens["attention_mask"]  # B M
        out = self.model(input_ids=tokens["input_ids"], attention_mask=mask)
        features = out.last_hidden_state.float() * mask.unsqueeze(-1)  # B M C
        return TextFeatures(
            features=features, mask=mask.bool(), pooled=out.pooler_output.float() if self.pools else None
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What it is, as manifests and exports say it. Reads all files, once."""
        name = self.folder.resolve().name
        return {"encoder": name, "max_tokens": self.max_tokens, "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the folder's files, and `max_tokens`."""
        digest = hashlib.sha256(str(self.max_tokens).encode())
        files = (path for part in dict.fromkeys(_parts(self.folder)) for path in part.iterdir())
        for path in sorted(files, key=lambda path: path.name):
            if path.suffix in _READ and path.is_file():
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _parts(folder: Path) -> tuple[Path, Path]:
    """Where model and tokenizer lie."""
    if (folder / "text_encoder" / "config.json").is_file():
        return folder / "text_encoder", folder / "tokenizer"
    return folder, folder


def _check_tokenizer(folder: Path, tokenizer: Any, vocabulary: int) -> None:
    """Raise UserError for one that the model cannot be asked with. vocabulary: tokens that the model knows."""
    if tokenizer.pad_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no token for padding; name one as pad_token, and save it anew")
    # Where the file of the vocabulary is missing, transformers makes a tokenizer to which all words are one.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise UserError(f"{folder}: its tokenizer knows no word; put the file of its vocabulary there, too")
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer):,} tokens, its weights {vocabulary:,}; take the tokenizer "
            "that belongs to the weights"
        )


def _load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder."""
    import transformers  # seconds, and only models with such an encoder need it

    transformers.utils.logging.disable_progress_bar()  # of every rank, for what takes a moment
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    weights, words = _parts(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(str(weights), **local)
        if config.model_type not in KINDS:
            raise UserError(f"{folder}: holds a {config.model_type}, not one of {', '.join(sorted(KINDS))}")
        kind = getattr(transformers, KINDS[config.model_type])
        model, told = kind.from_pretrained(
            str(weights), local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
        if told["missing_keys"]:  # which transformers draws at random
            raise ValueError(f"its weights lack {min(told['missing_keys'])}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(words), **local)
        _check_tokenizer(folder, tokenizer, model.config.vocab_size)
    except UserError:
        raise
    except Exception as error:  # damaged files and rubbish in config.json raise of every kind
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: is no text encoder that transformers has saved with its tokenizer ({why}); "
            "save both with save_pretrained, weights as safetensors"
        ) from error
    return model.to(device), tokenizer
