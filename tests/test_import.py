"""Importing linfast: no driver, no Triton, little time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

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


def _run(code: str, **environment: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_and_use_without_triton() -> None:
    shape, error = _run(_NO_TRITON).splitlines()
    assert shape == "(2, 4)"
    assert "triton is not installed" in error


def test_import_does_not_import_triton() -> None:
    assert _run(_NO_IMPORT) == "False"


def test_import_adds_little_to_torch(tmp_path: Path) -> None:
    """From the second import on, as for everybody: the first compiles the sources."""
    _, *again = (float(_run(_TIMED, PYTHONPYCACHEPREFIX=str(tmp_path))) for _ in range(4))
    assert statistics.median(again) < 0.2


def test_every_public_name_is_there_and_documented() -> None:
    import linfast

    for name in linfast.__all__:
        assert getattr(linfast, name).__doc__, name
