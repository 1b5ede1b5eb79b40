"""Random coupling stacks for tests, and the plain formulas with which kernels are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from linfast.bench.rounding import operand_rounding
from torch import Tensor

from linfast.ops import AffineMap, CouplingLayer
from linfast.ops.activations import ACTIVATIONS
from linfast.ops.affine_coupling import couple, split_sizes
from linfast.scale_maps import ScaleMap
from tests.ops.budget import COMPILED, DEVICE

NAMES = ("none", "diagonal", "dense")
HALF = torch.bfloat16 if COMPILED else torch.float16  # of parts; the interpreter has no bf16 arithmetic


def random_layers(
    D: int,
    hidden: Sequence[int],
    depth: int,
    *,
    moves: str = "first",
    maps: str = "none",
    layout: str = "halves",
    bias: bool = True,
) -> list[CouplingLayer]:
    """fp32 layers whose activations stay near unit variance."""
    sizes = split_sizes(D)
    layers = []
    for i in range(depth):
        moved = (i + (moves == "second")) % 2
        widths = (sizes[1 - moved], *hidden, 2 * sizes[moved])
        weights = [torch.randn(b, a) / a**0.5 for a, b in pairwise(widths)]
        weights[-1] *= 0.5  # with unbounded scale maps one row would dominate every error
        biases = [0.2 * torch.randn(len(w)) if bias else None for w in weights]
        layers.append(CouplingLayer(weights, biases, layout, random_map(D, maps)))
    return [_on_device(layer) for layer in layers]


def random_map(D: int, kind: str) -> AffineMap | None:
    """A well-conditioned map; None for "none"."""
    if kind == "none":
        return None
    weight = torch.eye(D) + 0.3 * torch.randn(D, D) / D**0.5 if kind == "dense" else 1 + 0.2 * torch.rand(D)
    return AffineMap(weight.to(DEVICE), 0.2 * torch.randn(D).to(DEVICE))


def _on_device(layer: CouplingLayer) -> CouplingLayer:
    biases = [None if b is None else b.to(DEVICE) for b in layer.biases]
    return layer._replace(weights=[w.to(DEVICE) for w in layer.weights], biases=biases)


def leaves(layers: Sequence[CouplingLayer], head: AffineMap | None = None) -> list[Tensor]:
    """Every tensor, in the order of ``rebuilt``."""
    maps = [entry for entry in (head, *(layer.map for layer in layers)) if entry is not None]
    mlps = [t for layer in layers for t in (*layer.weights, *layer.biases) if t is not None]
    return [*mlps, *(t for entry in maps for t in entry if t is not None)]


def rebuilt(
    layers: Sequence[CouplingLayer], tensors: Sequence[Tensor], head: AffineMap | None = None
) -> tuple[list[CouplingLayer], AffineMap | None]:
    """These layers and head with other tensors in place of theirs."""
    it = iter(tensors)
    new = [
        layer._replace(
            weights=[next(it) for _ in layer.weights],
            biases=[None if b is None else next(it) for b in layer.biases],
        )
        for layer in layers
    ]

    def fill(entry: AffineMap | None) -> AffineMap | None:
        return None if entry is None else AffineMap(*(None if t is None else next(it) for t in entry))

    new_head = fill(head)
    return [layer._replace(map=fill(layer.map)) for layer in new], new_head


def doubled(layers: Sequence[CouplingLayer], head: AffineMap | None = None):
    """The same in float64."""
    return rebuilt(layers, [t.detach().double() for t in leaves(layers, head)], head)


def plain_stack(
    x: Tensor,
    layers: Sequence[CouplingLayer],
    activation: str,
    scale_map: ScaleMap,
    *,
    order: str = "shift_first",
    moves: str = "first",
    inverse: bool = False,
    head: AffineMap | None = None,
    rounded: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[Tensor, Tensor]:
    """(y, log_det) written out from the formulas; ``rounded`` is applied to the conditioners' operands."""
    halves, total = list(x.split(split_sizes(x.shape[1]), dim=1)), x.new_zeros(x.shape[0])

    def apply(entry: AffineMap | None) -> None:
        nonlocal halves, total
        if entry is None:
            return
        z, W = torch.cat(halves, 1), torch.diag(entry.weight) if entry.weight.ndim == 1 else entry.weight
        z = torch.linalg.solve(W, (z - entry.bias).mT).mT if inverse else z @ W.mT + entry.bias
        halves = list(z.split(split_sizes(x.shape[1]), dim=1))
        total = total + (-1 if inverse else 1) * torch.linalg.slogdet(W).logabsdet

    if not inverse:
        apply(head)
    for i in reversed(range(len(layers))) if inverse else range(len(layers)):
        layer, m = layers[i], (i + (moves == "second")) % 2
        if inverse:
            apply(layer.map)
        h = halves[1 - m]
        for k, (weight, bias) in enumerate(zip(layer.weights, layer.biases, strict=True)):
            h = F.linear(rounded(ACTIVATIONS[activation](h) if k else h), rounded(weight), bias)
        shift, raw = h.chunk(2, 1) if layer.layout == "halves" else (h[:, ::2], h[:, 1::2])
        log_s = scale_map.log_scale(raw)
        halves[m] = couple(halves[m], shift, log_s, order, inverse)
        total = total + (-1 if inverse else 1) * log_s.sum(1)
        if not inverse:
            apply(layer.map)
    if inverse:
        apply(head)
    return torch.cat(halves, 1), total


def rounding(precision: str) -> Callable[[Tensor], Tensor]:
    """The rounding of an operand in a mode; in Triton's interpreter fp16 stands for bf16."""
    return operand_rounding(precision, HALF)


def factors_of_every_part() -> tuple[Tensor, Tensor]:
    """x, w [3]: fp32 represents each product x_i w_i, which needs three parts of x, three of w, or two of both."""
    bits = round(-math.log2(torch.finfo(HALF).eps)) + 1
    long, tie = 1 + 2.0 ** -(bits + 1) + 2.0 ** -(2 * bits + 1), 1 + 2.0**-bits
    return torch.tensor([long, 1.0, tie], device=DEVICE), torch.tensor([1.0, long, tie], device=DEVICE)
