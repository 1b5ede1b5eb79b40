"""Compile cases and print what the machine code says, one JSON line each.

Run as ``python -m tests.static.worker`` with a JSON list of [target, number of a case] on stdin:
a process of its own, because a bad compilation may abort it, and without Triton's
interpreter, which the tests of this process run under.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.static.cases import StaticCase, all_cases

_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


def compile_case(case: StaticCase, target: str) -> dict[str, Any]:
    """Registers, spills, shared memory and instruction counts of one compiled kernel."""
    kernel = getattr(importlib.import_module(f"linfast.kernels.{case.op}"), case.kernel)
    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={name: case.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): _DIVISIBLE_BY_16 for name in case.aligned},
    )
    compiled = triton.compile(source, target=_TARGETS[target], options={"num_warps": case.num_warps})
    read = _read_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else _read_amdgcn(compiled.asm["amdgcn"])
    return {**read, "shared": compiled.metadata.shared}


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    return {
        "registers": registers,
        "spills": stack + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/", sass)),
        "mufu": len(re.findall(r"\bMUFU\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*128\b", sass)),
        "matrix": len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA)\b", sass)),
        "async_copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", sass)),
    }


def _read_amdgcn(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly).group(1))  # type: ignore[union-attr]

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "instructions": len(re.findall(r"^\t[vsgb]\w+_\w+", assembly, re.MULTILINE)),
        "mufu": len(re.findall(r"\bv_(?:exp|log|rcp|rsq|sqrt)_f32", assembly)),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        "matrix": len(re.findall(r"\bv_mfma", assembly)),
        "async_copies": 0,
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout + done.stderr


def main() -> None:
    cases = all_cases()
    for target, number in json.load(sys.stdin):
        print(json.dumps(compile_case(cases[number], target)), flush=True)


if __name__ == "__main__":
    main()
