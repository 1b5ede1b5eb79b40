"""Compile the launches on stdin, one JSON object per line, and print figures of their machine code likewise."""

from __future__ import annotations

import importlib
import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from tests.static.loops import loops
from tests.static.record import TARGETS, Launch, source_of

_MEMORY = 12 << 30  # limit of address space: a runaway compilation ends before the machine runs out of memory
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_launch(launch: Launch, with_loops: bool) -> dict[str, Any]:
    """Registers, spills, shared memory and instruction counts of one compiled kernel, and its loops if asked."""
    kernel = getattr(importlib.import_module(f"linfast.kernels.{launch.module}"), launch.kernel)
    if source_of(kernel) != launch.source:
        raise RuntimeError(f"{launch.kernel} is not the one that was recorded")
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=launch.signature,
        constexprs={at[name]: value for name, value in launch.constants.items()},
        attrs={at[name]: value for name, value in launch.attributes.items()},
    )
    # Not from Triton's cache: a cached kernel names the source lines of the checkout in which it was compiled.
    triton.knobs.compilation.always_compile = with_loops
    compiled = triton.compile(source, target=TARGETS[launch.target], options=launch.options)
    if "cubin" in compiled.asm:
        read = _read_cubin(compiled.asm["cubin"], launch.constants if with_loops else None)
    else:
        read = _read_amdgcn(compiled.asm["amdgcn"])
    return {**read, "shared": compiled.metadata.shared}


def _read_cubin(cubin: bytes, constants: dict[str, Any] | None) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", *(() if constants is None else ("-g",)), file.name)  # -g takes long
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    read = {} if constants is None else {"loops": loops(sass, constants).plain()}
    return {
        **read,
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


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin:
        fields = json.loads(line)
        with_loops = fields.pop("with_loops")
        print(json.dumps(compile_launch(Launch(**fields), with_loops)), flush=True)
