"""Recognising a conditioner as an MLP: linear layers with one activation between them.

Every call that would bypass the conditioner's modules recognises it again, so this is quick: it compares
classes exactly and reads each module's ``__dict__``. A parametrization is noticed, as it changes the class.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flows.remembered import HOOKS
from .identity import find_class, is_own_method

# Exact classes only: a subclass may compute something else.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("relu",),
    nn.SiLU: ("silu",),
    nn.Tanh: ("tanh",),
    nn.Sigmoid: ("sigmoid",),
    nn.ELU: ("elu", "alpha"),
    nn.GELU: ("gelu", "approximate"),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.Softplus: ("softplus", "beta", "threshold"),
}
"""By class: the activation's name in linfast, and the attributes that hold its constants."""
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.elu: "elu",
    F.gelu: "gelu",
}
_DEFAULTS: dict[str, tuple[float | str, ...]] = {"elu": (1.0,), "gelu": ("none",)}

Part = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class MLP:
    """y = W_n a(... a(W_1 x + b_1) ...) + b_n.

    Args:
        layers: (W_i [out, in], b_i [out] or None), the parameters themselves.
        activation: the name of a; "none" for a single layer.
        constants: a's constants, such as the slope of leaky_relu, alpha of elu, approximate of gelu.
        parts: the linear layers and activations in order.
    """

    layers: tuple[tuple[Tensor, Tensor | None], ...]
    activation: str
    constants: tuple[float | str, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.layers[0][0].shape[1], *(weight.shape[0] for weight, _ in self.layers))

    @property
    def widths(self) -> tuple[int, ...]:
        return self.sizes

    def __str__(self) -> str:
        constants = "".join(f" {value:g}" if isinstance(value, float) else f" {value}" for value in self.constants)
        return f"MLP {'-'.join(map(str, self.sizes))} {self.activation}{constants}"


def find_mlp(module: object) -> MLP | None:
    """The MLP that this module is, or None.

    Recognised are nn.Sequential, the MLPs of zuko, normflows, nflows and glasflow, and a module whose
    forward is only ``return self.net(x)``, as users of nflows write it to accept a context. A hook, a
    parametrization, a patched method, dropout, stacked (3-d) weights, two kinds of activation or one
    after the last layer give None, as linear layers and one activation then do not describe the module.
    """
    parts = _parts(module)
    if parts is None or len(parts) % 2 == 0:
        return None
    layers, activations = [layer_of(part) for part in parts[::2]], {activation_of(part) for part in parts[1::2]}
    if any(layer is None for layer in layers) or None in activations or len(activations) > 1:
        return None
    name, constants = activations.pop() if activations else ("none", ())  # type: ignore[misc]
    return MLP(tuple(layer for layer in layers if layer is not None), name, constants, tuple(parts))


def find_halved_mlp(module: object) -> nn.Module | None:
    """The MLP c in a module whose forward is only ``return self.c(x).chunk(2, 1)``; None of any other module."""
    if not isinstance(module, nn.Module) or not is_plain(module):
        return None
    child = module._modules.get(_forward_of(type(module)).halved or "")
    return None if child is None or find_mlp(child) is None else child


def name_of_activation(part: Any) -> str | None:
    """The name of an activation, a function or a module, that has its default constants; else None."""
    found = activation_of(part)
    return found[0] if found is not None and found[1] in ((), _DEFAULTS.get(found[0])) else None


def _parts(module: object) -> list[Any] | None:
    """The modules and functions that it runs one after another; None where that is not known."""
    kind: Any = type(module)
    if not isinstance(module, nn.Module) or not is_plain(module):
        return None
    if kind is nn.Sequential or (is_class(kind, "zuko.nn", "MLP") and kind.forward is nn.Sequential.forward):
        nested = [_parts(c) if type(c) is nn.Sequential else [c] for c in module._modules.values()]
        if any(found is None for found in nested) or not _forward_of(nn.Sequential).is_own:
            return None
        return [part for found in nested if found is not None for part in found]
    forward = _forward_of(kind)
    if forward.is_own and kind.__module__ in _NFLOWS and is_class(kind, kind.__module__, "MLP"):
        return _nflows_parts(module, getattr(module, _NFLOWS[kind.__module__]))
    return None if forward.child is None else _parts(module._modules.get(forward.child))


_NFLOWS = {
    "nflows.nn.nets.mlp": "_activation",
    "glasflow.nflows.nn.nets.mlp": "_activation",
    "glasflow.nets.mlp": "_activation_fn",
}
"""Where nflows and glasflow define their MLPs, and the attributes that hold their activations."""


