"""Which files a kernel is made of, by what its source names."""

from __future__ import annotations

import ast
from functools import cache

from tests.static.cases import KERNELS


def files_of(op: str, kernel: str) -> set[str]:
    """Names of the files that define this kernel, the functions and constants it uses, and what those use."""
    seen, left = set(), [(op, kernel)]
    while left:
        found = left.pop()
        if found not in seen:
            seen.add(found)
            left += _uses(*found)
    return {f"{module}.py" for module, _ in seen}


def _uses(module: str, name: str) -> list[tuple[str, str]]:
    """(file, name) of everything of this package that the definition of this name mentions."""
    defined, imported = _names(module)
    if name not in defined:
        return []
    nodes = list(ast.walk(defined[name]))
    mentioned = {node.id for node in nodes if isinstance(node, ast.Name)}
    mentioned -= {node.arg for node in nodes if isinstance(node, ast.arg)}  # namesakes of host functions
    return [imported.get(used, (module, used)) for used in mentioned & (imported.keys() | defined.keys())]


@cache
def _names(module: str) -> tuple[dict[str, ast.stmt], dict[str, tuple[str, str]]]:
    """What a file defines, by name, and where the names come from that it imports from its neighbours."""
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.parse((KERNELS / f"{module}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {name.id: node for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return defined, imported
