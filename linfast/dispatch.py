"""The settings that decide how an op runs: backend, autocast, torch's matmul precision and the tensors' device.

The backend is "auto" (Triton on a GPU, plain torch elsewhere), "triton" (or an error with the reason) or
"reference" (plain torch). It is set for a block by ``with linfast.backend("reference"):`` and for a process by the
environment variable LINFAST_BACKEND. A block affects only its own thread, as with torch.no_grad. An op's
public function reads the choice once per call, and its backward follows that. float64 always runs in plain torch.

``state_key(x)`` answers all of this in one call, as a dictionary's key; ``call_key`` adds what else a call has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .checks import check_choice, check_kind

_CHOICES = ("auto", "triton", "reference")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_Method = TypeVar("_Method", bound=Callable[..., Any])


def state_key(x: Tensor) -> Hashable:
    """Two calls with equal keys take the same path: backend, dtype, device, matmul precision and autocast's dtype.

    Whether gradients are enabled is not part of it.
    """
    return _state.choice, x.dtype, x.device, matmul_mode(), autocast_dtype(x.device.type)


def has_global_hook() -> bool:
    """Whether a hook is set that runs around every module's call."""
    return nn.modules.module._has_any_global_hook()


def call_key(x: Tensor, context: Mapping[str, Any], *more: Hashable) -> Hashable | None:
    """All that a decision for x in this context depends on beside the model; None where it is not to be kept."""
    if has_global_hook() or any(isinstance(value, Tensor) for value in context.values()):
        return None
    return *more, *context.items(), x.shape[1:], state_key(x)


# The backend


class _CannotRun(RuntimeError, ValueError):
    """The requested backend cannot run here: a mistake of the caller, like a wrong name."""


class _State(threading.local):
    """The choice of one thread, and the number of ``plain_torch`` blocks that it is in.

    Dynamo guards on a ``threading.local`` whose attributes are set in each thread; it cannot trace a ContextVar.
    """

    def __init__(self) -> None:
        self.choice = _OF_PROCESS
        self.only_plain = 0


_OF_PROCESS = check_choice("LINFAST_BACKEND", os.environ.get("LINFAST_BACKEND", "auto"), _CHOICES)
_state = _State()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on this backend: "auto", "triton" or "reference".

    Raises:
        ValueError: another name.
        RuntimeError: a backend that runs kernels, inside ``plain_torch``.
    """
    check_choice("backend", name, _CHOICES)
    if name != "reference" and _state.only_plain:
        raise RuntimeError(f"backend {name!r} was chosen inside plain_torch, where no kernel may run")
    before, _state.choice = _state.choice, name
    try:
        yield
    finally:
        _state.choice = before


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside the block everything runs in plain torch; the reference side of a comparison is computed in one.

    Launching a kernel inside it raises RuntimeError, and so does choosing a backend that runs kernels, so that no
    kernel is ever compared with itself.
    """
    with backend("reference"):
        _state.only_plain += 1
        try:
            yield
        finally:
            _state.only_plain -= 1


def refuse_kernel(kernel: str) -> None:
    """Called before every launch; RuntimeError inside ``plain_torch``."""
    if _state.only_plain:
        raise RuntimeError(f"the kernel of {kernel} was launched inside plain_torch, where no kernel may run")


def chosen_backend() -> str:
    """The current choice, which a backward that runs a forward again must restore."""
    return _state.choice


def uses_triton(*tensors: Tensor) -> bool:
    """Whether an op on these tensors runs its kernel; RuntimeError where the backend is "triton" and cannot."""
    choice, device = _state.choice, tensors[0].device
    if choice == "reference" or (choice == "auto" and not has_kernels(device)):
        return False
    for tensor in tensors:
        if tensor.dtype not in _KERNEL_DTYPES:
            return False
    if choice == "triton" and not _HAS_TRITON:
        raise _CannotRun("backend 'triton' was chosen and triton is not installed")
    if choice == "triton" and not tensors[0].is_cuda and not interpreting():
        raise _CannotRun(
            f"backend 'triton' was chosen on {device}; set TRITON_INTERPRET=1 before starting Python to "
            "interpret the kernels there"
        )
    return True