def _nflows_parts(module: Any, activation: Any) -> list[Any] | None:
    """The parts of an nflows MLP: linear layers by attribute name, and the activation, a function."""
    if "_output_layer" not in module._modules:  # the check's copy, without submodules
        return None
    dropouts = getattr(module, "_dropout_layers", ())
    vectors = len(module._in_shape if hasattr(module, "_in_shape") else module._input_shape) == 1
    if module._activate_output or not vectors or any(dropout.p for dropout in dropouts):
        return None
    parts = [module._input_layer]
    for layer in (*module._hidden_layers, module._output_layer):
        parts += [activation, layer]
    return parts


class _Forward(NamedTuple):
    """A class's forward, and what its source says.

    Args:
        function: the forward.
        is_own: whether it is the function in the class's own body, as far as its name and module tell.
        child: c, where that function is only ``return self.c(x)`` of its first argument x.
        halved: c, where it is only ``return self.c(x).chunk(2, 1)``, or the same in two statements.
    """

    function: Any
    is_own: bool = False
    child: str | None = None
    halved: str | None = None


_FORWARDS: dict[type, _Forward] = {}
"""By class. ``accelerate`` fills it in, because torch.compile cannot trace the reading of a source."""


def _forward_of(kind: Any) -> _Forward:
    found = _FORWARDS.get(kind)
    if found is not None and found.function is kind.forward:
        return found
    if torch.compiler.is_compiling():
        return _Forward(None)
    is_own = "forward" in vars(kind) and is_own_method(kind, "forward")
    if not is_own:
        return _Forward(kind.forward)
    _FORWARDS[kind] = found = _Forward(kind.forward, True, *_read(kind.forward))
    return found


def _read(forward: Any) -> tuple[str | None, str | None]:
    """(child, halved) of the function, as in ``_Forward``."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None, None
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
        return None, None
    own, first = (argument.arg for argument in function.args.args[:2])
    match [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]:
        case [ast.Return(value)]:
            return _child(value, own, first), _child(_before_chunk(value), own, first)
        case [
            ast.Assign([ast.Tuple([ast.Name(a), ast.Name(b)])], value),
            ast.Return(ast.Tuple([ast.Name(c), ast.Name(d)])),
        ]:
            return None, _child(_before_chunk(value), own, first) if (a, b) == (c, d) and a != b else None
    return None, None


def _child(value: ast.expr | None, own: str, first: str) -> str | None:
    """c, where the expression is ``own.c(first)``."""
    match value:
        case ast.Call(ast.Attribute(ast.Name(owner), child), [ast.Name(x)], []):
            return child if (owner, x) == (own, first) else None
    return None


def _before_chunk(value: ast.expr | None) -> ast.expr | None:
    """e, where the expression is ``e.chunk(2, dim)`` or ``torch.chunk(e, 2, dim)`` with dim 1 or -1."""
    match value:
        case ast.Call(ast.Attribute(ast.Name("torch"), "chunk"), [inside, *rest], named):
            pass
        case ast.Call(ast.Attribute(inside, "chunk"), rest, named):
            pass
        case _:
            return None
    given = [ast.unparse(argument) for argument in rest] + [f"{k.arg}={ast.unparse(k.value)}" for k in named]
    return inside if given in (["2", dim] for dim in ("1", "-1", "dim=1", "dim=-1")) else None


def is_class(kind: type, where: str, name: str) -> bool:
    """Whether this is the class of this name of this imported module."""
    return kind.__name__ == name and kind is find_class(where, name)


def is_plain(module: nn.Module) -> bool:
    """Whether a call runs its class's forward and nothing else."""
    own = module.__dict__
    return "forward" not in own and not any(own[name] for name in HOOKS)


def is_untouched(module: nn.Module) -> bool:
    """Whether it ``is_plain`` and the forward is the one in the class's own body."""
    return is_plain(module) and _forward_of(type(module)).is_own


def layer_of(part: Any) -> tuple[Tensor, Tensor | None] | None:
    kind = type(part)
    if not (kind is nn.Linear or is_class(kind, "zuko.nn", "Linear")) or not is_untouched(part):
        return None
    weight, bias = part._parameters.get("weight"), part._parameters.get("bias")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    return weight, bias if isinstance(bias, Tensor) else None


def activation_of(part: Any) -> tuple[str, tuple[float | str, ...]] | None:
    if not isinstance(part, nn.Module):
        function = _FUNCTIONS.get(part) if callable(part) else None
        return None if function is None else (function, ())
    found = _ACTIVATIONS.get(type(part))
    if found is None or not is_untouched(part):
        return None
    name, *settings = found
    values = [getattr(part, setting) for setting in settings]
    constants = tuple(value if isinstance(value, str) else float(value) for value in values)
    return ("relu", ()) if (name, constants) == ("leaky_relu", (0.0,)) else (name, constants)
