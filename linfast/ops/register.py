"""Registration of linfast's ops.

``define_op`` registers two raw ops, forward and backward, and joins them in an autograd function that
torch.compile, torch.func and opcheck can trace. On a GPU and under Triton's interpreter a raw op runs its launcher,
elsewhere its reference in plain torch. A launcher is imported when it first runs, so that importing linfast does
not import Triton.

Autocast is disabled inside every op, forward and backward. An output that was not requested is a tensor of shape
[0]; fakes, launchers and references may return None for it. As its gradient the backward receives None, also under
torch.compile, which passes zeros for every output without a gradient.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dispatch import interpreting, is_forward_mode, is_transformed, refuse_kernel, without_autocast
from ..ranges import range_

RAW_OPS: dict[str, RawOp] = {}
"""Every raw op by name."""

_LIBRARY = torch.library.Library("linfast", "DEF")
_Function = Callable[..., Any]


@dataclass(frozen=True)
class RawOp:
    """An op without autograd.

    Args:
        name: torch.ops.linfast.<name>.
        schema: its arguments and outputs, "(Tensor x, Tensor? bias, float bound) -> Tensor".
        fake: returns empty outputs of the right shapes, dtypes and strides, from the same arguments.
        reference: computes the outputs in plain, differentiable torch; no output aliases an input.
        launch: "module:function" inside linfast.kernels; None where the reference runs on every device.
        is_plain: of the arguments: whether the reference runs for them on every device.
    """

    name: str
    schema: str
    fake: _Function
    reference: _Function
    launch: str | None
    is_plain: Callable[..., bool] = lambda *_: False

    def define(self) -> _Function:
        """Register the op and return it."""
        RAW_OPS[self.name] = self
        _LIBRARY.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, functools.partial(self._run, "cpu"), "CPU")
        _LIBRARY.impl(self.name, self._run_on_gpu, "CUDA")
        torch.library.register_fake(f"linfast::{self.name}", self._fake, lib=_LIBRARY)
        return getattr(torch.ops.linfast, self.name).default

    def _fake(self, *arguments: Any) -> Any:
        return _complete(self.fake(*arguments), arguments[0])

    def _run_on_gpu(self, *arguments: Any) -> Any:
        """Make the first tensor's GPU the current one, to which launches go."""
        with torch.cuda.device(arguments[0].device):
            return self._run("cuda", *arguments)

    def _run(self, device: str, *arguments: Any) -> Any:
        """The kernel on a GPU and under Triton's interpreter, the reference elsewhere."""
        function = self.reference
        with_kernel = self.launch is not None and (device == "cuda" or interpreting())
        if with_kernel and not self.is_plain(*arguments):
            refuse_kernel(self.name)
            function = _launcher(self.launch)
        with range_(self.name):
            return _complete(without_autocast(device, function, *arguments), arguments[0])


@functools.cache
def _launcher(path: str) -> _Function:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(f"linfast.kernels.{module}"), function)


@contextlib.contextmanager
def launching(name: str, x: Tensor) -> Iterator[_Function]:
    """The launcher of this raw op; in the block x's GPU is the current one."""
    refuse_kernel(name)
    path = RAW_OPS[name].launch
    assert path is not None
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext(), range_(name):
        yield _launcher(path)


