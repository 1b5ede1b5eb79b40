"""Masked autoregressive transforms of other libraries: their inverse by one walk over the degrees.

    library   D evaluations of the network, each of which multiplies its weights by its masks
    here      the weights packed in one gather, then each weight used once (linfast.ops.masked_autoregressive)

Only the inverse is replaced: forward is one evaluation of the network, in the library's own code. Where no gradient
is required, any elementwise transform is inverted by the library's own formula on the features of one degree. Where a
gradient is required, or on a GPU, the transform must be affine with a known scale map; otherwise the original runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import autocast_dtype, uses_triton
from ..flows.remembered import Evidence
from ..ops.autoregressive_masks import AutoregressiveMasks
from ..ops.masked_autoregressive import (
    MASKED_ACTIVATIONS,
    Elementwise,
    Extras,
    invert_affine,
    invert_elementwise,
    masked_autoregressive,
)
from ..ops.masked_walk import Network
from ..scale_maps import ScaleMap
from .mlp import name_of_activation

Weights = tuple[Sequence[Tensor], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Affine:
    """y = x scale + shift.

    Args:
        scale, log_scale: the library's formulas, raw -> scale and its logarithm.
        scale_map: the same map by name, or None where linfast has none.
    """

    scale: Elementwise
    log_scale: Elementwise
    scale_map: ScaleMap | None


InvertFeatures = Callable[[Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]
"""(y [B, n], parameters [B, n, P], the features' indices) -> (x [B, n], log|dx / dy| [B, n])."""


@dataclass(frozen=True, eq=False)
class MaskedInverse:
    """The recognised network and elementwise transform of one instance.

    Args:
        masks: of the network.
        weights: returns the current weights and biases.
        activation: of the network, a function of a tensor.
        transform: affine, or how features are inverted.
        extras: context -> (term, gate) of each hidden layer.
        norms: returns (scale, shift) [H_l] of each hidden layer's value before its activation, or None for none.
        evidence: that the modules are as they were when they were recognised.
    """

    masks: AutoregressiveMasks
    weights: Callable[[], Weights]
    activation: Callable[[Tensor], Tensor]
    transform: Affine | InvertFeatures
    extras: Callable[[Any], Extras]
    norms: Callable[[], Sequence[tuple[Tensor, Tensor] | None]] | None
    evidence: Evidence

    def __call__(self, y: Tensor, context: Any) -> tuple[Tensor, Tensor] | None:
        """(x [B, D], log|dx / dy| [B]); None where the original is to run."""
        if type(y) not in (Tensor, nn.Parameter) or y.ndim != 2 or y.shape[1] != self.masks.features:
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or autocast_dtype(y.device.type) is not None:
            return None
        weights, biases = self.weights()
        if y.dtype != weights[0].dtype:
            return None
        extras = self.extras(context)
        given = [y, *weights, *(each for pair in extras for each in pair if each is not None)]
        if uses_triton(*given) or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
            return self._by_op(y, weights, biases, extras)
        with torch.no_grad():
            return self._by_walk(y, weights, biases, extras)

    def _by_op(
        self, y: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], extras: Extras
    ) -> tuple[Tensor, Tensor] | None:
        name = name_of_activation(self.activation)
        transform = self.transform
        if name not in MASKED_ACTIVATIONS or self.norms is not None or not isinstance(transform, Affine):
            return None
        if transform.scale_map is None:
            return None
        x, log_det = masked_autoregressive(
            y, self.masks, weights, biases, activation=name, scale_map=transform.scale_map, extras=extras,
            inverse=True, log_det=True,
        )  # fmt: skip
        assert log_det is not None
        return x, log_det.to(y.dtype)

    def _by_walk(
        self, y: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], extras: Extras
    ) -> tuple[Tensor, Tensor]:
        columns, kinds = self.masks.pack_extras(extras)
        packed, spec = self.masks.pack(weights, biases), self.masks.spec(kinds)
        pairs = spec.split_extras(None if columns is None else columns.t())
        norms = None if self.norms is None else self.masks.sort_norms(self.norms())
        net = Network(spec, spec.matrices(packed), spec.biases(packed), pairs, self.activation, norms)
        if isinstance(self.transform, Affine):
            return invert_affine(net, y, self.transform.scale, self.transform.log_scale, True)
        return invert_elementwise(net, y, self.transform)
