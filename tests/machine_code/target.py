"""Makes the launchers pass CPU tensors as a GPU would pass its own, and runs the machine code.

``../shared/tools/ptx`` runs the PTX that Triton compiles for a GPU on CPU tensors, with sanitizers. It is beside
the checkout, or in LINFAST_PTX; it is not part of the project, and nothing else needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

__all__ = ["CAPABILITIES", "ELEMENTS_ALONE", "as_on_gpu", "emulator", "folder"]

CAPABILITIES = {"sm_80": 80, "sm_90": 90}
ELEMENTS_ALONE = 20_000  # latent_matmul's limit: one of its cases runs row by row, the others in tiles
_CHECKOUT = Path(__file__).parent.parent.parent


def folder() -> Path | None:
    """The folder that contains the package ``ptx``; None where there is none."""
    given = os.environ.get("LINFAST_PTX")
    place = Path(given) if given else _CHECKOUT.parent / "shared" / "tools"
    return place if (place / "ptx" / "launch.py").exists() else None


def emulator(name: str) -> Any:
    """A module of ``ptx``. Kernels of linfast that are imported from here on are compiled, not interpreted.

    Raises:
        FileNotFoundError: there is no such folder.
        RuntimeError: Triton was imported to interpret kernels.
    """
    place = folder()
    if place is None:
        raise FileNotFoundError("ptx is neither in ../shared/tools beside the checkout nor where LINFAST_PTX says")
    # At its import Triton decides whether its functions are for the interpreter or for the compiler.
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    if not isinstance(triton.language.zeros, triton.JITFunction):
        raise RuntimeError("Triton was imported to interpret kernels: run machine code in a Python of its own")
    triton.knobs.runtime.interpret = False
    os.environ["TRITON_INTERPRET"] = "1"  # linfast.dispatch takes this for "kernels run on CPU tensors"
    if str(place) not in sys.path:
        sys.path.append(str(place))
    return importlib.import_module(f"ptx.{name}")


@contextlib.contextmanager
def as_on_gpu(target: str) -> Iterator[None]:
    """Inside the block launchers choose for CPU tensors what they would choose for tensors on that GPU."""
    choices: dict[str, Any] = {
        "linfast.precision.interpreting": lambda: False,
        "linfast.kernels.stack_configs._target": _constant(target),
        "linfast.kernels.stack_backward_grid.StackPass.part_dtype": property(lambda self: torch.bfloat16),
        # One multiprocessor, so that small batches run on all tiles; two programs of the backward.
        "linfast.kernels.stack_configs._without_gpu": lambda: 1,
        "linfast.kernels.coupling_stack_backward.multiprocessors": lambda x: 2,
        "linfast.kernels.latent_matmul.ELEMENTS_ALONE": ELEMENTS_ALONE,
    }
    for module in ("coupling_stack", "coupling_layers", "conv2d_fused", "residual_stack"):
        choices[f"linfast.kernels.{module}.activation_form"] = _activation_form
    with contextlib.ExitStack() as patches:
        batch = emulator("emulator").Batch
        patches.enter_context(mock.patch.object(batch, "array", _or_nonsense(batch.array)))
        for name, value in choices.items():
            patches.enter_context(mock.patch(name, value))
        yield


def _or_nonsense(array: Any) -> Any:
    """``Batch.array`` that treats an unwritten register as nonsense, as ``Batch.merge`` does.

    LLVM packs a defined half with an undefined one, and reads only the first back: only the emulator would fail.
    sm_80, _coupling_stack_kernel, bf16 x, a dense map, "high":

        mov.b32  {%rs10, %rs11}, %r10;
        mov.b32  %r11, {%rs11, %rs12};      %rs12 occurs nowhere else
        mov.b32  {%rs28, _}, %r11;
    """

    def filled(self: Any, value: Any, dtype: Any) -> Any:
        return array(self, np.iinfo(np.dtype(dtype)).max if value is None else value, dtype)

    return filled


def _constant(target: str) -> Any:
    def target_of(kind: str, index: int | None) -> str:
        return target

    target_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return target_of


def _activation_form(x: torch.Tensor, precision: str) -> int:
    return 1 if precision in ("exact", "high") else 3
