"""Records what the launchers pass to Triton on a GPU, without a GPU: no kernel runs, and none is compiled.

Triton's own launch path specialises the arguments of ``kernel[grid](...)`` for the target that a stand-in for its
driver names, and hands types, attributes, constants and options to a stand-in for its compiler, which keeps them.
Tensors are on the CPU and report that they are on a GPU. ``python -m tests.static.record`` prints the launches of
every case of tests/static/cases.py, or of the ops named on stdin, one JSON object per line; in a separate process,
because Triton's interpreter, which the tests use, has no launch path.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import triton
import triton.language as tl
from linfast.kernels import stack_configs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import JITFunction, driver

import linfast as lf
from linfast import dispatch
from linfast.ops import register

if TYPE_CHECKING:
    from tests.static.cases import Case

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_devices = itertools.count()


@dataclass(frozen=True)
class Launch:
    """One compilation: how a launch specialises a kernel's arguments.

    Args:
        call: the name of the first call that made it, with a number where it launches the kernel several times.
        target: of ``TARGETS``.
        module, kernel: linfast.kernels.<module>.<kernel>.
        signature: each argument's type; "constexpr" for those of ``constants``.
        constants: values by argument.
        attributes: other properties of arguments, in Triton's terms, such as tt.divisibility.
        options: of the compiler, where they differ from its defaults.
        source: a digest of the kernel and of the functions and constants of linfast that it uses.
    """

    call: str
    target: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[str, Any]
    options: dict[str, Any]
    source: str

    @property
    def digest(self) -> str:
        """A digest of everything that determines the compiled code, except Triton."""
        text = json.dumps({**vars(self), "call": ""}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Driver:
    """The methods of a driver that a launch calls."""

    def __init__(self, target: GPUTarget) -> None:
        self._target, self._device = target, next(_devices)  # Triton caches compiled kernels by device

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Compiled:
    """The interface of a compiled kernel that a launch uses; it does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


@contextlib.contextmanager
def on(target: str, call: str = "") -> Iterator[list[Launch]]:
    """Inside the block tensors report that they are on such a GPU, and each launch is added once to this list."""
    launches: list[Launch] = []

    def compile(src: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> _Compiled:
        launches.append(_launch(src, name, options, call, launches))
        return _Compiled()

    name, gpu = target, TARGETS[target]
    hip = "6.4" if gpu.backend == "hip" else None
    driver.set_active(_Driver(gpu))  # type: ignore[arg-type]
    with (
        mock.patch.object(triton.compiler, "compile", compile),
        mock.patch.object(stack_configs, "_target", return_value=name),
        mock.patch("linfast.kernels.coupling_stack_backward.multiprocessors", return_value=2),
        lf.backend("triton"),
        # so that the launchers accept tensors on a CPU
        mock.patch.object(dispatch, "interpreting", return_value=True),
        mock.patch.object(register, "interpreting", return_value=True),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.version, "hip", hip),
    ):
        yield launches


def recorded(call: Callable[[], None], target: str, name: str = "") -> list[Launch]:
    """The launches of a call, each once."""
    with on(target, name) as launches:
        call()
    return launches


def _launch(src: Any, target: str, options: dict[str, Any], call: str, before: list[Launch]) -> Launch:
    names, kernel = src.fn.arg_names, src.fn.__name__
    number = 1 + sum(launch.kernel == kernel for launch in before)
    defaults = _default_options(target)
    return Launch(
        call=call if number == 1 else f"{call} ({number})",
        target=target,
        module=src.fn.__module__.removeprefix("linfast.kernels."),
        kernel=kernel,
        signature=dict(src.signature),
        constants={names[i]: value for (i,), value in src.constants.items()},
        attributes={names[i]: value for (i,), value in src.attrs.items() if value},
        options={k: v for k, v in options.items() if v != defaults[k]},
        source=source_of(src.fn),
    )


@functools.cache
def _default_options(target: str) -> dict[str, Any]:
    return vars(make_backend(TARGETS[target]).parse_options({}))


@functools.cache
def source_of(kernel: JITFunction[Any]) -> str:
    """A digest of the kernel and of the parts of linfast that it uses."""
    return hashlib.sha256(json.dumps(_sources(kernel, {})).encode()).hexdigest()[:12]


def _sources(function: JITFunction[Any], found: dict[str, str]) -> dict[str, str]:
    """The text of the function and, recursively, of linfast's functions and constants that it names."""
    found[f"{function.__module__}.{function.__name__}"] = function.src
    for name in sorted(set(re.findall(r"\w+", function.src))):
        value = function.__globals__.get(name)
        if isinstance(value, JITFunction) and value.__module__.startswith("linfast."):
            if f"{value.__module__}.{value.__name__}" not in found:
                _sources(value, found)
        elif isinstance(value, tl.constexpr):
            found[f"{function.__module__}.{name}"] = repr(value)
    return found


def show(cases: Iterable[Case]) -> None:
    """Print each launch of these cases once, with the name of the first that makes it, as JSON."""
    seen: set[str] = set()
    for case in cases:
        for target in case.targets:
            for launch in recorded(case.run, target, case.name):
                if launch.digest not in seen:
                    seen.add(launch.digest)
                    print(json.dumps(vars(launch)))


def main(ops: list[str]) -> None:
    """Print the launches of these ops, or of all."""
    from tests.static.cases import all_cases

    show(case for case in all_cases() if not ops or case.op in ops)


if __name__ == "__main__":
    main(sys.stdin.read().split())
