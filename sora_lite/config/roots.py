"""The root class of every verb, for Hydra; and the doc strings of fields, for `--help`."""

import ast
import inspect
import textwrap
from functools import cache

from hydra.core.config_store import ConfigStore

from sora_lite.config.generate import EvaluateConfig, GenerateConfig
from sora_lite.config.train import DataPreviewConfig, TrainConfig, TrainVAEConfig
from sora_lite.config.verbs import (
    CheckpointConfig,
    DemoConfig,
    ExportConfig,
    ImportConfig,
    InspectConfig,
    ScalingConfig,
)

ROOTS: dict[str, type] = {
    "train": TrainConfig,
    "train_vae": TrainVAEConfig,
    "data_preview": DataPreviewConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "evaluate": EvaluateConfig,
    "inspect": InspectConfig,
    "checkpoint": CheckpointConfig,
    "scaling": ScalingConfig,
    "demo": DemoConfig,
}


def register() -> None:
    """Register every root schema with Hydra as `NAME_schema`; `conf/NAME.yaml` builds on it."""
    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(name=f"{name}_schema", node=root)


@cache
def field_docs(node: type) -> dict[str, str]:
    """The doc string under each field of a dataclass, by field name (its own fields, then its bases')."""
    docs: dict[str, str] = {}
    for cls in node.__mro__[:-1]:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs.setdefault(statement.target.id, inspect.cleandoc(str(following.value.value)))
    return docs