def _complete(outputs: Any, like: Tensor) -> Any:
    """A raw op's outputs, with [0] in place of None; a single output is not put in a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    whole = tuple([like.new_empty(0) if output is None else output for output in outputs])
    return whole if len(whole) > 1 else whole[0]


def define_op(
    schema: str,
    fake: _Function,
    reference: _Function,
    *,
    saves: str,
    omits: Callable[..., bool] = lambda *_: False,
    gradients: _Function | None = None,
    backward: _Function | None = None,
    plain: _Function | None = None,
    plain_backward: _Function | None = None,
    backward_launch: str | None = "",
    has_needs: bool = True,
    is_plain: Callable[..., bool] = lambda *_: False,
) -> _Function:
    """Register an op; return it as a differentiable function of its tensors, followed by its constants.

    The raw op NAME is launched by linfast.kernels.NAME:launch_NAME. NAME_backward takes the saved tensors, the
    gradient of each output or None, the constants and ``needs``: for each input tensor, whether its gradient is
    required. It returns the gradients of the input tensors and is launched by NAME:launch_NAME_backward.

    Args:
        schema: "NAME(Tensor x, Tensor? bias, float bound) -> (Tensor y, Tensor log_det)".
        fake: of the forward; see ``RawOp``.
        reference: of the forward.
        saves: names of the inputs and outputs that the backward is given; the first is always given.
        omits: of the forward's arguments: whether the backward is given None for the names that end in "?".
        gradients: maps the backward's arguments to empty tensors laid out as its outputs, whatever ``needs`` says;
            by default contiguous, in the shapes of the saved inputs. The default backward sets an input that is not
            saved to zeros of its gradient's shape and dtype, which is right for a term of a sum.
        backward: the backward in plain torch, which second derivatives differentiate; by default the
            vector-Jacobian product of ``reference``.
        plain: the forward in plain torch that runs, where a faster one than ``reference`` is not differentiable.
        plain_backward: the backward in plain torch that runs, likewise.
        backward_launch: the backward's launcher, "module:function", where it is not the one above; None for none.
        has_needs: False for a backward that computes all gradients and takes no ``needs``.
        is_plain: of the forward; see ``RawOp``.
    """
    name, inputs, outputs = _parsed(schema)
    tensors = [argument for argument in inputs if argument.startswith("Tensor")]
    saved, n = saves.replace("?", "").split(), len(tensors)
    may_omit = [name.endswith("?") for name in saves.split()]
    can_be_saved = [*tensors, *outputs]
    picks = [[_name(each) for each in can_be_saved].index(s) for s in saved]
    declared = [can_be_saved[i] for i in picks]
    declared = [f"Tensor? {_name(each)}" if may else each for each, may in zip(declared, may_omit, strict=True)]
    of_outputs = ["Tensor? grad", *(f"Tensor? grad_{_name(output)}" for output in outputs[1:])]
    needs_last = ["bool[] needs"] if has_needs else []
    arguments = [*declared, *of_outputs, *inputs[n:], *needs_last]

    def contiguous(*given: Any) -> list[Tensor | None]:
        by_name = dict(zip(saved, given, strict=False))
        like = [by_name.get(_name(tensor)) for tensor in tensors]
        return [None if t is None else t.new_empty(t.shape) for t in like]

    gradients = gradients or contiguous

    def fake_backward(*given: Any) -> tuple[Tensor | None, ...]:
        needs = given[-1] if has_needs else [True] * n
        return tuple([tensor if need else None for tensor, need in zip(gradients(*given), needs, strict=True)])

    names = [_name(argument) for argument in inputs]
    differentiated = backward or _derived(
        reference, gradients, names, [_name(argument) for argument in arguments], n
    )
    undifferentiated = plain_backward or backward or _filled(fake_backward, differentiated)

    launch = f"{name}:launch_{name}"
    backward_launch = f"{launch}_backward" if backward_launch == "" else backward_launch
    run = RawOp(name, schema.removeprefix(name), fake, plain or reference, launch, is_plain).define()
    of_backward = f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * n)})"
    run_backward = RawOp(f"{name}_backward", of_backward, fake_backward, undifferentiated, backward_launch).define()

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return run(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            tensors = (*inputs[:n], *_as_tuple(output))
            omit = omits(*inputs)
            kept = (None if omit and may else tensors[i] for i, may in zip(picks, may_omit, strict=True))
            ctx.save_for_backward(*kept)
            ctx.constants = tuple(inputs[n:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            needs = list(ctx.needs_input_grad[:n])
            given = (None if gradient is None or gradient.shape == (0,) else gradient for gradient in gradients)
            arguments = (*ctx.saved_tensors, *given, *ctx.constants, *([needs] if has_needs else []))
            if torch.is_grad_enabled():  # create_graph: gradients that can be differentiated, in plain torch
                results = without_autocast(ctx.saved_tensors[0].device.type, differentiated, *arguments)
            else:
                results = run_backward(*arguments)
            wanted = (r if need else None for r, need in zip(_as_tuple(results), needs, strict=True))
            return (*wanted, *(None for _ in ctx.constants))

    # Where no gradient is required, torch.compile calls ``forward`` directly, and passes a context before the
    # inputs unless the signature has exactly as many parameters as there are inputs.
    parameters = [inspect.Parameter(each, inspect.Parameter.POSITIONAL_ONLY) for each in names]
    Function.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    Function.__name__ = Function.__qualname__ = f"linfast_{name}"

    def call(*inputs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if compiling and is_forward_mode():  # the compiled graph would lose the derivative
            raise NotImplementedError(
                f"linfast::{name} has no forward-mode derivative (torch.func.jvp, jacfwd): take torch.func.vjp or "
                "jacrev, or run it inside `with lf.backend('reference')`"
            )
        if compiling or _is_differentiated(inputs[:n]):
            return Function.apply(*inputs)
        return run(*inputs)

    return call


def _parsed(schema: str) -> tuple[str, list[str], list[str]]:
    """An op's name, and its arguments and outputs as the schema declares them."""
    head, _, outputs = schema.partition(" -> ")
    name, _, arguments = head.rstrip(")").partition("(")
    return name, arguments.split(", "), outputs.strip("()").split(", ")


def _name(declared: str) -> str:
    """The name in a declaration: x of "Tensor? x"."""
    return declared.split()[-1]


def _is_differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a derivative may be required: for these tensors, by a torch.func transform or in forward mode.

    A raw op would silently drop a forward-mode tangent; torch's autograd function raises an error.
    """
    if is_transformed():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _derived(
    reference: _Function, fresh: _Function, inputs: list[str], names: list[str], n_tensors: int
) -> _Function:
    """The default backward, of arguments ``names``: the vector-Jacobian product of ``reference(*inputs)``."""

    def pullback(*arguments: Any) -> tuple[Tensor | None, ...]:
        named = dict(zip(names, arguments, strict=True))
        needs = named.get("needs", [True] * n_tensors)
        values: list[Any] = [named.get(name) for name in inputs]
        for i, name in enumerate(inputs[:n_tensors]):
            if needs[i] and name not in named:
                values[i] = torch.zeros_like(fresh(*arguments)[i])
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


def _filled(fake: _Function, pullback: _Function) -> _Function:
    """The pullback, with its gradients copied into the fake's strides and dtypes."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        outputs = _complete(fake(*arguments), arguments[0])
        for output, gradient in zip(_as_tuple(outputs), pullback(*arguments), strict=True):
            if gradient is not None:
                output.copy_(gradient)
        return outputs

    return run


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
