"""docs/design.md is true: its tree matches the folders, its paths exist, its names are public, its layers hold."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import linfast as lf

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "design.md").read_text()
FOLDERS = ("linfast", "kernels", "bench", "examples")
MOST_LINES = 200
_EXTENSIONS = r"py|md|tsv|toml|sh"


def section(title: str) -> str:
    """The text under the heading with this title."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/design.md has no section {title!r}"
    return found.group(1)


def block(title: str) -> list[str]:
    """The lines of the first code block under this title."""
    return section(title).split("```")[1].strip("\n").split("\n")


# The tree


def tree() -> tuple[set[str], set[str]]:
    """(files, folders) that the page lists; two spaces separate names from their description."""
    files: set[str] = set()
    folders: set[str] = set()
    above: list[tuple[int, str]] = []  # (indentation, folder), outermost first
    for line in block("The house"):
        indentation = len(line) - len(line.lstrip())
        while above and above[-1][0] >= indentation:
            above.pop()
        for name in re.split(r"\s{2,}", line.strip())[0].split(" "):
            path = (above[-1][1] if above else "") + name
            assert name.endswith((".py", "/")), f"neither a file nor a folder: {line!r}"
            if name.endswith("/"):
                folders.add(path)
                above.append((indentation, path))
            else:
                assert path not in files, f"listed twice: {path}"
                files.add(path)
    return files, folders


def modules() -> Iterator[Path]:
    """Every module of the four folders; links in linfast/ are not followed."""
    for folder in FOLDERS:
        for where, _, names in os.walk(ROOT / folder):
            yield from (Path(where, name) for name in names if name.endswith(".py"))


def test_the_tree_matches_the_folders() -> None:
    """A folder for which the page lists no files stands for everything in it."""
    files, folders = tree()
    whole = {folder for folder in folders if not any(file.startswith(folder) for file in files)}
    plain = (path for path in modules() if path.name not in ("__init__.py", "_version.py"))
    there = {str(path.relative_to(ROOT)) for path in plain}
    listed = {path for path in there if not path.startswith(tuple(whole))}
    assert len(listed) > 100
    assert not listed - files, "docs/design.md does not list these modules"
    assert not files - there, "docs/design.md lists these files, and there are none"
    assert not [folder for folder in folders if not (ROOT / folder).is_dir()]


def test_every_path_on_the_page_exists() -> None:
    """Paths are relative to the checkout or to linfast/; NAME stands for a new file, whose folder exists."""
    outside = "".join(PAGE.split("```")[::2])
    named = re.findall(rf"`([\w./]+(?:\.(?:{_EXTENSIONS})|/))`", outside)
    assert len(named) > 50
    places = (ROOT, ROOT / "linfast")
    for name in named:
        path = name.rpartition("/")[0] if "NAME" in name else name
        assert any((place / path).exists() for place in places), f"docs/design.md names {name}"


def test_the_page_is_short() -> None:
    assert len(PAGE.splitlines()) <= MOST_LINES


# The public names


def test_the_names_are_the_public_ones() -> None:
    listed: dict[bool, list[str]] = {False: [], True: []}  # by whether they belong to linfast.ops
    for row in section("Public names").strip().splitlines()[2:]:
        _, kind, names, _ = row.split("|")
        listed["linfast.ops" in kind] += re.findall(r"`(\w+)`", names)
    assert sorted(listed[False]) == sorted(lf.__all__)
    assert sorted(listed[True]) == sorted(lf.ops.__all__)


# The layers


def layers() -> dict[str, int]:
    """The layer of each module of linfast/ and of each package; ``linfast`` is linfast/__init__.py."""
    return {name: i for i, line in enumerate(block("Layers")) for name in line.split()[1:]}


def name_of(path: Path) -> str:
    """The module's name, such as linfast.flows.match; as installed, so that kernels are linfast.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "linfast" else ("linfast", *parts))


MODULES = {name_of(path): path for path in modules()}


def imports(name: str, inside_functions: bool = True) -> set[str]:
    """The modules of linfast that a module imports, without imports for type checkers."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*above, *filter(None, [child.module])])
                for alias in child.names:
                    inner = f"{module}.{alias.name}"
                    found.add(inner if inner in MODULES else module)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found & MODULES.keys()


def layer_of(name: str, order: dict[str, int]) -> int:
    """The layer of the package or root module that contains it."""
    parts = name.split(".")
    return order[parts[1] if len(parts) > 1 else "linfast"]


def test_every_module_has_a_layer() -> None:
    inside = {name.split(".")[1] for name in MODULES if name != "linfast"}
    assert layers().keys() == inside | {"linfast"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_nothing_of_a_later_layer(name: str) -> None:
    order = layers()
    later = {other for other in imports(name) if layer_of(other, order) > layer_of(name, order)}
    assert not later, f"{name} imports {later}"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports inside functions count too, except in bench, whose commands call each other."""
    graph = {name: imports(name, inside_functions=".bench." not in name) for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_kernel_files_that_others_import_need_no_triton() -> None:
    """This holds for files that modules outside kernels import at import time, directly or indirectly."""
    outside = (name for name in MODULES if ".kernels" not in name)
    wanted = {other for name in outside for other in imports(name, inside_functions=False)}
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if ".kernels" in name and name not in seen:
            seen.add(name)
            wanted |= imports(name, inside_functions=False)
    assert "linfast.kernels.stack_configs" in seen
    needs_triton = re.compile(r"^\s*(import|from) triton", re.MULTILINE)
    assert not [name for name in seen if needs_triton.search(MODULES[name].read_text())]
