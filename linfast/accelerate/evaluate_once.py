"""Undoing a coupling with each conditioner evaluated once.

A conditioner sees the same half in y as in x. Where y = f(x) is undone, x = f^{-1}(y) runs it, with a graph;
f(x), which is run again for the gradients, is given the same parameters, and the way back through that graph:

    x = f^{-1}(y)      params = c(kept), with a graph from kept' to params
    y = f(x)           params recalled: d kept += (d params / d kept')^T d params, and the same for the weights

Of a conditioner that is called more than once, as one that both sides of a coupling share, each call of f(x) is
given the parameters of the nearest kept half.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..flows.undo import gradients
from .identity import without_hooks


def recalling(module: nn.Module, conditioners: Iterable[nn.Module], tensors: Sequence[Tensor]) -> Any:
    """A view of ``module``, sharing all it has, whose conditioners' calls without a graph serve those with one.

    Args:
        conditioners: inside ``module``: any arguments -> params, a tensor or several.
        tensors: what else than the arguments the parameters may be gradients by.
    """
    scripted = torch.jit.ScriptModule  # whose attributes are not its dictionary's: evaluated twice
    return _view(module, {id(c): _recalling(c, tensors) for c in conditioners if not isinstance(c, scripted)})


def _view(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    if id(module) in replaced:
        return replaced[id(module)]
    children = {name: child if child is None else _view(child, replaced) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = object.__new__(type(module))
    vars(view).update(vars(module), _modules=children)
    return view


def _recalling(conditioner: nn.Module, tensors: Sequence[Tensor]) -> nn.Module:
    """An instance of the same class, with all its attributes, whose calls are recalled.

    A subclass could do that too, but whatever the class does with its subclasses would be done with that one.
    """
    view: nn.Module = object.__new__(type(conditioner))
    vars(view).update(nn.Module.__getstate__(conditioner))  # without what it was compiled to
    vars(view).update(without_hooks(), forward=_Calls(conditioner, tensors))  # its hooks run inside these calls
    return view


@dataclass
class _Call:
    """One evaluation: the floating-point tensors it was given, and what it returned, with a graph between."""

    given: list[Tensor]
    outputs: list[Any]
    spec: TreeSpec


class _Calls:
    """The conditioner, and its evaluations in one undo."""

    def __init__(self, conditioner: nn.Module, tensors: Sequence[Tensor]) -> None:
        self._run = functools.partial(nn.Module.__call__, conditioner)
        self._tensors = tensors
        self._made: list[_Call] = []

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Its value, whose evaluation is kept here or recalled."""
        leaves, spec = tree_flatten((arguments, named))
        if not torch.is_grad_enabled():
            return self._make(leaves, spec)
        given = [*filter(_differentiable, leaves)]
        call = self._nearest(given)
        if call is None:
            return self._run(*arguments, **named)
        params = iter(_Recall.apply(call, self._tensors, *given, *self._tensors))
        return tree_unflatten([next(params) if _differentiable(o) else o for o in call.outputs], call.spec)

    def _make(self, leaves: list[Any], spec: TreeSpec) -> Any:
        """Evaluate, with a graph, which is kept; what is returned has none."""
        own = [leaf.detach().requires_grad_() if _differentiable(leaf) else leaf for leaf in leaves]
        with torch.enable_grad():
            arguments, named = tree_unflatten(own, spec)
            outputs, spec = tree_flatten(self._run(*arguments, **named))
        self._made.append(_Call([*filter(_differentiable, own)], outputs, spec))
        return tree_unflatten([_copied(output) for output in outputs], spec)

    def _nearest(self, given: list[Tensor]) -> _Call | None:
        """The call that was given most nearly this, taken out; None: there is none of these shapes."""
        shapes = [tensor.shape for tensor in given]
        fitting = [call for call in self._made if [tensor.shape for tensor in call.given] == shapes]
        call = next(iter(fitting), None)
        if len(fitting) > 1:  # reads the device; of a single one nothing is to be found out
            call = min(fitting, key=lambda call: _distance(call.given, given))
        self._made = [other for other in self._made if other is not call]
        return call


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf  # libraries write to it


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.detach() - y.detach()).abs().sum()) for x, y in zip(a, b, strict=True))


class _Recall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, tensors: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.tensors = call, tensors
        ctx.set_materialize_grads(False)
        return tuple(map(_copied, filter(_differentiable, call.outputs)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        found = gradients([*filter(_differentiable, call.outputs)], grads, (*call.given, *ctx.tensors))
        call.outputs, call.given = [], []  # once
        return None, None, *found
