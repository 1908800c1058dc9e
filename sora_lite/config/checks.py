"""Rules that join several settings, or say which values one may take. They are checked before anything is built."""

import math
from dataclasses import asdict

from sora_lite.config.data import BucketRule, DataConfig
from sora_lite.config.diffusion import DiffusionConfig, DiffusionObjective, ShiftBy, TimestepSampling
from sora_lite.config.dit import Attention, DiTConfig, Positions, TextAttention, unread
from sora_lite.config.generate import ConditionConfig, EvaluateConfig, GenerateConfig, Sampler, SamplingConfig
from sora_lite.config.optim import OptimConfig
from sora_lite.config.parallel import Offload, ParallelConfig, Precision
from sora_lite.config.run import GuardConfig, RunConfig
from sora_lite.config.train import (
    BaseTrainConfig,
    DataPreviewConfig,
    FrameMode,
    LoraConfig,
    TrainConfig,
    TrainVAEConfig,
)
from sora_lite.config.vae import VAEConfig
from sora_lite.config.verbs import ImportConfig, InspectConfig
from sora_lite.errors import UserError


def check(config: object) -> None:
    """Check the rules that join several fields.

    Raises:
        UserError: naming the key, what is wrong and what would be right.
    """
    if isinstance(config, BaseTrainConfig):
        _check_run(config.run, config.guard)
        peak = config.logging.peak_tflops
        _require(peak is None or 0 < peak < math.inf, "logging.peak_tflops", f"must be above 0, or null, not {peak}")
        _check_optim(config.optim)
        _check_parallel(config.parallel)
        _check_data(config.data)
        limit, patience = config.run.watchdog_seconds, config.data.worker_timeout
        _require(
            config.data.workers == 0 or patience < limit,
            "data.worker_timeout",
            f"{patience:g} is not below run.watchdog_seconds={limit:g}, which would end the run before a worker that "
            "hangs is started anew; change one of them",
        )
    if isinstance(config, TrainConfig | InspectConfig):
        _check_dit(config.model)
    if isinstance(config, TrainConfig):
        _check_diffusion(config.diffusion, config.model.learn_variance)
        _check_frames(config)
        _check_lora(config)
        _check_text(config)
    if isinstance(config, DataPreviewConfig):
        _check_preview(config)
    if isinstance(config, InspectConfig) and config.latent is not None:
        wrong = len(config.latent) != 4 or min(config.latent) < 1
        _require(not wrong, "latent", f"must be [channels, frames, height, width], not {config.latent}")
    if isinstance(config, ImportConfig):
        _at_least(1, config, "heads")
    if isinstance(config, GenerateConfig | EvaluateConfig):
        _check_sampling(config.sampling)
        _at_least(1, config, "count", "threads")
    if isinstance(config, GenerateConfig):
        _check_generate(config)
    if isinstance(config, EvaluateConfig):
        _at_least(1, config, "clips", "judge_steps")
        _require(FrameMode.random not in config.frames, "frames", "random is for training; take before or first_last")
        _require(
            bool(config.attributes or config.frames), "attributes", "is empty; name columns such as [digit], or frames"
        )
    if isinstance(config, TrainVAEConfig):
        _require(not any(config.data.latent_folders), "data.latents", "a VAE is trained on video; leave them out")
        _require(not any(config.data.text_folders), "data.text", "a VAE reads no text; leave it out")
        _check_vae(config.vae, config.data.buckets)


def _require(holds: bool, key: str, message: str) -> None:
    if not holds:
        raise UserError(f"{key}: {message}")


def _at_least(least: int, group: object, *keys: str, within: str = "") -> None:
    for key in keys:
        value = getattr(group, key)
        _require(value is None or value >= least, f"{within}{key}", f"must be at least {least}, not {value}")


def _check_run(run: RunConfig, guard: GuardConfig) -> None:
    named = bool(run.name.strip(".")) and "/" not in run.name and run.name.isprintable()
    _require(named, "run.name", f"{run.name!r} is no name of a folder; leave out slashes, and take more than dots")
    _require(0 <= run.seed < 2**63, "run.seed", f"must be at least 0 and below 2^63, not {run.seed}")
    for key in ("steps", "log_every", "save_every", "keep_last"):
        _require(getattr(run, key) >= 1, f"run.{key}", "must be at least 1")
    _require(run.check_every >= 1, "run.check_every", f"must be at least 1, not {run.check_every}")
    watched = 0 < run.watchdog_seconds <= 1e6
    _require(watched, "run.watchdog_seconds", f"must be above 0, and at most 1e6, not {run.watchdog_seconds}")
    for key in ("validate_every", "validation_samples", "sample_every", "keep_every"):
        _require(getattr(run, key) >= 0, f"run.{key}", "must be at least 0")
    _require(guard.window >= 2, "guard.window", f"must be at least 2, not {guard.window}")
    _require(guard.sigma > 0, "guard.sigma", f"must be above 0, not {guard.sigma}")
    for key in ("max_skips", "max_rollbacks"):
        _require(getattr(guard, key) >= 0, f"guard.{key}", "must be at least 0")


