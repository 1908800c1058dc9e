"""What needs scrolling, or a table of contents, holds two things."""

import ast

from project_tree import name_of, python_files, tree_of

FILE, FUNCTION = 500, 60
"""Lines that a file and a function have less than, with all that stands in them."""


def test_files_and_functions_are_short() -> None:
    long = []
    for path in python_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines >= FILE:
            long.append(f"{name_of(path)}: {lines} lines; split it by concern")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines >= FUNCTION:
                    long.append(f"{name_of(path)}:{node.lineno} {node.name}: {lines} lines; take a part out of it")
    assert not long
