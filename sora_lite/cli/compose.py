"""From a command line to a checked configuration object, with errors that name the cause and the cure."""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

import sora_lite
from sora_lite import config as schema
from sora_lite.config import ROOTS
from sora_lite.errors import UserError


def assets(name: str) -> Path:
    """Folder `conf` or `slurm`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(sora_lite.__file__).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise UserError(f"the folder {name}/ is missing from this installation; install sora_lite again")


def compose(root: str, overrides: list[str]) -> Any:
    """Compose `conf/{root}.yaml` with overrides into its typed root object and check it.

    Args:
        root: a key of `sora_lite.config.ROOTS`.
        overrides: Hydra overrides, such as `run.steps=10` or `model=video_s`.

    Raises:
        UserError: an unknown key or choice, a wrong type, a missing value, or a broken rule between fields.
    """
    tree = compose_tree(root, overrides)
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        what = ", ".join(f"{key}=..." for key in missing)
        raise UserError(f"{missing[0]}: has no value yet; add {what}")
    config = OmegaConf.to_object(tree)
    schema.check(config)
    return config


def compose_tree(root: str, overrides: list[str]) -> DictConfig:
    """As `compose`, but the tree itself, where values may still be missing."""
    schema.register()
    GlobalHydra.instance().clear()
    # Hydra takes KEY=VALUE for a choice wherever conf/KEY/ exists, also where this root has a plain field of that name.
    names = {field.name for field in fields(ROOTS[root])} - set(groups(root))
    plain = [one for one in overrides if (key := one.partition("=")[0]) in names and (assets("conf") / key).is_dir()]
    try:
        with hydra.initialize_config_dir(str(assets("conf")), version_base="1.3"):
            tree = hydra.compose(root, [one for one in overrides if one not in plain])
            tree.merge_with_dotlist(plain)
            OmegaConf.resolve(tree)
            if "data" in tree and tree.data.sets and OmegaConf.is_missing(tree.data, "shards"):
                tree.data.shards = None  # one of the two is asked for
            return tree
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, root, overrides)) from error
    except AssertionError as error:  # OmegaConf's, for a key below one that is null
        line = _below_null(root, overrides)
        if line is None:
            raise
        raise UserError(line) from error


def to_yaml(root: str, overrides: list[str]) -> str:
    """The resolved configuration as YAML: what `--cfg job` prints."""
    return OmegaConf.to_yaml(compose_tree(root, overrides), resolve=True)


# ---------------------------------------------------------------------------------------------------- errors


def _explain(error: Exception, root: str, overrides: list[str]) -> str:
    """One line for an exception of Hydra or OmegaConf."""
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return (
            f"{key}: {value!r} cannot be read; close every bracket and quote, and put a text with characters such as "
            f"~ ? = : or accents in quotes of its own: '{key}=\"...\"'"
        )
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    # A row of a list knows nothing of the list: the outermost message names that.
    override = re.search(r"override '?([\w.]+)", str(error))
    for link in chain:
        text = str(link)
        if not (named := re.search(r"full_key: (\S+)", text)):
            continue
        key = named.group(1)
        if override and isinstance(getattr(link, "object_type", None), type) and "." not in key:
            in_row = link.object_type not in ROOTS.values()  # type: ignore[attr-defined]
            in_row = in_row and not key.startswith(f"{override.group(1)}[")  # an element of a list of numbers
            key = f"{override.group(1)}.{key}" if in_row else key
        if re.match(r"Key '[^']+' (is )?not in", text):
            return _unknown_key(key, root, overrides)
        if isinstance(link, ValidationError):
            message = text.splitlines()[0]
            if "is not a ListConfig" in message:
                message = "must be a list, in brackets and quotes such as 'KEY=[...]'"
            return f"{key}: {message}{'' if 'expected' in message else _expected(key, root)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    if match := re.search(r"Could not override '([^']+)'", message):
        return _unknown_key(match.group(1), root, overrides)
    if match := re.search(r"Could not find '([^'/]+)/([^']+)'", message) or re.search(
        r"In '[^']+': Could not find '([^'/]+)/([^']+)'", message
    ):
        group, choice = match.groups()
        return f"{group}={choice}: no such choice; {_nearest(Path(choice).stem, choices(group))}"
    return " ".join(lines)


def _below_null(root: str, overrides: list[str]) -> str | None:
    """One line for an override whose group is null by a choice or by another override; None if there is none."""
    below = [one for one in overrides if "." in one.partition("=")[0] and not one.endswith("=null")]
    if not below:
        return None
    tree = compose_tree(root, [one for one in overrides if one not in below])
    for one in below:
        key = one.partition("=")[0]
        group = key.rpartition(".")[0]
        if OmegaConf.select(tree, group) is None:
            return f"{key}: {group} is null, so it has no settings; leave {one} out, or choose another {group}"
    return None


def _unknown_key(key: str, root: str, overrides: list[str]) -> str:
    key = re.sub(r"\[\d+\]", "", key)
    typed = {part for name in re.findall(r"[\w.]+(?=\s*[=:])", " ".join(overrides)) for part in name.split(".")}
    experiment = next((one for one in overrides if one.startswith("experiment=")), None)
    if experiment and key.rpartition(".")[2] not in typed:
        verb = root.replace("_", "-")
        return f"{experiment}: sets {key}, which `sora-lite {verb}` does not have; take an experiment for {verb}"
    names = [name for name, _ in leaves(ROOTS[root])] + groups(root)
    return f"{key}: no such key; {_nearest(key, names)}"


def _nearest(word: str, known: list[str]) -> str:
    # A path whose last part is right beats one that merely looks alike, since people forget the first part.
    tails = [name for name in known if name.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    # So does one that goes on where the word stops.
    longer = [name for name in known if name.startswith(word)]
    near = tails[:1] or longer[:1] or difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"the nearest is {near[0]}" if near else f"there are {', '.join(sorted(known))}"


def _expected(key: str, root: str) -> str:
    for name, kind in leaves(ROOTS[root]):
        if name == key:
            if isinstance(kind, type) and issubclass(kind, Enum):
                return f" (expected one of {', '.join(member.name for member in kind)})"
            return f" (expected {type_name(kind)})"
    return ""


# ---------------------------------------------------------------------------------------------------- help


def groups(root: str) -> list[str]:
    """Config groups of a root, such as `model`: keys of the root for which `conf/` has choices."""
    names = [field.name for field in fields(ROOTS[root])] + ["experiment"]
    defaults = (assets("conf") / f"{root}.yaml").read_text()
    return [name for name in names if (assets("conf") / name).is_dir() and f"{name}:" in defaults]


def choices(group: str) -> list[str]:
    """Names that can be given to a group."""
    return sorted(path.stem for path in (assets("conf") / group).glob("*.yaml"))


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of all fields under a dataclass; rows of a list of dataclasses appear as `name.field`."""
    hints = get_type_hints(node)
    for field in fields(node):
        kind = hints[field.name]
        inner = next((arg for arg in (kind, *get_args(kind)) if is_dataclass(arg)), None)
        if inner is None:
            yield prefix + field.name, kind
        else:
            if inner is not kind:
                yield prefix + field.name, kind
            yield from leaves(inner, f"{prefix}{field.name}.")


