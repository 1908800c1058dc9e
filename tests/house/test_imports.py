"""Who may import whom. The direction is what lets a reader open one file and know what can reach it."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

from project_tree import PACKAGES, ROOT, imports_of, is_under, module_of, name_of, python_files

# Room: the rooms that it may import. A room is a folder or a file directly under sora_lite.
ALLOWED = {
    "sora_lite.errors": set(),
    "sora_lite.memory": set(),
    "sora_lite.config": {"errors"},
    "sora_lite.data": {"errors", "memory", "config"},
    "sora_lite.models": {"errors"},
    "sora_lite.diffusion": {"errors"},
    "sora_lite.evaluation": {"errors", "data"},
    "sora_lite.parallel": {"errors", "memory", "config", "data", "models", "diffusion"},
    "sora_lite.generation": {"errors", "config", "data", "models", "diffusion", "parallel"},
    "sora_lite.training": {"errors", "config", "data", "models", "diffusion", "parallel", "generation", "evaluation"},
    "sora_lite.cli": {"errors", "config", "data", "models", "diffusion", "evaluation", "generation", "training"}
    | {"parallel"},
    "data_tools": {"errors", "config", "data", "cli", "models", "generation", "parallel", "evaluation"},
}

# Library: the only files or rooms that may import it.
ONLY_IN = {
    "deepspeed": ("sora_lite.training.engine",),
    "wandb": ("sora_lite.training.tracking",),
    "hydra": ("sora_lite.config", "sora_lite.cli"),
    "omegaconf": ("sora_lite.config", "sora_lite.cli", "sora_lite.training.trainer", "data_tools"),
    "torch.distributed": ("sora_lite.parallel", "sora_lite.training", "sora_lite.cli"),
    "peft": ("sora_lite.models.lora",),
    "av": ("sora_lite.data.video",),
    "torch": ("sora_lite", "data_tools.transnet", "data_tools.score_models", "data_tools.encode"),
}

TORCH_FREE = {
    f"sora_lite.data.{name}"
    for name in ("files", "manifest", "shards", "index", "video", "order", "buckets", "compiled", "joined")
}


def room(name: str) -> str | None:
    """The room that a dotted name belongs to; None outside the project and for the bare package (its version)."""
    top, _, rest = name.partition(".")
    if top == "data_tools":
        return top
    below = ROOT / "sora_lite" / rest.split(".")[0]
    if top == "sora_lite" and rest and (below.is_dir() or below.with_suffix(".py").is_file()):
        return f"{top}.{below.name}"
    return None


def test_every_room_has_its_place() -> None:
    rooms = {room(module_of(path)) for path in python_files(*PACKAGES)} - {None}
    assert rooms <= set(ALLOWED), f"new rooms {rooms - set(ALLOWED)}: say in ALLOWED what they may import"


def test_import_direction() -> None:
    wrong = []
    for path in python_files(*PACKAGES):
        here = room(module_of(path))
        for line, name in imports_of(path):
            there = room(name)
            if there not in (None, here) and there.removeprefix("sora_lite.") not in ALLOWED.get(here, ()):
                wrong.append(f"{name_of(path)}:{line} imports {name}")
    assert not wrong


def test_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for path in python_files(*PACKAGES):
        module = module_of(path)
        closed = {library for library, rooms in ONLY_IN.items() if not is_under(module, *rooms)}
        if is_under(module, *TORCH_FREE):
            closed.add("torch")
        wrong += [
            f"{name_of(path)}:{line} imports {name}" for line, name in imports_of(path) if is_under(name, *closed)
        ]
    assert not wrong


def loaded_by(*modules: str) -> set[str]:
    """Top names of all modules that a fresh interpreter holds after importing the given ones."""
    code = f"import {', '.join(modules)}, sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def modules_under(*prefixes: str) -> list[str]:
    """All modules of the project at or below the given dotted names."""
    return [name for name in map(module_of, python_files(*PACKAGES)) if is_under(name, *prefixes)]


def test_shards_are_read_without_torch() -> None:
    assert not loaded_by(*modules_under(*TORCH_FREE)) & {"torch", "deepspeed", "wandb", "hydra"}


def test_inference_needs_no_training_stack() -> None:
    modules = modules_under("sora_lite.models", "sora_lite.diffusion", "sora_lite.generation")
    assert not loaded_by(*modules) & {"deepspeed", "wandb"}


def test_the_front_door_opens_at_once() -> None:
    assert not loaded_by("sora_lite.cli") & {"torch", "deepspeed", "wandb", "hydra", "av"}


# ---------------------------------------------------------------------------------------------------- dependencies


def distribution_names(requirements: list[str]) -> set[str]:
    """Normalised distribution names of requirement strings."""
    return {re.split(r"[\s\[<>=!~;]", text, maxsplit=1)[0].lower().replace("_", "-") for text in requirements}


def imported_distributions(*folders: str) -> dict[str, str]:
    """Third-party distribution: one place that imports it."""
    owners = packages_distributions()
    found = {}
    for path in python_files(*folders):
        for line, name in imports_of(path):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top in owners and top not in PACKAGES:
                found.setdefault(owners[top][0].lower().replace("_", "-"), f"{name_of(path)}:{line}")
    return found


def test_dependencies_are_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = distribution_names(project["dependencies"])
    extras = {name: distribution_names(rows) for name, rows in project["optional-dependencies"].items()}
    for_users = set.union(*(extras[name] for name in extras.keys() - {"dev"}))
    imported = imported_distributions(*PACKAGES)
    missing = {name: place for name, place in imported.items() if name not in declared | for_users}
    assert not missing, f"imported but not in pyproject.toml: {missing}"
    installed = {name.lower().replace("_", "-") for names in packages_distributions().values() for name in names}
    unused = ((declared | for_users) & installed) - set(imported)
    assert not unused, f"in pyproject.toml but imported nowhere: {sorted(unused)}"


def test_dev_dependencies_cover_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = distribution_names(
        [*project["dependencies"], *(row for rows in project["optional-dependencies"].values() for row in rows)]
    )
    imported = imported_distributions("tests", "benchmarks")
    assert set(imported) <= declared, {name: place for name, place in imported.items() if name not in declared}
