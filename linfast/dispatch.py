"""The settings that decide how an op runs: backend, autocast, torch's matmul precision and the tensors' device.

The backend is "auto" (Triton on a GPU, plain torch elsewhere), "triton" (an error where Triton cannot run) or
"reference" (plain torch). It is set for a block by ``with linfast.backend("reference"):`` and for a process by the
environment variable LINFAST_BACKEND. A block affects only its own thread, as with torch.no_grad. An op's
public function reads the backend once per call, and its backward uses the same. float64 always runs in plain torch.

``state_key(x)`` combines these settings into a dictionary key; ``call_key`` adds the shape and context of a call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
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
    """A key of backend, dtype, device, matmul precision and autocast's dtype, which together select an op's code.

    Whether gradients are enabled is not part of the key.
    """
    return _state.choice, x.dtype, x.device, matmul_mode(), autocast_dtype(x.device.type)


def has_global_hook() -> bool:
    """Whether a hook is set that runs around every module's call."""
    return nn.modules.module._has_any_global_hook()


def is_plain(layer: Any, kinds: tuple[type, ...]) -> bool:
    """Whether the layer's class is one of these and it has no hooks; a parametrized layer has a new class."""
    return are_plain((layer,), kinds)


def are_plain(layers: Iterable[Any], kinds: tuple[type, ...]) -> bool:
    """``is_plain`` of each of these layers."""
    for layer in layers:
        if (
            type(layer) not in kinds
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in vars(layer)
        ):
            return False
    return True


def is_transformed() -> bool:
    """Whether a transform of torch.func, or a forward-mode derivative, is being computed."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for many, as gradients do under ``torch.autograd.grad(is_grads_batched=True)``."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_forward_mode() -> bool:
    """Whether a forward-mode derivative is being computed, as by torch.func.jvp and jacfwd."""
    return torch.autograd.forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is tracing."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def call_key(x: Tensor, context: Mapping[str, Any], *more: Hashable) -> Hashable | None:
    """A key of all that the code to run depends on, besides the model; None where the choice must not be cached."""
    if has_global_hook() or any(isinstance(value, Tensor) for value in context.values()):
        return None
    return *more, *context.items(), x.shape[1:], state_key(x)


def records_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# The backend


class _CannotRun(RuntimeError, ValueError):
    """The requested backend cannot run here. This is a ValueError too, as for an unknown name."""


class _State(threading.local):
    """One thread's backend, and the number of ``plain_torch`` blocks that the thread is in.

    Dynamo guards on a ``threading.local`` whose attributes are set in each thread; it cannot trace a ContextVar.
    """

    def __init__(self) -> None:
        self.choice = _OF_PROCESS
        self.only_plain = 0


_OF_PROCESS = check_choice("LINFAST_BACKEND", os.environ.get("LINFAST_BACKEND", "auto"), _CHOICES)
_state = _State()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """In this thread and block, ops run on "auto" (Triton on a GPU, else plain torch), "triton" or "reference".

    Raises:
        ValueError: another name.
        RuntimeError: another backend than "reference" inside ``plain_torch``.

    Examples:
        >>> with lf.backend("reference"):
        ...     y = lf.Dense(8)(torch.randn(5, 8))
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
    """Inside the block every op runs in plain torch. Comparisons compute their reference results in such a block.

    Launching a kernel raises RuntimeError, and so does choosing a backend other than "reference": no kernel is ever
    compared with itself.
    """
    with backend("reference"):
        _state.only_plain += 1
        try:
            yield
        finally:
            _state.only_plain -= 1


def refuse_kernel(kernel: str) -> None:
    """RuntimeError inside ``plain_torch``; called before each launch of a kernel, with its name."""
    if _state.only_plain:
        raise RuntimeError(f"the kernel of {kernel} was launched inside plain_torch, where no kernel may run")


def chosen_backend() -> str:
    """This thread's backend, which a backward must restore where it runs a forward again."""
    return _state.choice


def uses_triton(*tensors: Tensor) -> bool:
    """Whether an op on these tensors runs its kernel; RuntimeError where the backend is "triton" and cannot run."""
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


# This is all that torch.compiler.assume_constant_result does, but that would import Dynamo.
matmul_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Autocast rounds the operands of a product, which is right only for activations. Weights that are derived from
# weights are computed outside autocast: W and a separately rounded W^{-1} are no longer inverses, and torch.linalg
# has no half-precision routines. The body of an op, forward and backward, runs outside autocast too: its public
# function has already read autocast's dtype, and the result of a backward must not depend on where it is called.


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast rounds to on devices of this type; None where it is off or, as on "meta", missing."""
    if device == "meta":
        return None
    # Dynamo of torch 2.11 cannot trace the first call.
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.get_autocast_dtype(device) if has_autocast and torch.is_autocast_enabled(device) else None


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
    """torch.cat, also under autocast for a half type other than autocast's, where torch's own raises."""
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
    """Values of the host as a tensor on ``device``, as by ``torch.tensor`` but without waiting for a GPU."""
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
    """matrix^{-1} [..., n, n], in fp32 or wider; NaN where singular, so that the host need not wait for a GPU."""
    inverse, info = torch.linalg.inv_ex(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    return torch.where((info == 0)[..., None, None], inverse, torch.nan)


def read_at_once(tensor: Tensor) -> bool:
    """Whether the host can read this tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def capturing(x: Tensor) -> bool:
    """Whether operations on x are being captured into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The tensors of a module, parameters first; in nn.DataParallel's replicas parameters are plain attributes."""
    if torch.compiler.is_compiling():  # which knows no replicas; torch 2.11 cannot trace the values of vars()
        return chain(module.parameters(), module.buffers())
    plain = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return chain(module.parameters(), plain, module.buffers())


def tensor_of(module: nn.Module) -> Tensor | None:
    """The first of ``tensors_of(module)``, for its dtype and device."""
    return next(tensors_of(module), None)