def _check_optim(optim: OptimConfig) -> None:
    _require(0 < optim.lr < math.inf, "optim.lr", f"must be above 0, not {optim.lr}")
    betas = len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)
    _require(betas, "optim.betas", f"needs two numbers in [0, 1), not {optim.betas}")
    _require(0 < optim.eps < math.inf, "optim.eps", f"must be above 0, not {optim.eps}")
    for key in ("weight_decay", "clip"):
        value = getattr(optim, key)
        _require(0 <= value < math.inf, f"optim.{key}", f"must be at least 0, not {value}")
    _require(0 <= optim.final_lr <= 1, "optim.final_lr", f"is a fraction in [0, 1] of optim.lr, not {optim.final_lr}")
    _require(optim.warmup_steps >= 0, "optim.warmup_steps", f"must be at least 0, not {optim.warmup_steps}")
    _require(0 <= optim.ema_decay < 1, "optim.ema_decay", f"must lie in [0, 1), not {optim.ema_decay}")


def _check_parallel(parallel: ParallelConfig) -> None:
    _require(parallel.accumulation >= 1, "parallel.accumulation", f"must be at least 1, not {parallel.accumulation}")
    threads = parallel.threads
    _require(threads is None or threads >= 1, "parallel.threads", f"must be at least 1, or null, not {threads}")
    _require(parallel.zero_stage in (0, 1, 2, 3), "parallel.zero_stage", f"is 0, 1, 2 or 3, not {parallel.zero_stage}")
    _require(
        parallel.precision is Precision.fp32 or parallel.zero_stage > 0,
        "parallel.zero_stage",
        "0 has no fp32 master weights under bf16; take parallel.zero_stage=1",
    )
    _require(
        parallel.offload is Offload.none or parallel.zero_stage > 0,
        "parallel.zero_stage",
        "0 shards nothing that parallel.offload=cpu could take; take parallel.zero_stage=1, 2 or 3",
    )


def _check_data(data: DataConfig) -> None:
    for key in ("batch_tokens", "divisor", "block_shards"):
        _require(getattr(data, key) >= 1, f"data.{key}", f"must be at least 1, not {getattr(data, key)}")
    _check_sets(data)
    _require(data.fps is None or 0 < data.fps < math.inf, "data.fps", f"must be above 0, or null, not {data.fps}")
    for key in ("workers", "io_retries", "cache_mb"):
        _require(getattr(data, key) >= 0, f"data.{key}", f"must be at least 0, not {getattr(data, key)}")
    for key in ("shard_cache_gb", "io_timeout", "worker_timeout"):
        value = getattr(data, key)
        _require(0 < value <= 1e6, f"data.{key}", f"must be above 0, and at most 1e6, not {value}")
    bad = data.max_bad_fraction
    _require(0 <= bad <= 1, "data.max_bad_fraction", f"is a fraction in [0, 1], not {bad}")
    _require(len(data.buckets) > 0, "data.buckets", "is empty; give at least one row {resolution: [H, W], frames: T}")
    for i, rule in enumerate(data.buckets):
        key = f"data.buckets[{i}]"
        _require(len(rule.resolution) == 2, f"{key}.resolution", f"must be [height, width], not {rule.resolution}")
        _require(min(rule.resolution) >= 1, f"{key}.resolution", f"must be at least 1 pixel, not {rule.resolution}")
        _require(rule.frames >= 1, f"{key}.frames", f"must be at least 1, not {rule.frames}")
        _require(rule.fps is None or 0 < rule.fps < math.inf, f"{key}.fps", f"must be above 0, or null, not {rule.fps}")
        _require(0 < rule.keep <= 1, f"{key}.keep", f"is a fraction in (0, 1], not {rule.keep}")
        if rule.batch is not None:
            _require(rule.batch >= 1, f"{key}.batch", f"must be at least 1, not {rule.batch}")
            _require(
                rule.batch % data.divisor == 0,
                f"{key}.batch",
                f"{rule.batch} is not a multiple of data.divisor={data.divisor}; change one of them",
            )


