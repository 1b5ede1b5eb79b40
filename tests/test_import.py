"""Importing linfast: no driver, no Triton, little time."""

from __future__ import annotations

import statistics
import subprocess
import sys

_NO_TRITON = """
import sys
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
"""

_NO_IMPORT = """
import sys, linfast
print("triton" in sys.modules)
"""

# Processor time: the wall clock of a loaded machine says little.
_TIMED = """
import time, torch
start = time.process_time()
import linfast
print(time.process_time() - start)
"""


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_and_use_without_triton() -> None:
    shape, error = _run(_NO_TRITON).splitlines()
    assert shape == "(2, 4)"
    assert "triton is not installed" in error


def test_import_does_not_import_triton() -> None:
    assert _run(_NO_IMPORT) == "False"


def test_import_adds_little_to_torch() -> None:
    assert statistics.median(float(_run(_TIMED)) for _ in range(3)) < 0.3


def test_every_public_name_is_there_and_documented() -> None:
    import linfast

    for name in linfast.__all__:
        assert getattr(linfast, name).__doc__, name
