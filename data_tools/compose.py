"""From KEY=VALUE words and YAML files to settings of `sora-data`, and the text that explains every setting."""

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sora_lite.config import field_docs
from sora_lite.errors import UserError

Settings = TypeVar("Settings")


def parse(schema: type[Settings], overrides: list[str], base: dict[str, Any] | None = None) -> Settings:
    """Turn KEY=VALUE words into a settings object. Raises UserError for an unknown key or a wrong value.

    `config=FILE` reads a YAML file first. base: settings (of `plain`) to begin with instead of the defaults.
    """
    names = dict(leaves(schema))
    files = [Path(word.partition("=")[2]) for word in overrides if word.startswith("config=")]
    words = [word for word in overrides if not word.startswith("config=")]
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals:
            raise UserError(f"{word}: neither a setting KEY=VALUE nor expected here; see --help.")
        if key not in names:
            raise UserError(f"{key}: no such key; {_nearest(key, names)}")
    try:
        merged = OmegaConf.structured(schema)
        if base is not None:
            merged = OmegaConf.merge(merged, base)
        for path in files:
            merged = OmegaConf.merge(merged, _read_yaml(path, names))
        for word in words:
            merged = OmegaConf.merge(merged, _from_word(word))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = error.full_key or "settings"
        if key not in names:  # a row of a list knows nothing of the list
            given = next((word.partition("=")[0] for word in words if key in word), "settings")
            key = f"{given}: {key}"
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from None


def _read_yaml(path: Path, names: dict[str, Any]) -> Any:
    try:
        content = OmegaConf.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"config={path}: cannot be read ({error}); name a YAML file of settings.") from None
    except Exception as error:  # noqa: BLE001 - the parser's errors share no base class with others
        raise UserError(f"config={path}: is not YAML ({str(error).splitlines()[0]}); mend it.") from None
    if not OmegaConf.is_dict(content):
        raise UserError(f"config={path}: holds no settings; write them as KEY: VALUE.")

    def keys(node: Any, prefix: str = "") -> Iterator[str]:
        for key in node:
            full = f"{prefix}{key}"
            if full not in names and OmegaConf.is_dict(node[key]):
                yield from keys(node[key], f"{full}.")
            else:
                yield full

    for key in keys(content):
        if key not in names:
            raise UserError(f"{path}: {key}: no such key; {_nearest(key, names)}")
    return content


def _from_word(word: str) -> Any:
    try:
        return OmegaConf.from_dotlist([word])
    except OmegaConfBaseException:
        raise
    except Exception as error:  # noqa: BLE001 - the errors of the YAML parser, which is not named elsewhere
        why = " ".join(str(error).split())
        raise UserError(f"{word}: cannot be read ({why}); close its brackets, or put its text in quotes.") from None


def _nearest(key: str, names: dict[str, Any]) -> str:
    last = {name.split(".")[-1]: name for name in reversed(names)}
    near = difflib.get_close_matches(key, [*names, *last], n=1, cutoff=0.4)
    return f"the nearest is {last.get(near[0], near[0])}" if near else f"there are {', '.join(names)}"


def leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, default) of every setting, those of nested groups with dots."""
    docs = get_type_hints(schema)
    for item in fields(schema):
        if is_dataclass(kind := docs[item.name]):
            yield from leaves(kind, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            factory: Any = item.default_factory
            yield f"{prefix}{item.name}", factory() if callable(factory) else item.default


def help_text(schema: type, prefix: str = "") -> str:
    """Every setting of a schema with its default and doc string."""
    docs, kinds, lines = field_docs(schema), get_type_hints(schema), []
    for item in fields(schema):
        kind = kinds[item.name]
        if is_dataclass(kind):
            lines.append(help_text(kind, f"{prefix}{item.name}."))  # type: ignore[arg-type]
            continue
        default = dict(leaves(schema))[item.name]
        shown = [one.name for one in default] if isinstance(default, list) else default
        shown = "null" if shown is None else shown.name if isinstance(shown, Enum) else shown
        lines.append(f"  {prefix}{item.name}={shown}\n      " + docs[item.name].replace("\n", "\n      "))
    return "\n".join(lines)