def has_kernels(device: torch.device) -> bool:
    """Whether "auto" runs kernels on this device."""
    return device.type == "cuda" and _HAS_TRITON


def why_reference(x: Tensor) -> str | None:
    """The reason why ops on x run in plain torch; None where they run their kernels."""
    if uses_triton(x):
        return None
    if _state.choice == "reference":
        return "the backend is 'reference'"
    if x.dtype not in _KERNEL_DTYPES:
        return f"x is {x.dtype}"
    return "triton is not installed" if x.is_cuda else f"x is on {x.device}"


def interpreting() -> bool:
    """Whether Triton's interpreter is enabled: kernels then run on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def matmul_mode() -> str:
    """The mode (see ``precision``) that torch's matmul settings select for float32."""
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through both of torch's interfaces, which disagree: the newer one applies
        setting = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    if setting != "high":
        return {"highest": "exact", "medium": "fast"}[setting]
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "high"


# What torch.compiler.assume_constant_result does, which would import Dynamo with linfast.
matmul_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Autocast rounds the operands of a product, which is right only for activations. Weights that are derived from
# weights are computed outside autocast: W and a separately rounded W^{-1} are no longer inverses, and torch.linalg
# has no half-precision routines. The inside of an op, forward and backward, is computed outside it too: its public
# function has read autocast, and the bits of a backward must not depend on where it is called.


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast rounds to on devices of this type; None where it is off or, as on "meta", missing."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def without_autocast(device: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` with autocast off on devices of this type."""
    if autocast_dtype(device) is None:
        return function(*args, **kwargs)
    with torch.autocast(device, enabled=False):
        return function(*args, **kwargs)


def outside_autocast(method: _Method) -> _Method:
    """Decorator of a module's method: autocast is off on the module's device while it runs."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensor = tensor_of(self)
        if tensor is None:
            return method(self, *args, **kwargs)
        return without_autocast(tensor.device.type, method, self, *args, **kwargs)

    return run  # type: ignore[return-value]


def cat(tensors: tuple[Tensor, ...] | list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat, which under autocast refuses a half type that is not autocast's."""
    if tensors[0].dtype in (torch.float16, torch.bfloat16):
        return without_autocast(tensors[0].device.type, torch.cat, tensors, dim)
    return torch.cat(tensors, dim)


# Devices, and what the host knows about a tensor without waiting for its device


def usable_device(name: str | torch.device) -> torch.device:
    """The device; ValueError where this machine cannot put a tensor on it."""
    check_kind("device", name, (str, torch.device))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {str(name)!r} cannot be used: {error}") from error
    if device.type == "meta":
        raise ValueError(f"device {str(name)!r} cannot be used: it holds no numbers")
    return device


def uploaded(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The host's numbers on a device, as by ``torch.tensor`` but without waiting for a GPU."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def has_values(tensor: Tensor) -> bool:
    """Whether it holds numbers: it is neither on the meta device nor a fake tensor of torch's FakeTensorMode."""
    return not tensor.is_meta and not hasattr(tensor, "fake_mode")


def check_values(name: str, *tensors: Tensor) -> None:
    """ValueError where one of the argument's tensors holds no numbers."""
    if not all(map(has_values, tensors)):
        raise ValueError(f"{name} is on the meta device, or fake: it holds no numbers")


def inverse_or_nan(matrix: Tensor) -> Tensor:
    """matrix^{-1} [..., n, n], in fp32 or wider; all NaN where it is singular, which torch.linalg.inv waits for."""
    inverse, info = torch.linalg.inv_ex(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    return torch.where((info == 0)[..., None, None], inverse, torch.nan)


def read_at_once(tensor: Tensor) -> bool:
    """Whether the host reads this tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def capturing(x: Tensor) -> bool:
    """Whether work on x goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The tensors of a module, parameters first; in nn.DataParallel's replicas parameters are plain attributes."""
    plain = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return chain(module.parameters(), plain, module.buffers())


def tensor_of(module: nn.Module) -> Tensor | None:
    """The first of ``tensors_of(module)``, for its dtype and device."""
    return next(tensors_of(module), None)
