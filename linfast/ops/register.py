"""How an op is registered, the same way for all of them.

A raw op is a schema, a fake (shapes and strides only), a launcher (named, and imported at its
first run, so that importing linfast imports no Triton) and a reference in plain torch, which runs
on a CPU unless Triton's interpreter is on. ``define_op`` puts a forward and a backward raw op
into one autograd function that torch.compile, torch.func and opcheck see through. A backward that
gives no reference has the vector-Jacobian product of the forward's. The backward of the backward
runs the backward's reference.

Two things hold for every op. Autocast is off inside it, forward and backward. An output that was
not asked for is a tensor of shape [0]; the backward is given None for its gradient, even where
torch.compile, which passes a gradient for every output, filled in zeros.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch import interpreting, refuse_kernel, without_autocast
from ..ranges import range_

__all__ = ["RAW_OPS", "RawOp", "define_op", "needed"]

RAW_OPS: dict[str, RawOp] = {}
"""Every raw op by name."""

_LIBRARY = torch.library.Library("linfast", "DEF")


@dataclass(frozen=True)
class RawOp:
    """An op without autograd.

    Args:
        schema: "name(Tensor x, ..., float bound) -> (Tensor, Tensor)".
        fake: the outputs' shapes, dtypes and strides, for the same arguments; [0] where one is not asked for.
        reference: the outputs in plain, differentiable torch, none of which aliases an input. A backward may
            give None, and then has the vector-Jacobian product of its forward's reference.
        launch: "module:function" inside linfast.kernels.
    """

    schema: str
    fake: Callable[..., Any]
    reference: Any  # Callable[..., Any] | None
    launch: str

    @functools.cached_property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def arguments(self) -> list[str]:
        """The schema's argument names."""
        return [argument.name for argument in torch._C.parse_schema(f"linfast::{self.schema}").arguments]

    def define(self) -> Callable[..., Any]:
        """Register it as torch.ops.linfast.<name> and return that."""
        RAW_OPS[self.name] = self
        _LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("cuda", "cpu"):
            _LIBRARY.impl(self.name, functools.partial(self._run, device), device.upper())
        torch.library.register_fake(f"linfast::{self.name}", self.fake, lib=_LIBRARY)
        return getattr(torch.ops.linfast, self.name).default

    def _run(self, device: str, *arguments: Any) -> Any:
        """The kernel on a GPU and under Triton's interpreter, the reference elsewhere."""
        function = self.reference
        if device == "cuda" or interpreting():
            refuse_kernel(self.name)
            function = _launcher(self.launch)
        with range_(self.name):
            return without_autocast(device, function, *arguments)


@functools.cache
def _launcher(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(f"linfast.kernels.{module}"), function)


def define_op(
    forward: RawOp,
    backward: RawOp,
    saves: Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, ...]],
    n_tensors: int,
    added: Mapping[str, Callable[[Mapping[str, Any]], Tensor]] = MappingProxyType({}),
) -> Callable[..., Any]:
    """One differentiable function of ``n_tensors`` tensors and then constants.

    Args:
        forward: takes the tensors, then the constants; returns a tuple of tensors.
        backward: takes the saved tensors, a gradient for each output (None where there is none, or where
            the output was not asked for), the same constants, and, where its schema ends in ``bool[] needs``,
            which of the input tensors want a gradient. It returns a gradient for each input tensor;
            those that are not wanted are ignored.
        saves: (inputs, outputs) -> what the backward needs of them.
        added: for a derived backward, the inputs that it does not save because the outputs depend on them
            by a sum: from the backward's arguments by name to a tensor of the input's shape and dtype.
    """
    differentiated = backward.reference
    if differentiated is None:
        differentiated = _derived(forward, backward, n_tensors, added)
        backward = replace(backward, reference=_filled(backward.fake, differentiated))
    run, run_backward = forward.define(), backward.define()
    passes_needs = backward.arguments[-1] == "needs"

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
                results = without_autocast(ctx.saved_tensors[0].device.type, differentiated, *arguments)
            else:
                results = run_backward(*arguments)
            wanted = (r if need else None for r, need in zip(_as_tuple(results), needs, strict=True))
            return (*wanted, *(None for _ in ctx.constants))

    _state_arity(Function.forward, forward)
    Function.__name__ = Function.__qualname__ = f"linfast_{forward.name}"

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_differentiated(inputs[:n_tensors]):
            return Function.apply(*inputs)
        return run(*inputs)

    return call


def needed(needs: Sequence[bool], *fresh: Tensor | None, absent: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """What the fake of a backward returns: each fresh gradient that is needed; else [0], of dtype ``absent``."""
    like = next(tensor for tensor in fresh if tensor is not None)
    return tuple([
        tensor if need and tensor is not None else (like if tensor is None else tensor).new_empty(0, dtype=absent)
        for tensor, need in zip(fresh, needs, strict=True)
    ])  # fmt: skip


def _is_differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient may be wanted: of these tensors, by a transform of torch.func or in forward mode.

    A raw op alone would drop a tangent without a word; torch's autograd function refuses it.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _derived(
    forward: RawOp, backward: RawOp, n_tensors: int, added: Mapping[str, Callable[[Mapping[str, Any]], Tensor]]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward that is the vector-Jacobian product of ``forward.reference``; None for what is not wanted."""
    inputs, names = forward.arguments, backward.arguments
    reference = forward.reference

    def pullback(*arguments: Any) -> tuple[Tensor | None, ...]:
        named = dict(zip(names, arguments, strict=True))
        needs = named.get("needs", [True] * n_tensors)
        values: list[Any] = [named.get(name) for name in inputs]
        for i, name in enumerate(inputs[:n_tensors]):
            if needs[i] and name in added:
                values[i] = added[name](named)
        wanted = [i for i, need in enumerate(needs) if need and values[i] is not None]
        gradients = [value for name, value in named.items() if name.startswith("grad")]
        given = [k for k, gradient in enumerate(gradients) if gradient is not None]

        def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
            of = dict(zip(wanted, tensors, strict=True))
            found = _as_tuple(reference(*(of.get(i, value) for i, value in enumerate(values))))
            return tuple(found[k] for k in given)

        results: list[Tensor | None] = [None] * n_tensors
        if not given:
            for i in wanted:
                results[i] = torch.zeros_like(values[i])
        elif wanted:
            found, pull, *_ = torch.func.vjp(outputs, *(values[i] for i in wanted))
            of_wanted = pull(tuple(gradients[k].to(y.dtype) for k, y in zip(given, found, strict=True)))
            for i, gradient in zip(wanted, of_wanted, strict=True):
                results[i] = gradient
        return tuple(results)

    return pullback


def _filled(fake: Callable[..., Any], pullback: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """The pullback's gradients in the fake's strides and dtypes, and [0] for those that are not wanted."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        outputs = _as_tuple(fake(*arguments))
        for output, gradient in zip(outputs, pullback(*arguments), strict=True):
            if gradient is not None:
                output.copy_(gradient)
        return outputs

    return run


def _is_absent(output: Tensor) -> bool:
    """Whether this stands for an output that was not asked for."""
    return output.ndim == 1 and output.shape[0] == 0


def _state_arity(function: Callable[..., Any], op: RawOp) -> None:
    """Give ``function(*inputs)`` the schema's number of parameters.

    Where no gradient is asked for, torch.compile calls ``forward`` itself, with a context before the
    inputs unless the signature has exactly as many parameters as there are inputs.
    """
    kind = inspect.Parameter.POSITIONAL_ONLY
    function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in op.arguments])  # type: ignore[attr-defined]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
