"""How an op is registered, the same way for all of them.

A raw op is a schema, a fake (shapes and strides only), a launcher (named, imported at
its first run: importing linfast imports no Triton) and a plain reference, which is what
runs on a CPU unless Triton's interpreter is on. ``define_op`` puts a forward and a
backward raw op into one autograd function that torch.compile, torch.func and opcheck see
through. The backward of the backward runs the backward's reference, in plain torch.

Two things hold for every op. Autocast is off inside it, forward and backward. And an output that was not
asked for is a tensor of shape [0], of which the backward is given None, also where torch.compile, which
hands over a gradient for every output, made up zeros.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dispatch import interpreting, refuse_kernel, without_autocast
from ..ranges import in_range

__all__ = ["RAW_OPS", "RawOp", "define_op"]

RAW_OPS: dict[str, RawOp] = {}
"""Every raw op by name."""

_LIBRARY = torch.library.Library("linfast", "DEF")


@dataclass(frozen=True)
class RawOp:
    """An op without autograd.

    Args:
        schema: "name(Tensor x, ..., float bound) -> (Tensor, Tensor)".
        fake: the outputs' shapes, dtypes and strides, for the same arguments; [0] where one is not asked for.
        reference: the outputs in plain, differentiable torch; none aliases an input.
        launch: "module:function" inside linfast.kernels.
    """

    schema: str
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    launch: str

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    def define(self) -> Callable[..., Any]:
        """Register it as torch.ops.linfast.<name> and return that."""
        RAW_OPS[self.name] = self
        _LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, in_range(self.name, self._on_gpu), "CUDA")
        _LIBRARY.impl(self.name, in_range(self.name, self._on_cpu), "CPU")
        torch.library.register_fake(f"linfast::{self.name}", self.fake, lib=_LIBRARY)
        return getattr(torch.ops.linfast, self.name).default

    def _launched(self, *arguments: Any) -> Any:
        refuse_kernel(self.name)
        return _launcher(self.launch)(*arguments)

    def _on_gpu(self, *arguments: Any) -> Any:
        return without_autocast("cuda", self._launched, *arguments)

    def _on_cpu(self, *arguments: Any) -> Any:
        return without_autocast("cpu", self._launched if interpreting() else self.reference, *arguments)


@functools.cache
def _launcher(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(f"linfast.kernels.{module}"), function)


def define_op(
    forward: RawOp,
    backward: RawOp,
    saves: Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, ...]],
    n_tensors: int,
) -> Callable[..., Any]:
    """One differentiable function of ``n_tensors`` tensors and then constants.

    Args:
        forward: takes the tensors, then the constants; returns a tuple of tensors.
        backward: takes the saved tensors, a gradient for each output (None where there is none, or
            the output was not asked for), then the same constants, and, where its schema ends in ``bool[] needs``,
            which of the input tensors want a gradient; returns a gradient for each input
            tensor, of which those that are not wanted are not looked at.
        saves: (inputs, outputs) -> what the backward needs of them.
    """
    run, run_backward, backward_reference = forward.define(), backward.define(), backward.reference
    passes_needs = "bool[] needs)" in backward.schema

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return run(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            ctx.save_for_backward(*saves(inputs, _as_tuple(output)))
            ctx.constants = tuple(inputs[n_tensors:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            needs = list(ctx.needs_input_grad[:n_tensors])
            given = (None if gradient is None or _is_absent(gradient) else gradient for gradient in gradients)
            arguments = (*ctx.saved_tensors, *given, *ctx.constants, *([needs] if passes_needs else []))
            if torch.is_grad_enabled():  # create_graph: the gradients are themselves differentiated, in plain torch
                results = without_autocast(ctx.saved_tensors[0].device.type, backward_reference, *arguments)
            else:
                results = run_backward(*arguments)
            wanted = (r if need else None for r, need in zip(_as_tuple(results), needs, strict=True))
            return (*wanted, *(None for _ in ctx.constants))

    _state_arity(Function.forward, forward.schema)
    Function.__name__ = Function.__qualname__ = f"linfast_{forward.name}"
    return Function.apply


def _is_absent(output: Tensor) -> bool:
    """Whether this stands for an output that was not asked for."""
    return output.ndim == 1 and output.shape[0] == 0


def _state_arity(function: Callable[..., Any], schema: str) -> None:
    """Give ``function(*inputs)`` the schema's number of parameters.

    Where no gradient is asked for, torch.compile calls ``forward`` itself, with a context before the
    inputs unless the signature has exactly as many parameters as there are inputs.
    """
    names = [argument.name for argument in torch._C.parse_schema(f"linfast::{schema}").arguments]
    kind = inspect.Parameter.POSITIONAL_ONLY
    function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
