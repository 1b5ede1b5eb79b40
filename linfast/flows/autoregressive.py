"""MaskedAutoregressive: every feature is scaled and shifted by functions of the features before it.

    y_i = x_i e^{s_i} + t_i   or   (x_i + t_i) e^{s_i}
    (t_i, r_i) = conditioner(x_1 .. x_{i-1}),   s_i = scale_map(r_i),   log|det| = sum_i s_i

The density of a sample takes one evaluation of the conditioner. The inverse walks over the features and uses every
weight once too (linfast.ops.masked_walk).
Sources: masked autoregressive flows (arXiv 1705.07057), MADE (1502.03509).
"""

from __future__ import annotations

from torch import Tensor

from ..checks import check_choice, check_kind
from ..dispatch import uses_triton
from ..freeze import derived
from ..masked_net import MaskedMLP
from ..ops.affine_coupling import ORDERS
from ..ops.masked_autoregressive import masked_autoregressive
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap
from .bijection import Bijection
from .undo import Context, Outputs


class MaskedAutoregressive(Bijection):
    """y_i = x_i e^{s_i} + t_i, or (x_i + t_i) e^{s_i}, with (t_i, s_i) from the features before i; x [B, D].

    Args:
        conditioner: a MaskedMLP, whose ``feature_order`` says which features come before which. Its weights, masks
            and inputs ``t`` and ``context`` are read; its forward and its hooks do not run.
        scale_map: a ScaleMap or a kind's name, for a conditioner with two parameters per feature; None for one with
            one, and y = x + t.
        order: "scale_first" x e^s + t; "shift_first" (x + t) e^s.

    Raises:
        TypeError: conditioner is not a MaskedMLP.
        ValueError: unknown option, or another number of parameters per feature.
    """

    _shown = ("features", "scale_map", "order")

    def __init__(
        self, conditioner: MaskedMLP, scale_map: ScaleMap | str | None = "smooth", order: str = "scale_first"
    ) -> None:
        super().__init__()
        check_kind("conditioner", conditioner, MaskedMLP)
        check_choice("order", order, ORDERS)
        if isinstance(scale_map, str):
            check_choice("scale_map", scale_map, SCALE_MAP_KINDS)
            scale_map = ScaleMap(scale_map)
        if scale_map is not None:
            check_kind("scale_map", scale_map, ScaleMap, "a ScaleMap, its kind or None")
        wanted = 1 if scale_map is None else 2
        if conditioner.per_feature != wanted:
            got = conditioner.per_feature
            raise ValueError(f"conditioner must have per_feature={wanted} for scale_map={scale_map}; got {got}")
        self.conditioner, self.scale_map, self.order = conditioner, scale_map, order
        self.features = conditioner.features

    @property
    def widths(self) -> list[int]:
        """The number of values per row of each layer of the conditioner."""
        return [n_out for n_out, _ in self.conditioner.masks.shapes]

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        net = self.conditioner
        extras, weights, biases = net.extras(x, **context), *net.tensors()
        packed: Tensor | None = None
        packs = inverse or uses_triton(x, *weights)
        if packs:
            packed = derived(self, "packed", lambda: net.masks.pack(weights, biases))
        else:
            weights = derived(self, "masked", lambda: net.masks.apply(weights))
        return masked_autoregressive(
            x, net.masks, weights, biases, activation=net.activation, scale_map=self.scale_map, order=self.order,
            extras=extras, inverse=inverse, log_det=log_det, packed=packed, masked=not packs,
        )  # fmt: skip