def type_name(kind: Any) -> str:
    """A type as people write it: `int`, `list[int]`, `float or null`."""
    args = [arg for arg in get_args(kind) if arg is not type(None)]
    if type(None) in get_args(kind):
        return f"{' or '.join(type_name(arg) for arg in args)} or null"
    if args:
        return f"list of {type_name(args[0])}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(member.name for member in kind)
    return getattr(kind, "__name__", str(kind))


def help_text(verb: str, root: str) -> str:
    """What `sora-lite VERB --help` prints below its first line: usage, groups and every field with its doc."""
    lines = [
        f"usage: sora-lite {verb} [--help] [--cfg job] [GROUP=CHOICE ...] [KEY=VALUE ...]",
        "",
        "  --cfg job   print the resolved configuration and stop",
    ]
    if names := groups(root):
        lines += ["", "groups:"]
        lines += [f"  {name:<12}{', '.join(choices(name))}" for name in names]
    lines += ["", "keys:", *_field_lines(ROOTS[root], "")]
    return "\n".join(lines)


def _field_lines(node: Any, prefix: str) -> Iterator[str]:
    hints, docs = get_type_hints(node), schema.field_docs(node)
    for field in fields(node):
        kind = hints[field.name]
        inner = next((arg for arg in (kind, *get_args(kind)) if is_dataclass(arg)), None)
        name = prefix + field.name
        if inner is not kind:
            yield f"  {name}  ({type_name(kind)}{_default(field)})"
            yield f"      {docs[field.name]}"
        if inner is not None:
            yield from _field_lines(inner, f"{name}.")


def _default(field: Field) -> str:
    value = field.default_factory() if field.default_factory is not NO_DEFAULT else field.default
    if value is NO_DEFAULT or value == "???" or is_dataclass(value):
        return ", required" if value == "???" else ""
    if isinstance(value, Enum):
        value = value.name
    return f", {json.dumps(value)}"


def configure(verb: str, argv: list[str]) -> Any:
    """The configuration of a verb from its arguments. `--help` and `--cfg job` print and exit.

    Raises:
        UserError: see `compose`; also for an unknown option.
    """
    root = verb.replace("-", "_")
    if "--help" in argv or "-h" in argv:
        print(help_text(verb, root))
        raise SystemExit(0)
    show = argv[-2:] == ["--cfg", "job"] or argv[:2] == ["--cfg", "job"]
    overrides = [arg for arg in argv if arg not in ("--cfg", "job")] if show else argv
    for arg in overrides:
        if arg.startswith("-"):
            raise UserError(f"{arg}: no such option; there are --help and --cfg job, settings are given as KEY=VALUE")
        if "=" not in arg and not arg.startswith("~"):
            raise UserError(f"{arg}: is no setting KEY=VALUE; `sora-lite {verb} --help` lists the keys")
    if show:
        print(to_yaml(root, overrides))
        raise SystemExit(0)
    return compose(root, overrides)
