"""export: a method of a model as a program of plain torch operations, for torch.export.save, AOTInductor and ONNX.

What depends on weights alone, such as the inverse of a mix, is computed at export: ONNX has no operator that solves
linear systems, and the program need not solve them at every call.
"""

from __future__ import annotations

import copy
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .checks import check_choice, check_kind, check_tensor
from .dispatch import backend
from .flows.actnorm import ActNorm

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["export"]

METHODS = ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det", "log_prob")


class _Method(nn.Module):
    """A module whose forward is a method of ``model``."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor, t: float | Tensor | None = None, context: Tensor | None = None) -> Any:
        given = {"t": t, "context": context}
        return getattr(self.model, self.method)(x, **{key: v for key, v in given.items() if v is not None})


def export(
    model: nn.Module,
    x: Tensor,
    method: str = "forward",
    *,
    t: float | Tensor | None = None,
    context: Tensor | None = None,
) -> ExportedProgram:
    """``model.method(x)``, for any batch size, as a torch.export program of torch's own operations.

    The program needs neither linfast nor Triton: ``torch.export.save`` and ``load``, AOTInductor and
    ``torch.onnx.export(program, dynamo=True)`` take it. It holds the weights as they are now, gives no gradients
    to them, and is of the train or eval mode that the model is in. One op of linfast remains in it, which needs
    ``import linfast``: the inverse of an autoregressive flow.

    Args:
        model: a flow, a Linearizer or a Density.
        x: an example input [B, ...], B at least 2. The program's inputs have its dtype, device and other sizes.
        method: "forward", "inverse", "forward_and_log_det", "inverse_and_log_det" or "log_prob".
        t, context: examples of the method's further inputs, where it takes them. A tensor with B rows stands for
            one row per sample, and any other value is fixed. A context [C] is one for all samples.

    Raises:
        TypeError: model is not a module, or x not a tensor.
        ValueError: the model has no such method, or an ActNorm that waits for its first batch; x has fewer than
            two rows.
    """
    from torch.export import Dim
    from torch.export import export as traced

    check_kind("model", model)
    check_choice("method", method, [name for name in METHODS if hasattr(model, name)])
    check_tensor("x", x)
    if x.ndim == 0 or x.shape[0] < 2:  # torch.export would fix a batch of one
        raise ValueError(f"x must have at least two rows, so that the batch size stays open; got {tuple(x.shape)}")
    further = {key: value for key, value in (("t", t), ("context", context)) if value is not None}
    rows = {0: Dim("batch")}
    sizes = {"x": rows} | {
        key: rows if _per_sample(model, x, key, value) else None for key, value in further.items()
    }
    with torch.no_grad(), backend("reference"):
        called = _Method(copy.deepcopy(model), method)  # a program shares the weights of what it was traced from
        _settle(called)
        module = traced(called, (x,), further, dynamic_shapes=sizes).module(check_guards=False)
        compute_constants(module)
        return traced(module, (x,), further, dynamic_shapes=sizes)


def _settle(model: nn.Module) -> None:
    """Keep each ActNorm from tracing its initialisation; ValueError where one would need it."""
    for layer in model.modules():
        if isinstance(layer, ActNorm):
            if layer.waits_for_data():
                raise ValueError(
                    "model has an ActNorm that waits for its first batch: call it once, or model.eval()"
                )
            layer.eval()  # an ActNorm that is initialised computes the same in both modes


def _per_sample(model: nn.Module, x: Tensor, key: str, value: Any) -> bool:
    """Whether there is one row per sample of x. A context [C] is one for all, unless an embedding computes it."""
    fewest = 2 if key == "context" and getattr(model, "embedding", None) is None else 1
    return isinstance(value, Tensor) and value.ndim >= fewest and value.shape[0] == x.shape[0]


def compute_constants(module: fx.GraphModule) -> None:
    """Replace each part of the graph that depends on no input by its value, a buffer."""
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = attrgetter(node.target)(module)
        elif node.op == "call_function" and known.keys() >= set(node.all_input_nodes) and _repeats(node.target):
            args, keywords = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **keywords)
    for i, (node, value) in enumerate(known.items()):
        if node.op == "call_function" and isinstance(value, Tensor) and not known.keys() >= node.users.keys():
            module.register_buffer(f"constant_{i}", value.detach().clone())
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(f"constant_{i}"), lambda user: user not in known)
    for node in reversed(known):  # assertions about what is known have no users either
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()


def _repeats(target: Any) -> bool:
    """Whether the operation gives the same result again: it draws no random numbers."""
    return torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ())