def _check_sets(data: DataConfig) -> None:
    _require(
        (data.shards is None) != (not data.sets),
        "data.sets",
        "is given along with data.shards; leave one of them out"
        if data.sets
        else "is empty; name a folder by data.shards",
    )
    _require(
        data.latents is None or data.shards is not None,
        "data.latents",
        "are those of data.shards; with data.sets give each row its own latents",
    )
    _require(
        data.text is None or data.shards is not None,
        "data.text",
        "is of the captions of data.shards; with data.sets give each row its own text",
    )
    _require(
        not data.flip or not any(data.latent_folders),
        "data.flip",
        "latents are of clips as they are; set data.flip=false, or leave the latents out",
    )
    for i, row in enumerate(data.sets):
        key, weight = f"data.sets[{i}].weight", row.weight
        _require(
            (weight is None) == (data.sets[0].weight is None), key, "give every data set a weight, or none of them"
        )
        _require(
            weight is None or 0 < weight < math.inf, key, f"must be above 0, not {weight}; or leave the data set out"
        )
    ratio = data.image_ratio
    _require(
        ratio is None or 0 < ratio < 1,
        "data.image_ratio",
        f"lies in (0, 1), not {ratio}; for one kind alone take only its rows of data.buckets",
    )
    stills = sum(rule.frames == 1 for rule in data.buckets)
    _require(
        ratio is None or 0 < stills < len(data.buckets),
        "data.image_ratio",
        f"{ratio} needs rows of data.buckets with 1 frame and rows with more; add one, or set data.image_ratio=null",
    )


def _check_generate(config: GenerateConfig) -> None:
    _at_least(1, config, "frames")
    _require(config.fps is None or 0.01 <= config.fps <= 1e6, "fps", f"must lie in [0.01, 1e6], not {config.fps}")
    _require(min(config.labels, default=0) >= 0, "labels", f"must be at least 0, not {config.labels}")
    for key, texts in (("prompts", config.prompts), ("negative_prompt", [config.negative_prompt])):
        _require(all(map(_is_text, texts)), key, "holds bytes that are no text in UTF-8; write it in UTF-8")
    given = config.condition
    _require(
        given.first is not None or given.last is not None or given.frames == ConditionConfig().frames,
        "condition.frames",
        "is of given clips; name one by condition.first or condition.last, or leave it out",
    )
    size = config.resolution
    _require(size is None or (len(size) == 2 and min(size) >= 1), "resolution", f"must be [height, width], not {size}")


