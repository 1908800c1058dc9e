"""From the configuration of the data to what the trainer reads: indexes, latents that join them, the loader."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sora_lite.config import BaseTrainConfig, BatchBy, DataConfig
from sora_lite.data.buckets import Budget, Row, rows_from
from sora_lite.data.compiled import open_index
from sora_lite.data.index import Index
from sora_lite.data.joined import Joined, open_join
from sora_lite.data.loader import ClipLoader
from sora_lite.data.remote import Patience, locate
from sora_lite.data.shard_cache import ShardCache
from sora_lite.errors import UserError
from sora_lite.parallel.env import Rank
from sora_lite.training.objective import Objective


def load_split(data: DataConfig, split: str, rank: Rank, *, required: bool = True) -> Index:
    """The index of one split of the configured data sets, mapped by every rank. All ranks call it."""
    folders = [locate(folder, data.key_of(number)) for number, folder in enumerate(data.folders)]
    patience = Patience(retries=data.io_retries, timeout=data.io_timeout)
    shard_cache = ShardCache(Path(data.shard_cache).expanduser(), int(data.shard_cache_gb * 2**30), patience)
    cache = Path(data.cache) if data.cache else None
    index = rank.main_first(
        lambda: open_index(folders, split, cache=cache, shard_cache=shard_cache, check=rank.is_main)
    )
    for number, samples in enumerate(index.set_samples()):
        if required and samples == 0:
            raise UserError(
                f"{data.key_of(number)}: {folders[number]} has no {split} samples; "
                "pack more videos with `sora-data run`"
            )
    return index


def load_made(data: DataConfig, index: Index, split: str, objective: Objective, rank: Rank) -> dict[str, Joined | None]:
    """What was made of an index's clips beforehand, as far as it is given: `latents` and `text`. All ranks call it."""
    state = objective.state()
    encoder = state.get("text_encoders", {}).get("text_from", {})
    latents = _join(
        data, index, split, "latents", data.latent_folders, {"fingerprint": state.get("vae_fingerprint")}, rank
    )
    same = {name: encoder.get(name) for name in ("max_tokens", "fingerprint")}
    return {"latents": latents, "text": _join(data, index, split, "text", data.text_folders, same, rank)}


def _join(
    data: DataConfig,
    index: Index,
    split: str,
    content: str,
    given: list[str | None],
    expected: dict[str, Any],
    rank: Rank,
) -> Joined | None:
    folders = [locate(one, data.key_of(number, content)) if one else None for number, one in enumerate(given)]
    return rank.main_first(
        lambda: open_join(
            index,
            folders,
            split,
            content=content,
            expected=expected,
            cache=Path(data.cache) if data.cache else None,
            check=rank.is_main,
        )
    )


def make_rows(data: DataConfig, objective: Objective) -> list[Row]:
    """The configured bucket table, with the batches that it leaves to the budget."""
    rules = [
        Row(
            shape=(rule.frames, rule.resolution[0], rule.resolution[1]),
            keep=rule.keep,
            batch=rule.batch or 0,
            fps=rule.fps or data.fps,
        )
        for rule in data.buckets
    ]
    costs = {BatchBy.tokens: objective.tokens, BatchBy.flops: objective.cost, BatchBy.model_flops: objective.flops}
    budget = Budget(
        cost=costs[data.batch_by],
        tokens=objective.tokens,
        batch_tokens=data.batch_tokens,
        divisor=data.divisor,
    )
    return rows_from(rules, budget)


def make_loader(
    config: BaseTrainConfig,
    index: Index,
    objective: Objective,
    rank: Rank,
    *,
    latents: Joined | None = None,
    text: Joined | None = None,
) -> ClipLoader:
    """The loader of the configured data for this rank, with what was made of them (`load_made`)."""
    data = config.data
    return ClipLoader(
        index,
        make_rows(data, objective),
        seed=config.run.seed,
        block_shards=data.block_shards,
        flip=data.flip,
        rank=rank.rank,
        world_size=rank.world_size,
        accumulation=config.parallel.accumulation,
        workers=data.workers,
        worker_timeout=data.worker_timeout,
        say=tqdm.write,
        cache_bytes=data.cache_mb * 2**20,
        decoder=data.decoder.value,
        pin=torch.device(rank.device).type == "cuda",
        weights=[row.weight for row in data.sets if row.weight is not None] or None,
        image_ratio=data.image_ratio,
        latents=latents,
        text=text,
    )
