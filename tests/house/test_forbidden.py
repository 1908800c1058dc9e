"""What stands nowhere in the project: ways to run what a file says, loose ends, one machine's paths."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from project_tree import ROOT, imports_of, is_under, name_of, project_files, python_files, tree_of

UNSAFE_MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
UNSAFE_CALLS = {"os.system", "os.popen", "eval", "exec", "compile"}
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".sbatch", ".jinja", ""}


def text_files() -> list[Path]:
    """Everything that people read or write by hand."""
    return [path for path in project_files() if path.suffix in TEXT_SUFFIXES]


def unsafe_calls(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what) of calls in a file that run, or may run, what a string or a file says."""
    where = name_of(path)
    for call in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)):
        name, keywords = ast.unparse(call.func), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in UNSAFE_CALLS:
            yield call.lineno, f"{name}(...)"
        for flag in ("shell", "allow_pickle"):
            if keywords.get(flag, "False") != "False":
                yield call.lineno, f"{flag}={keywords[flag]}"
        # Files of others are read in few places, and only their tensors.
        readers = ("sora_lite/cli/import", "data_tools/transnet.py")
        imports_tensors = where.startswith(readers) and keywords.get("weights_only") == "True"
        plays_others = where == "tests/integration/test_open_weights.py"
        if (name == "torch.save" and not plays_others) or (name == "torch.load" and not imports_tensors):
            yield call.lineno, f"{name}(...)"


def test_nothing_in_a_file_is_run() -> None:
    wrong = []
    for path in python_files():
        modules = ((line, f"imports {name}") for line, name in imports_of(path) if is_under(name, *UNSAFE_MODULES))
        wrong += [f"{name_of(path)}:{line} {what}" for line, what in (*modules, *unsafe_calls(path))]
    assert not wrong


def lines_with(pattern: str, files: list[Path]) -> list[str]:
    """Places where a pattern stands; this file, which names what it forbids, is left out."""
    return [
        f"{name_of(path)}:{number} {line.strip()[:80]}"
        for path in files
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_path_of_one_machine() -> None:
    assert not lines_with(r"(?<![\w.$})~/-])/(?:work|root|home|Users|mnt|scratch|opt)/\w", text_files())


def test_nothing_is_built_from_a_config_string() -> None:
    assert not lines_with("_target_", text_files()), "what to build is an enum, dispatched explicitly"


def test_nothing_is_left_open() -> None:
    assert not lines_with(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", python_files())


def test_every_test_can_fail() -> None:
    """A test judges by itself, or hands over to a function of its module that does (on several ranks, say)."""
    judges = re.compile(r"\bassert\b|raises\(|warns\(|check=True|\b(check|expect|assert)\w*\(")
    tests, empty = [], []
    for path in python_files("tests"):
        functions = {node.name: ast.unparse(node) for node in tree_of(path).body if isinstance(node, ast.FunctionDef)}
        tests += [name for name in functions if name.startswith("test_")]
        judging = {name for name, code in functions.items() if judges.search(code)}
        empty += [
            f"{name_of(path)} {name}"
            for name, code in functions.items()
            if name.startswith("test_") and name not in judging and not judging & set(re.findall(r"\w+", code))
        ]
    assert len(tests) > 0
    assert not empty


def test_shell_files_parse() -> None:
    scripts = [
        path for path in project_files() if path.read_bytes().startswith((b"#!/bin/bash", b"#!/usr/bin/env bash"))
    ]
    assert ROOT / ".ci/run" in scripts
    broken = {name_of(path): subprocess.run(["bash", "-n", path], capture_output=True).stderr for path in scripts}
    assert not any(broken.values()), broken


def test_what_runs_directly_is_executable() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