def _is_text(words: str) -> bool:
    """Whether it can be encoded: what a shell passes on need not be UTF-8."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


_UNREAD = {
    "text_tokens": "for frozen text encoders, and bytes are cut at model.text.max_bytes",
    "rope_theta": "for model.positions=rope",
    "cross_norm": "for cross-attention to text",
}


def _check_dit(model: DiTConfig) -> None:
    _at_least(1, model, "width", "depth", "heads", "text_tokens", within="model.")
    _at_least(0, model, "num_classes", "text_features", "pooled_features", within="model.")
    for key in ("mlp_ratio", "rope_theta"):
        value = getattr(model, key)
        _require(0 < value < math.inf, f"model.{key}", f"must be above 0, not {value}")
    hidden = round(model.width * model.mlp_ratio)
    _require(hidden >= 1, "model.mlp_ratio", f"{model.mlp_ratio} leaves the MLPs without a channel; take 4")
    _require(model.width % model.heads == 0, "model.heads", f"{model.heads} does not divide model.width={model.width}")
    head = model.width // model.heads
    if model.positions is Positions.rope:
        _require(
            head % 2 == 0 and head >= 6, "model.heads", f"head width {head} must be even and at least 6 for 3-D RoPE"
        )
    else:
        _require(model.width % 4 == 0, "model.width", f"{model.width} must be a multiple of 4 for sines and cosines")
    if model.text is not None:
        text = model.text
        _at_least(1, text, "width", "heads", "max_bytes", within="model.text.")
        _at_least(0, text, "depth", within="model.text.")
        _require(text.width % text.heads == 0, "model.text.heads", f"{text.heads} does not divide {text.width}")
    whole = len(model.patch) == 3 and min(model.patch) >= 1
    _require(whole, "model.patch", f"must be [frames, height, width], not {model.patch}")
    features = model.text_features > 0 or model.pooled_features > 0
    _require(
        model.num_classes > 0 or model.text is not None or features,
        "model.num_classes",
        "the model has neither labels nor text; set model.num_classes, model.text or model.text_features",
    )
    _require(
        model.text is None or not features,
        "model.text_features",
        "and model.pooled_features are instead of the encoder over bytes; set model.text=null",
    )
    _require(not model.pad_text or model.text_features > 0, "model.pad_text", "needs model.text_features")
    for key in unread(asdict(model)):
        changed = getattr(model, key) != getattr(DiTConfig(), key)
        _require(not changed, f"model.{key}", f"is {_UNREAD[key]}; leave it out")
    if model.text_attention is TextAttention.joint:
        reads = model.text is not None or model.text_features > 0
        _require(reads, "model.text_attention", "joint needs text; set model.text or model.text_features")
        full = model.attention is Attention.full
        _require(full, "model.text_attention", "joint needs model.attention=full; factorised blocks take cross")
    even = model.attention is Attention.full or model.depth % 2 == 0
    _require(even, "model.depth", f"{model.depth} must be even: factorised blocks come in pairs of frame and time")
    _require(
        model.time_frequencies in (127, 128), "model.time_frequencies", f"is 127 or 128, not {model.time_frequencies}"
    )


def _check_diffusion(diffusion: DiffusionConfig, learn_variance: bool) -> None:
    name, straight = diffusion.objective.name, diffusion.objective is DiffusionObjective.rectified_flow
    dropout = diffusion.condition_dropout
    _require(0 <= dropout < 1, "diffusion.condition_dropout", f"must lie in [0, 1), not {dropout}")
    for key in ("shift", "shift_tokens"):
        value = getattr(diffusion, key)
        _require(0 < value < math.inf, f"diffusion.{key}", f"must be above 0, not {value}")
    weight = diffusion.vlb_weight
    _require(0 <= weight < math.inf, "diffusion.vlb_weight", f"must be at least 0, not {weight}")
    _require(
        not learn_variance or not straight,
        "model.learn_variance",
        "needs a noise schedule, and rectified_flow has none; take diffusion=ddpm, or model.learn_variance=false",
    )
    _require(
        not learn_variance or diffusion.vlb_weight > 0,
        "diffusion.vlb_weight",
        "0 would leave the variance of model.learn_variance untrained; take 0.001",
    )
    if straight:
        _require(
            not diffusion.zero_terminal_snr,
            "diffusion.zero_terminal_snr",
            "is for the objective velocity; rectified_flow ends in pure noise as it is",
        )
        return
    _require(
        diffusion.timesteps is TimestepSampling.uniform,
        "diffusion.timesteps",
        f"{diffusion.timesteps.name} is for rectified_flow; {name} draws its 1,000 steps alike: take uniform",
    )
    _require(
        diffusion.shift == 1 and diffusion.shift_by is ShiftBy.fixed,
        "diffusion.shift",
        f"moves the times of rectified_flow; {name} has a noise schedule instead: leave shift=1 and shift_by=fixed",
    )
    _require(
        not diffusion.zero_terminal_snr or diffusion.objective is DiffusionObjective.velocity,
        "diffusion.zero_terminal_snr",
        "needs the objective velocity: from pure noise epsilon says nothing about the data",
    )


def _check_sampling(sampling: SamplingConfig) -> None:
    _at_least(1, sampling, "steps", "batch", within="sampling.")
    _require(math.isfinite(sampling.guidance), "sampling.guidance", f"must be a number, not {sampling.guidance}")
    _require(0 <= sampling.eta <= 1, "sampling.eta", f"must lie in [0, 1], not {sampling.eta}")
    _require(
        sampling.eta == 0 or sampling.sampler is Sampler.ddim,
        "sampling.eta",
        f"is for the sampler ddim; {sampling.sampler.name} adds "
        + ("the noise of its own variance" if sampling.sampler is Sampler.ddpm else "no noise"),
    )
    interval = sampling.guidance_interval
    _require(
        len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1,
        "sampling.guidance_interval",
        f"must be [least, greatest] time in [0, 1], not {interval}",
    )
    rescale, channels, shift = sampling.guidance_rescale, sampling.guidance_channels, sampling.shift
    _require(0 <= rescale <= 1, "sampling.guidance_rescale", f"must lie in [0, 1], not {rescale}")
    _require(
        channels is None or channels >= 1, "sampling.guidance_channels", f"must be at least 1, or null, not {channels}"
    )
    _require(shift is None or 0 < shift < math.inf, "sampling.shift", f"must be above 0, or null, not {shift}")


def _check_frames(config: TrainConfig) -> None:
    given, reads = any(rule.mode is not FrameMode.none for rule in config.frames), config.model.frame_conditions
    _require(
        reads or not given, "model.frame_conditions", "is false, but frames has rows that give frames; set it to true"
    )
    _require(
        not given or not any(config.data.latent_folders),
        "frames",
        "given frames are encoded alone, out of video; leave out the latents, or the frames",
    )
    _require(given or not reads, "frames", "has no row that gives frames; add one, or model.frame_conditions=false")
    for i, rule in enumerate(config.frames):
        _require(0 < rule.weight < math.inf, f"frames[{i}].weight", f"must be above 0, not {rule.weight}")


def _check_lora(config: TrainConfig) -> None:
    lora, rank = config.lora, config.lora.rank
    _require(rank >= 0, "lora.rank", f"must be at least 1, or 0 to train all weights, not {rank}")
    for key in ("alpha", "targets"):
        changed = getattr(lora, key) != getattr(LoraConfig(), key)
        _require(rank > 0 or not changed, f"lora.{key}", "is for adapters; set lora.rank, such as lora.rank=16")
    _require(lora.alpha is None or 0 < lora.alpha < math.inf, "lora.alpha", f"must be above 0, not {lora.alpha}")
    _require(
        rank == 0 or config.init_from is not None,
        "init_from",
        "is missing; adapters (lora.rank) are of a trained model: name an export, a run that holds one, or an import",
    )
    _require(len(lora.targets) > 0, "lora.targets", "is empty; name layers, such as [blocks.*]")


def _check_preview(config: DataPreviewConfig) -> None:
    for key, least in (("start", 0), ("clips", 1), ("steps", 1), ("world_size", 1), ("accumulation", 1)):
        _require(getattr(config.preview, key) >= least, f"preview.{key}", f"must be at least {least}")
    data = config.data
    for given, made, folders, source in (
        (config.vae_from, "latents", data.latent_folders, "vae_from"),
        (config.text_from, "text", data.text_folders, "text_from"),
    ):
        needs = f"names what {data.key_of_all(made)} must have been made with; give it as to `sora-lite train`"
        _require(bool(given) or not any(folders), source, needs)


def _check_text(config: TrainConfig) -> None:
    for key, name in (("text_from", "text_features"), ("pooled_from", "pooled_features")):
        folder, width = getattr(config, key), getattr(config.model, name)
        what = "T5, UMT5 or CLIP" if key == "text_from" else "CLIP"
        # data-preview needs one only where features were made beforehand (`_check_preview`).
        _require(
            folder is not None or width == 0 or isinstance(config, DataPreviewConfig),
            key,
            f"is null, but the model reads model.{name}={width}; name the folder of a {what}",
        )
        _require(
            folder is None or width > 0,
            key,
            f"model.{name} is 0, so the model reads nothing of it; leave it out, or set model.{name} to the encoder's "
            "width and model.text=null",
        )
    _require(
        config.model.text_features > 0 or not any(config.data.text_folders),
        config.data.key_of_all("text"),
        "model.text_features is 0, so the model reads no features of captions; leave them out",
    )


def _check_vae(vae: VAEConfig, buckets: list[BucketRule]) -> None:
    _require(
        len(vae.strides) == len(vae.widths) - 1 and all(len(s) == 2 and set(s) <= {1, 2} for s in vae.strides),
        "vae.strides",
        f"must be {len(vae.widths) - 1} pairs [time, space] of 1 or 2, one between each two of vae.widths",
    )
    for key in ("encoder_blocks", "decoder_blocks"):
        _require(len(getattr(vae, key)) == len(vae.widths), f"vae.{key}", "needs one number for each of vae.widths")
    time = math.prod(stride[0] for stride in vae.strides)
    space = vae.patch * math.prod(stride[1] for stride in vae.strides)
    for i, rule in enumerate(buckets):
        _require(
            rule.frames % time == 1 % time,
            f"data.buckets[{i}].frames",
            f"{rule.frames} is not of the form {time}k+1 that the VAE compresses; take "
            f"{(rule.frames - 1) // time * time + 1}",
        )
        _require(
            all(side % space == 0 for side in rule.resolution),
            f"data.buckets[{i}].resolution",
            f"{rule.resolution} must be multiples of {space}, the VAE's spatial factor",
        )
