"""Undoing a coupling with each conditioner evaluated once.

A conditioner sees the same half in y as in x. Where y = f(x) is undone, x = f^{-1}(y) runs it, with a graph;
f(x), which is run again for the gradients, is given the same parameters, and the way back through that graph:

    x = f^{-1}(y)      params = c(kept), with a graph from kept' to params
    y = f(x)           params recalled: d kept += (d params / d kept')^T d params, and the same for the weights
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.undo import gradients

__all__ = ["recalling"]


def recalling(module: nn.Module, conditioners: Iterable[nn.Module], tensors: Sequence[Tensor]) -> Any:
    """A view of ``module``, sharing all it has, whose conditioners are evaluated at their first call only.

    Args:
        conditioners: inside ``module``: (kept, ...) -> params.
        tensors: what else than the kept half the parameters may be differentiated by.
    """
    return _view(module, {id(c): _Recalling(c, tensors) for c in conditioners})


def _view(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    if id(module) in replaced:
        return replaced[id(module)]
    children = {name: child if child is None else _view(child, replaced) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = object.__new__(type(module))
    vars(view).update(vars(module), _modules=children)
    return view


class _Recalling(nn.Module):
    def __init__(self, conditioner: nn.Module, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._conditioner = (conditioner,)  # no child of this one
        self.tensors = tensors
        self.params: Any = None

    def forward(self, kept: Tensor, *context: Any, **named: Any) -> Tensor:
        if self.params is None:
            self.kept = kept.detach().requires_grad_()
            with torch.enable_grad():
                self.params = self._conditioner[0](self.kept, *context, **named)
            return self.params.detach().clone()  # libraries write to it
        return _Recall.apply(self, kept, *self.tensors)

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Of kept and of the tensors; once."""
        found = gradients((self.params, None), (grad, None), (self.kept, *self.tensors))
        del self.params, self.kept
        return found


class _Recall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recalling: _Recalling, kept: Tensor, *tensors: Tensor) -> Tensor:
        ctx.recalling = recalling
        return recalling.params.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recalling.gradients(*grads)
