"""Undoing a coupling with each conditioner evaluated once.

A coupling does not change its conditioner's input, the kept half. The backward first computes x = f^{-1}(y), which
evaluates the conditioner with a graph, then f(x) for the gradients, which reuses the parameters and that graph:

    x = f^{-1}(y)      params = c(kept'), with a graph from kept', a detached copy of the kept half, to params
    y = f(x)           the same params: d kept += (d params / d kept')^T d params, and likewise for the weights

Where a conditioner is called several times, for instance because both sides of a coupling share it, each call in
f(x) reuses the call whose kept half is nearest.
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
    """A view of ``module`` with the same tensors, whose conditioners store their calls and reuse them.

    Args:
        conditioners: modules inside ``module``: any arguments -> params, one tensor or several.
        tensors: the tensors, other than the arguments, that need gradients.
    """
    scripted = torch.jit.ScriptModule  # its attributes are not in its __dict__: evaluated twice
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
    """An instance of the same class, with the same attributes, whose forward is a ``_Calls``.

    A subclass with another forward would also run the class's own code for subclasses, ``__init_subclass__``.
    """
    view: nn.Module = object.__new__(type(conditioner))
    vars(view).update(nn.Module.__getstate__(conditioner))  # without its compiled call
    vars(view).update(without_hooks(), forward=_Calls(conditioner, tensors))  # _Calls runs the hooks
    return view


@dataclass
class _Call:
    """One evaluation: its floating-point inputs and its outputs, with the graph between them."""

    given: list[Tensor]
    outputs: list[Any]
    spec: TreeSpec


class _Calls:
    """Calls the conditioner, and stores its evaluations while one coupling is undone."""

    def __init__(self, conditioner: nn.Module, tensors: Sequence[Tensor]) -> None:
        self._run = functools.partial(nn.Module.__call__, conditioner)
        self._tensors = tensors
        self._made: list[_Call] = []

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The conditioner's output. A call under no_grad is stored, one with gradients reuses a stored call."""
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
        """Evaluate and store with a graph; return copies of the outputs without it."""
        own = [leaf.detach().requires_grad_() if _differentiable(leaf) else leaf for leaf in leaves]
        with torch.enable_grad():
            arguments, named = tree_unflatten(own, spec)
            outputs, spec = tree_flatten(self._run(*arguments, **named))
        self._made.append(_Call([*filter(_differentiable, own)], outputs, spec))
        return tree_unflatten([_copied(output) for output in outputs], spec)

    def _nearest(self, given: list[Tensor]) -> _Call | None:
        """Remove and return the stored call with the nearest inputs; None where none has these shapes."""
        shapes = [tensor.shape for tensor in given]
        fitting = [call for call in self._made if [tensor.shape for tensor in call.given] == shapes]
        call = next(iter(fitting), None)
        if len(fitting) > 1:  # only then, as the distances are read from the device
            call = min(fitting, key=lambda call: _distance(call.given, given))
        self._made = [other for other in self._made if other is not call]
        return call


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf  # libraries write to their params


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
        call.outputs, call.given = [], []  # frees the graph
        return None, None, *found
