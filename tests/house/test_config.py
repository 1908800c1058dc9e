"""The configuration is whole: every named choice composes, every field is explained and used, every typo is named."""

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import OmegaConf
from project_tree import PACKAGES, ROOT, is_under, module_of, python_files, tree_of

from sora_lite import config as schema
from sora_lite.cli.compose import assets, choices, compose, compose_tree, groups, leaves
from sora_lite.errors import UserError

GIVEN = {
    "run.name": "trial",
    "run": "runs/trial",
    "data.shards": "shards",
    "shards": "shards",
    "vae_from": "runs/vae",
    "model_from": "runs/trial/export",
    "out": "out",
    "weights_from": "weights.pt",
    "runs": "runs",
}
"""What only a person can say, by key."""

EXPERIMENTS = choices("experiment")


@cache
def asked_for(root: str) -> list[str]:
    """Overrides for everything that a root's own defaults leave to a person."""
    return [f"{key}={GIVEN[key]}" for key in sorted(OmegaConf.missing_keys(compose_tree(root, [])))]


def compose_whole(root: str, *overrides: str) -> Any:
    """Compose a root with whatever only a person can say filled in."""
    said = {override.split("=")[0] for override in overrides}
    return compose(root, [*overrides, *(given for given in asked_for(root) if given.split("=")[0] not in said)])


def nodes(node: type) -> Iterator[type]:
    """A dataclass and all dataclasses below it."""
    yield node
    for kind in get_type_hints(node).values():
        for inner in (kind, *get_args(kind)):
            if is_dataclass(inner):
                yield from nodes(inner)


@pytest.mark.parametrize("root", schema.ROOTS)
def test_every_choice_composes(root: str) -> None:
    # One choice of each group at a time: together they cover all, and composing is slow.
    rows = ([f"{group}={choice}" for choice in choices(group)] for group in groups(root) if group != "experiment")
    for together in zip_longest(*rows):
        overrides = [override for override in together if override]
        if root in ("train", "data_preview") and any(override.startswith("model=dit_") for override in overrides):
            # The paper's models learn a variance, for which rectified flow has no use: it comes alone.
            overrides = [one for one in overrides if not one.startswith("diffusion=")] + ["diffusion=ddpm"]
        if root == "train" and any(override.startswith("model=wan_") for override in overrides):
            overrides.append("text_from=umt5")
        assert isinstance(compose_whole(root, *overrides), schema.ROOTS[root]), overrides


@pytest.mark.parametrize("choice", choices("diffusion"))
def test_every_objective_composes(choice: str) -> None:
    assert isinstance(compose_whole("train", f"diffusion={choice}"), schema.TrainConfig)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str) -> None:
    composed, refused = [], {}
    for root in (root for root in schema.ROOTS if "experiment" in groups(root)):
        try:
            composed.append(compose_whole(root, f"experiment={experiment}"))
        except UserError as error:
            refused[root] = str(error)
    assert composed, f"fits no verb: {refused}"


def test_every_choice_belongs_to_a_verb() -> None:
    used = {group for root in schema.ROOTS for group in groups(root)}
    assert {path.name for path in assets("conf").iterdir() if path.is_dir()} == used
    assert {path.stem for path in assets("conf").glob("*.yaml")} == set(schema.ROOTS)


def test_every_field_is_explained() -> None:
    found = {node for root in schema.ROOTS.values() for node in nodes(root)}
    silent = [
        f"{node.__name__}.{field.name}"
        for node in found
        for field in fields(node)
        if not is_dataclass(get_type_hints(node)[field.name]) and not schema.field_docs(node).get(field.name)
    ]
    assert not silent
    assert all(node.__doc__ and not node.__doc__.startswith(f"{node.__name__}(") for node in found)


def test_every_field_is_used() -> None:
    """A field is used where it is read as an attribute, or handed on as the parameter of that name."""
    names = set()
    users = [path for path in python_files(*PACKAGES) if not is_under(module_of(path), "sora_lite.config")]
    for path in users:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.arg) and is_under(module_of(path), "sora_lite.models"):
                names.add(node.arg)
    every = {field.name for root in schema.ROOTS.values() for node in nodes(root) for field in fields(node)}
    unread = sorted(every - names)
    assert not unread


