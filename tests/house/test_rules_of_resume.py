"""Every setting of a run says what a later start may do with it."""

from collections import Counter

from sora_lite.cli.compose import leaves
from sora_lite.config import TrainConfig, TrainVAEConfig
from sora_lite.training.resume import RULES, Rule


def test_each_setting_falls_under_one_rule() -> None:
    names = {name for root in (TrainConfig, TrainVAEConfig) for name, _ in leaves(root)}
    plain = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    entries = {name: [key for key in RULES if name == key or name.startswith(f"{key}.")] for name in plain}
    assert not {name: found for name, found in entries.items() if len(found) != 1}
    used = Counter(key for found in entries.values() for key in found)
    assert used.keys() == RULES.keys(), f"for no setting: {RULES.keys() - used.keys()}"
    assert all(why for _, why in RULES.values())


def test_what_is_free_and_what_is_kept() -> None:
    """Length, rate, views, saving, workers and layout change without a word; what was learned and seen does not."""
    free = {key for key, (rule, _) in RULES.items() if rule is Rule.free}
    assert free >= {
        "run.steps",
        "optim.lr",
        "logging",
        "slurm",
        "data.workers",
        "parallel.zero_stage",
        "run.save_every",
    }
    kept = {key for key, (rule, _) in RULES.items() if rule is Rule.kept}
    assert kept >= {"run.seed", "model", "vae", "diffusion", "loss", "data.buckets", "data.fps", "optim.betas"}
