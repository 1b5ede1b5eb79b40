"""Lists the kernels: @triton.jit functions that no other one calls, found in the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SOURCES", "entry_kernels"]

SOURCES = Path(__file__).parent.parent.parent / "kernels"


def entry_kernels() -> frozenset[str]:
    """The names of all functions of linfast.kernels that are launched."""
    functions = list(_jit_functions())
    calls = [node.func for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)]
    called = {call.id for call in calls if isinstance(call, ast.Name)}
    return frozenset(function.name for function in functions) - called


def _jit_functions() -> Iterator[ast.FunctionDef]:
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                yield node
