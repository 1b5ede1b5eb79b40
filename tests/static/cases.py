"""Every shipped configuration of every kernel, as the compiler sees it when launched."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import linfast.kernels

KERNELS = Path(linfast.kernels.__file__).parent
_SHARED_SOURCES = ("launch.py", "math.py")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class StaticCase:
    """One compilation: a kernel of ``linfast.kernels.<op>``, argument types and constexpr values.

    ``uses`` are the other kernel files that it is made of, ``targets`` those that it ships for.
    ``matrix_units``: its products are meant to run on them, so the machine code must have such instructions.
    """

    op: str
    kernel: str
    config: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    aligned: tuple[str, ...] = field(default=())
    uses: tuple[str, ...] = field(default=())
    targets: tuple[str, ...] = TARGETS
    matrix_units: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the kernel files that it is made of."""
        return (f"{self.op}.py", *(f"{op}.py" for op in self.uses), *_SHARED_SOURCES)

    def digest(self, target: str, triton_version: str) -> str:
        """Changes when the source, the case, the target or Triton does."""
        sources = [(KERNELS / name).read_bytes() for name in self.files]
        text = json.dumps([self.signature, self.constexprs, self.num_warps, self.aligned, target, triton_version])
        return hashlib.sha256(b"\0".join([*sources, text.encode()])).hexdigest()[:12]


def all_cases() -> list[StaticCase]:
    """The cases of every op: ``cases()`` of each module tests/static/of_<op>.py."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("of_*.py"))
    return [case for name in modules for case in importlib.import_module(f"tests.static.{name}").cases()]