@pytest.mark.parametrize("root", schema.ROOTS)
def test_a_mistyped_key_names_the_nearest(root: str) -> None:
    keys = [name for name, _ in leaves(schema.ROOTS[root]) if not name.startswith("data.buckets.")]
    longest = sorted((key for key in keys if "." in key or root in ("export", "demo")), key=len)[-3:]
    for key in longest:
        typo = f"{key[:-2]}{key[-1]}{key[-2]}x"
        with pytest.raises(UserError) as error:
            compose(root, [f"{typo}=1"])
        assert typo in str(error.value) and key in str(error.value) and "\n" not in str(error.value)


def test_a_mistyped_key_in_a_row_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"frames"):
        compose_whole("train", "data.buckets=[{resolution:[32,32],framse:17}]")


def test_a_mistyped_choice_names_the_nearest() -> None:
    with pytest.raises(UserError, match="dit_s_2"):
        compose("train", ["model=dit_s2"])


@pytest.mark.parametrize(
    ("root", "override", "says"),
    [
        ("train", "run.steps=many", "run.steps"),
        ("train", "optim.lr=fast", "optim.lr"),
        ("train", "optim.schedule=linear", "cosine"),
        ("train", "parallel.zero_stage=4", "parallel.zero_stage"),
        ("train", "model.width=100", "model.heads"),
        ("train_vae", "vae.widths=wide", "vae.widths"),
        ("inspect", "latent=[4,5.5,32,32]", "latent[1]: Value"),
        ("generate", "sampling.guidance_interval=[a,1]", "sampling.guidance_interval[0]: Value"),
        ("train", "experiment=conf/experiment/tiny.yaml", "experiment/tiny.yaml: no such choice; the nearest is tiny"),
        ("train", "experiment=tiny_vae", "experiment=tiny_vae: sets vae, which `sora-lite train` does not have"),
    ],
)
def test_a_wrong_value_names_its_key(root: str, override: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        compose_whole(root, override)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("root", "override", "says"),
    [
        ("train", "run.name=..", "run.name: '..' is no name of a folder"),
        ("train", "run.seed=99999999999999999999", "run.seed: must be at least 0"),
        ("train", "run.watchdog_seconds=inf", "run.watchdog_seconds: must be above 0"),
        ("train", "logging.peak_tflops=0", "logging.peak_tflops: must be above 0"),
        ("train", "optim.betas=[0.9,1.0]", "optim.betas: needs two numbers in [0, 1)"),
        ("train", "optim.eps=-1", "optim.eps: must be above 0"),
        ("train", "optim.clip=-1", "optim.clip: must be at least 0"),
        ("train", "parallel.threads=0", "parallel.threads: must be at least 1"),
        ("train", "data.worker_timeout=300", "data.worker_timeout: 300 is not below run.watchdog_seconds=300"),
        ("train", "data.cache_mb=-1", "data.cache_mb: must be at least 0"),
        ("train", "data.shard_cache_gb=inf", "data.shard_cache_gb: must be above 0"),
        ("train", "data.max_bad_fraction=2", "data.max_bad_fraction: is a fraction"),
        ("train", "data.cache=~/index", "data.cache: '~/index' cannot be read; close every bracket"),
        ("inspect", "model.heads=0", "model.heads: must be at least 1, not 0"),
        ("inspect", "model.depth=-1", "model.depth: must be at least 1"),
        ("inspect", "model.num_classes=-1", "model.num_classes: must be at least 0"),
        ("inspect", "model.text_features=-3", "model.text_features: must be at least 0"),
        ("inspect", "model.mlp_ratio=0", "model.mlp_ratio: must be above 0"),
        ("inspect", "model.mlp_ratio=0.0001", "model.mlp_ratio: 0.0001 leaves the MLPs without a channel"),
        ("inspect", "model.rope_theta=0", "model.rope_theta: must be above 0"),
        ("inspect", "model.patch=[0,2,2]", "model.patch: must be [frames, height, width], not [0, 2, 2]"),
        ("inspect", "model.text.heads=0", "model.text.heads: must be at least 1"),
        ("inspect", "model.text.max_bytes=0", "model.text.max_bytes: must be at least 1"),
        ("inspect", "latent=[4,1,32]", "latent: must be [channels, frames, height, width]"),
        ("inspect", "latent=[4,0,32,32]", "latent: must be [channels, frames, height, width]"),
        ("generate", "frames=0", "frames: must be at least 1"),
        ("generate", "resolution=[0,32]", "resolution: must be [height, width], not [0, 32]"),
        ("generate", "threads=0", "threads: must be at least 1"),
        ("generate", "sampling.guidance=nan", "sampling.guidance: must be a number"),
        ("generate", "sampling.shift=inf", "sampling.shift: must be above 0"),
        ("generate", "fps=inf", "fps: must lie in [0.01, 1e6]"),
        ("generate", "labels=[-1]", "labels: must be at least 0"),
        ("generate", "condition.frames=9", "condition.frames: is of given clips"),
        ("import", "heads=-2", "heads: must be at least 1"),
        ("evaluate", "count=0", "count: must be at least 1"),
        ("evaluate", "judge_steps=0", "judge_steps: must be at least 1"),
        ("evaluate", "attributes=[]", "attributes: is empty"),
    ],
)
def test_an_impossible_number_names_its_key(root: str, override: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        compose_whole(root, override)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.sets=[{shards: a}]", "data.shards=b"], "leave one of them out"),
        (["data.shards=null"], "data.sets: is empty; name a folder by data.shards"),
        (["data.sets=[{shards: a, weight: 1}, {shards: b}]"], r"data\.sets\[1\]\.weight: give every"),
        (["data.sets=[{shards: a, weight: 0}]"], r"data\.sets\[0\]\.weight: must be above 0"),
        (["data.shards=a", "data.image_ratio=1"], r"data\.image_ratio: lies in"),
        (["data.shards=a", "data.image_ratio=0.2"], r"data\.image_ratio: 0\.2 needs rows"),
        (["data.shards=a", "data.buckets=[{resolution: [32, 32], frames: 17, batch: 0}]"], "batch: must be at least 1"),
    ],
)
def test_mixtures_that_cannot_be(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        compose("train", ["run.name=trial", "vae_from=vae", *overrides])


@pytest.mark.parametrize("words", [["parallel.offload=cpu"], ["parallel.precision=bf16"]])
def test_zero_0_shards_nothing(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"parallel\.zero_stage: 0 .* take parallel\.zero_stage=1"):
        compose("train", ["run.name=trial", "vae_from=vae", "data.shards=a", "parallel.zero_stage=0", *words])
    compose("train", ["run.name=trial", "vae_from=vae", "data.shards=a", "parallel.zero_stage=1", *words])


def test_data_sets_stand_for_shards() -> None:
    config = compose(
        "train", ["run.name=trial", "vae_from=vae", "data.sets=[{shards: a, weight: 3}, {shards: b, weight: 1}]"]
    )
    assert config.data.folders == ["a", "b"] and config.data.shards is None
    assert config.data.key_of(1) == "data.sets[1].shards" and [row.weight for row in config.data.sets] == [3, 1]


def test_a_missing_value_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"data\.shards"):
        compose("train", ["run.name=trial"])


def test_what_is_composed_is_plain() -> None:
    """Below the command line nobody meets a node of the configuration library."""

    def walk(value: object) -> Iterator[object]:
        yield value
        if is_dataclass(value):
            for field in fields(value):
                yield from walk(getattr(value, field.name))
        elif isinstance(value, list | tuple):
            for item in value:
                yield from walk(item)

    for root in schema.ROOTS:
        kinds = {type(value).__module__.split(".")[0] for value in walk(compose_whole(root))}
        assert kinds <= {"builtins", "sora_lite"}


def test_configuration_has_no_code() -> None:
    """Interpolations into the environment or into resolvers would make the same file mean different things."""
    texts = {path: path.read_text() for path in (ROOT / "conf").rglob("*.yaml")}
    assert texts and not [path.name for path, text in texts.items() if "${oc.env" in text or "!!python" in text]
