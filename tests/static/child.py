"""Runs modules of tests.static in a separate process, without Triton's interpreter and with no visible GPU.

The tests run under the interpreter, which has no launch path and no compiler; and a bad compilation may abort.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LIMIT = 1200  # seconds


class ChildFailed(Exception):
    """The last error output of a process, and its output until then."""

    def __init__(self, module: str, stderr: str, stdout: str) -> None:
        super().__init__(f"{module} failed:\n{stderr[-3000:]}")
        self.stdout = stdout


def run(module: str, stdin: str = "", first: Path | None = None, kernels: Path | None = None) -> str:
    """The output of ``python -m module``.

    Args:
        module: its full name.
        stdin: its input.
        first: a folder of packages that hide the installed ones.
        kernels: the folder of linfast.kernels, if it is not that of the checkout.

    Raises:
        ChildFailed: it ended with an error.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(folder) for folder in (first, ROOT) if folder is not None]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    code = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
    if kernels is not None:
        code = f"import linfast.kernels; linfast.kernels.__path__ = [{str(kernels)!r}]; {code}"
    done = subprocess.run(
        [sys.executable, "-c", code], input=stdin, capture_output=True, text=True, cwd=ROOT, env=environment,
        timeout=_LIMIT,
    )  # fmt: skip
    if done.returncode:
        raise ChildFailed(module, done.stderr, done.stdout)
    return done.stdout
