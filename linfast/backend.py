"""Which implementation the ops run: "auto", "triton" or "reference".

    auto       Triton on a GPU that Triton runs on, the plain torch reference elsewhere
    triton     Triton, or an error that says why not
    reference  plain torch

Set for a block with ``with linfast.backend("reference"):``, for a process with the
environment variable LINFAST_BACKEND. A block is its own thread's, as torch.no_grad's is: a thread
that is started inside it has the process's choice. It is read once per call by the op's public
function, which decides for the backward too. Dynamo guards on a ``threading.local``, and cannot
trace a ContextVar. float64 always runs the reference.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_choice

__all__ = [
    "backend",
    "chosen_backend",
    "has_kernels",
    "interpreting",
    "plain_torch",
    "refuse_kernel",
    "uses_triton",
    "why_reference",
]

_CHOICES = ("auto", "triton", "reference")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class _CannotRun(RuntimeError, ValueError):
    """The backend that was asked for does not run here: a mistake of the caller's, as a wrong name is."""


def _checked(name: str, source: str) -> str:
    check_choice(source, name, _CHOICES)
    return name


class _State(threading.local):
    """One thread's choice, and how many blocks of ``plain_torch`` it is in: set in each, for Dynamo to guard."""

    of_process = _checked(os.environ.get("LINFAST_BACKEND", "auto"), "LINFAST_BACKEND")

    def __init__(self) -> None:
        self.choice = self.of_process
        self.only_plain = 0


_state = _State()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on this backend: "auto", "triton" or "reference".

    Raises:
        ValueError: another name.
        RuntimeError: a backend that runs kernels, inside ``plain_torch``.
    """
    if _checked(name, "backend") != "reference" and _state.only_plain:
        raise RuntimeError(f"backend {name!r} was asked for by what others are compared with: it is plain torch")
    before, _state.choice = _state.choice, name
    try:
        yield
    finally:
        _state.choice = before


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside the block everything is plain torch: the one place where what others are compared with comes from.

    A kernel that would run all the same raises RuntimeError, and so does choosing a backend that runs them:
    nothing is ever compared with itself.
    """
    with backend("reference"):
        _state.only_plain += 1
        try:
            yield
        finally:
            _state.only_plain -= 1


def refuse_kernel(kernel: str) -> None:
    """Called before every launch.

    Raises:
        RuntimeError: inside ``plain_torch``.
    """
    if _state.only_plain:
        raise RuntimeError(
            f"the kernel of {kernel} was launched by what others are compared with: it is plain torch"
        )


def chosen_backend() -> str:
    """The choice in force: what a backward that runs a forward again has to restore."""
    return _state.choice


def uses_triton(*tensors: Tensor) -> bool:
    """Whether an op on these tensors runs its kernel.

    Raises:
        RuntimeError: "triton" was asked for and cannot run on these tensors.
    """
    if _state.choice == "reference":
        return False
    if _state.choice == "auto" and not has_kernels(tensors[0].device):
        return False
    for tensor in tensors:
        if tensor.dtype not in _KERNEL_DTYPES:
            return False
    if _state.choice == "auto":
        return True
    if not _HAS_TRITON:
        raise _CannotRun("backend 'triton' was asked for and triton is not installed")
    if not tensors[0].is_cuda and not interpreting():
        raise _CannotRun(
            f"backend 'triton' was asked for on {tensors[0].device}; set TRITON_INTERPRET=1 before "
            "starting Python to interpret the kernels there"
        )
    return True


def has_kernels(device: torch.device) -> bool:
    """Whether "auto" runs kernels on this device."""
    return device.type == "cuda" and _HAS_TRITON


def why_reference(x: Tensor) -> str | None:
    """Why ops on x run in plain torch; None where they run their kernels."""
    if uses_triton(x):
        return None
    if _state.choice == "reference":
        return "the backend is 'reference'"
    if x.dtype not in _KERNEL_DTYPES:
        return f"x is {x.dtype}"
    return "triton is not installed" if x.is_cuda else f"x is on {x.device}"


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for: kernels then run on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
