"""What the documentation tells people to type exists."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from project_tree import ROOT, name_of, project_files

from data_tools.cli import VERBS as DATA_VERBS
from data_tools.cli import main as sora_data
from data_tools.compose import parse
from sora_lite import config as schema
from sora_lite.cli import VERBS, main
from sora_lite.cli.compose import compose_tree
from sora_lite.errors import UserError

DOCS = [path for path in project_files() if path.suffix == ".md"]


def code(path: Path) -> Iterator[str]:
    """Lines of code blocks, with continuations joined and comments cut, and inline code."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
    prose = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.M | re.S)
    blocks += ["\n".join(re.findall(r"^ {4,}(\S[^\n]*)$", prose, flags=re.M))]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\s+#.*$", "", line).strip()
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


def commands(tool: str) -> Iterator[tuple[str, list[str]]]:
    """(document, words after the tool) of every documented call of a tool."""
    for path in DOCS:
        for line in code(path):
            if match := re.search(rf"(?:^|[/\s]){re.escape(tool)}\s+(.+)$", line):
                with contextlib.suppress(ValueError):  # not a command line: a stray quote
                    yield name_of(path), shlex.split(match.group(1))


@cache
def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.M))


def help_of(entry: object, *argv: str) -> str:
    """What a command prints for `--help`, having ended well."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            status = entry([*argv, "--help"])
        except SystemExit as end:
            status = end.code
    assert status in (0, None), argv
    return printed.getvalue()


def test_make_targets_exist() -> None:
    documented = {(doc, words[0]) for doc, words in commands("make") if re.fullmatch(r"[a-z][a-z-]*", words[0])}
    assert ("README.md", "demo") in documented and ("README.md", "test") in documented
    assert not {(doc, target) for doc, target in documented if target not in makefile_targets()}


def test_make_help_lists_every_target() -> None:
    described = set(re.findall(r"^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(), flags=re.M))
    assert described == makefile_targets()


def test_verbs_exist() -> None:
    lite = [(doc, words[0]) for doc, words in commands("sora-lite")]
    data = [(doc, words[0]) for doc, words in commands("sora-data")]
    assert lite and data
    assert not [(doc, verb) for doc, verb in lite if re.fullmatch(r"[a-z][a-z-]*", verb) and verb not in VERBS]
    assert not [(doc, verb) for doc, verb in data if re.fullmatch(r"[a-z][a-z-]*", verb) and verb not in DATA_VERBS]


def test_every_verb_is_documented() -> None:
    assert set(VERBS) <= {words[0] for _, words in commands("sora-lite")}
    assert set(DATA_VERBS) <= {words[0] for _, words in commands("sora-data")}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    assert f"sora-lite {verb}" in help_of(main, verb)


@pytest.mark.parametrize("verb", DATA_VERBS)
def test_every_data_verb_explains_itself(verb: str) -> None:
    assert verb in help_of(sora_data)
    assert f"sora-data {verb}" in help_of(sora_data, verb)


def settings(words: list[str]) -> list[str]:
    """The `key=value` words of a command; three dots in a value stand for whatever a person has there."""
    return [word.replace("...", "x") for word in words if re.fullmatch(r"[+~]?[\w.]+=[^…]+", word)]


def test_documented_settings_exist() -> None:
    seen, wrong = 0, []
    for doc, words in [*commands("sora-lite"), *commands("sora_lite.cli"), *commands("sora-data")]:
        verb = words[1] if words[0] == "submit" and len(words) > 1 else words[0]
        root, overrides = verb.replace("-", "_"), settings(words)
        try:
            if root in schema.ROOTS:
                compose_tree(root, overrides)
            elif overrides and verb in DATA_VERBS and (known := DATA_VERBS[verb].settings):
                parse(known, overrides)
            seen += bool(overrides)
        except UserError as error:
            wrong.append(f"{doc}: {error}")
    assert seen
    assert not wrong


def test_links_lead_somewhere() -> None:
    broken = []
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists():
                broken.append(f"{name_of(path)}: {target}")
    assert not broken


def test_named_files_exist() -> None:
    """A path in backticks that starts in a folder of the project is there."""
    tops = {path.relative_to(ROOT).parts[0] for path in project_files()}
    missing = []
    for path in DOCS:
        for span in re.findall(r"`([\w.-]+/[\w./-]*)`", path.read_text(encoding="utf-8")):
            if span.split("/")[0] in tops and not (ROOT / span).exists():
                missing.append(f"{name_of(path)}: {span}")
    assert not missing


def test_ci_runs_what_contributors_run() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert [f"make {target}" in script for target in ("lint", "test", "test-slurm")] == [True] * 3
