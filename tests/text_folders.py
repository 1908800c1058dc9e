"""Tiny random text encoders, saved as transformers saves them, each with a tokenizer of a dozen words; and clips with
captions for them."""

from pathlib import Path

PROMPTS = ["the digit three moves right", "", "a dog", "the three"]
WORDS = ["<pad>", "</s>", "<unk>", "<s>", "the", "a", "digit", "three", "dog", "moves", "right", "left", "zero", "up"]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    ).save_pretrained(folder)


def save_t5(folder: Path, *, umt5: bool = False, seed: int = 0, width: int = 16) -> Path:
    import torch
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": len(WORDS)}
    model = UMT5EncoderModel(UMT5Config(**sizes)) if umt5 else T5EncoderModel(T5Config(**sizes))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_clip(folder: Path, *, seed: int = 0) -> Path:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=24,
            eos_token_id=1,
            bos_token_id=3,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def with_captions(shards: Path, out: Path) -> Path:
    """The same clips with none to three captions each, of different lengths."""
    from dataclasses import replace

    from sora_lite.data.index import Index
    from sora_lite.data.joined import Members
    from sora_lite.data.manifest import Manifest
    from sora_lite.data.shards import Sample, ShardWriter

    out.mkdir()
    entries = []
    for split in ("train", "validation"):
        index = Index.load(shards, split)
        members = Members(index)
        with ShardWriter(out / f"{split}-000000.tar", split) as writer:
            for sample in range(len(index)):
                (caption,) = members.captions(sample)
                captions = [caption, "a dog", f"the {caption} up up left"][: sample % 4]
                meta = members.meta(sample) | {"captions": captions}
                writer.add(Sample(key=index.key(sample), ext="mp4", media=members.media(sample), meta=meta))
        entries.append(writer.entry)
    replace(Manifest.load(shards), shards=entries, counts={}).save(out)
    return out
