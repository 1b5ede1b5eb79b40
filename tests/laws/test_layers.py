"""Operators know nothing of what is built on them; no module of operators or sampling is in an import circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import linfast

ROOT = Path(linfast.__file__).parent
ABOVE = ("flows", "linearizer", "sampling", "svd", "space", "training", "accelerate", "compat")


def _imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every relative import that runs when the module is imported, or in its functions."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing_only:
            above = package[: len(package) - node.level + 1]
            found |= {(".".join((*above, *filter(None, [node.module]))), alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "operators").glob("*.py")), ids=lambda path: path.stem)
def test_an_operator_imports_nothing_above_it(path: Path) -> None:
    above = {(module, name) for module, name in _imports(path) if module.split(".")[0] in ABOVE}
    assert above <= {("flows.drift", "capturing")}, above  # a question about devices


@pytest.mark.parametrize("folder", ["operators", "sampling"])
def test_no_module_imports_itself_in_a_circle(folder: str) -> None:
    graph = {
        f"{folder}.{path.stem}": {module for module, _ in _imports(path)}
        for path in (ROOT / folder).glob("*.py")
        if path.stem != "__init__"
    }
    assert len(graph) > 5
    TopologicalSorter(graph).prepare()  # raises CycleError
