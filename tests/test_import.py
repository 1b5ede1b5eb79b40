"""Importing linfast loads no driver, no Triton and nothing slow, and warns of nothing."""

from __future__ import annotations

import subprocess
import sys

_NO_TRITON = """
import sys
from pathlib import Path
sys.modules["triton"] = None  # as if it were not installed: neither found nor importable
import linfast
import torch
assert not torch.cuda.is_initialized()
f = linfast.Linearizer(linfast.coupling_flow(4, 2, (8,)), linfast.Dense(4))
print(tuple(f(torch.randn(2, 4)).shape))
with linfast.backend("triton"):
    try:
        f(torch.randn(2, 4))
    except RuntimeError as error:
        print(error)
import linfast.cli
linfast.cli.main(["info"])
"""

# What importing linfast adds to importing torch: calls of Python functions, without those of import, and modules.
_ADDED = """
import sys, torch, warnings
warnings.simplefilter("error")
before, calls = set(sys.modules), 0
def count(frame, event, argument):
    global calls
    calls += event == "call" and "importlib" not in frame.f_code.co_filename
sys.setprofile(count)
import linfast
sys.setprofile(None)
print(calls, *sorted(name for name in set(sys.modules) - before if name.partition(".")[0] != "linfast"))
"""
HEAVY = {
    "triton",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "sympy",
    "scipy",
    "sklearn",
    "matplotlib",
    "pandas",
}
FEW_MODULES, FEW_CALLS = 20, 40_000  # it takes 0 and 13 600


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_and_use_without_triton() -> None:
    shape, error, *info = _run(_NO_TRITON).splitlines()
    assert shape == "(2, 4)"
    assert "triton is not installed" in error
    assert any(line.startswith("backend") for line in info)


def test_import_adds_little_to_torch() -> None:
    calls, *added = _run(_ADDED).split()
    assert not {".".join(name.split(".")[:n]) for name in added for n in (1, 2)} & HEAVY
    assert len(added) <= FEW_MODULES, added
    assert int(calls) <= FEW_CALLS


def test_every_public_name_exists_and_is_documented() -> None:
    import linfast

    for name in linfast.__all__:
        assert getattr(linfast, name).__doc__, name
