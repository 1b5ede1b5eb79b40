"""MaskedAutoregressive: every feature is transformed by functions of the features before it.

    y_i = x_i e^{s_i} + t_i   or   (x_i + t_i) e^{s_i}
    (t_i, r_i) = conditioner(x_1 .. x_{i-1}),   s_i = scale_map(r_i),   log|det| = sum_i s_i
    y_i = S(x_i; conditioner(x_1 .. x_{i-1}))   with a spline S,        log|det| = sum_i log S'

The density of a sample takes one evaluation of the conditioner. The inverse walks over the features and uses every
weight once too (linfast.ops.masked_walk).
Sources: masked autoregressive flows (arXiv 1705.07057), MADE (1502.03509), neural spline flows (1906.04032).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_choice, check_kind
from ..dispatch import uses_triton
from ..freeze import derived
from ..kernels.spline_spec import Spline
from ..masked_net import MaskedMLP
from ..ops.affine_coupling import ORDERS
from ..ops.masked_autoregressive import masked_autoregressive
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap
from .bijection import Bijection
from .splines import flow_spline
from .undo import Context, Outputs

# What layers lack that were pickled before there were splines.
_BEFORE_SPLINES = {"spline": None, "bins": None, "tail_bound": 3.0, "tails": "linear"} | dict.fromkeys(
    ("min_width", "min_height", "min_derivative"), 1e-3
)


class MaskedAutoregressive(Bijection):
    """y_i = x_i e^{s_i} + t_i, (x_i + t_i) e^{s_i} or a spline of x_i, by the features before i; x [B, D].

    Args:
        conditioner: a MaskedMLP, whose ``feature_order`` says which features come before which. Its weights, masks
            and inputs ``t`` and ``context`` are read; its forward and its hooks do not run.
        scale_map: a ScaleMap or a kind's name, for a conditioner with two parameters per feature; None for one with
            one, and y = x + t. Not used with a spline.
        order: "scale_first" x e^s + t; "shift_first" (x + t) e^s. Not used with a spline.
        bins: K, for a spline of K bins in place of scale and shift; None for no spline.
        tail_bound, tails, min_width, min_height, min_derivative: of the spline, as in ``SplineCoupling``, with as
            many parameters per feature: 3 K - 1 with tails "linear", 3 K "circular", 3 K + 1 "bounded".

    Raises:
        TypeError: conditioner is not a MaskedMLP.
        ValueError: unknown option, or another number of parameters per feature.
    """

    _shown: tuple[str, ...] = ("features", "scale_map", "order")

    def __init__(
        self,
        conditioner: MaskedMLP,
        scale_map: ScaleMap | str | None = "smooth",
        order: str = "scale_first",
        *,
        bins: int | None = None,
        tail_bound: float = 3.0,
        tails: str = "linear",
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_derivative: float = 1e-3,
    ) -> None:
        super().__init__()
        check_kind("conditioner", conditioner, MaskedMLP)
        check_choice("order", order, ORDERS)
        if isinstance(scale_map, str):
            check_choice("scale_map", scale_map, SCALE_MAP_KINDS)
            scale_map = ScaleMap(scale_map)
        if scale_map is not None:
            check_kind("scale_map", scale_map, ScaleMap, "a ScaleMap, its kind or None")
        self.bins, self.tail_bound, self.tails = bins, tail_bound, tails
        self.min_width, self.min_height, self.min_derivative = min_width, min_height, min_derivative
        spline = flow_spline(2 if bins is None else bins, tail_bound, tails, min_width, min_height, min_derivative)
        self.spline: Spline | None = None if bins is None else spline
        wanted, what = 1 if scale_map is None else 2, f"scale_map={scale_map}, bins=None"
        if bins is not None:
            wanted, what = spline.per_feature, f"bins={bins}, tails={tails!r}"
            self._shown = ("features", "bins", "tail_bound", "tails")
        if conditioner.per_feature != wanted:
            got = conditioner.per_feature
            raise ValueError(f"conditioner must have per_feature={wanted} for {what}; got {got}")
        self.conditioner, self.scale_map, self.order = conditioner, scale_map, order
        self.features = conditioner.features

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**_BEFORE_SPLINES, **state})

    @property
    def widths(self) -> list[int]:
        """The number of values per row of each layer of the conditioner, without the parameters of splines."""
        widths = [n_out for n_out, _ in self.conditioner.masks.shapes]
        return widths if self.spline is None else widths[:-1]

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        net = self.conditioner
        extras, weights, biases = net.extras(x, **context), *net.tensors()
        packed: Tensor | None = None
        packs = inverse or (self.spline is None and uses_triton(x, *weights))
        if packs:
            packed = derived(self, "packed", lambda: net.masks.pack(weights, biases))
        else:
            weights = derived(self, "masked", lambda: net.masks.apply(weights))
        return masked_autoregressive(
            x, net.masks, weights, biases, activation=net.activation, order=self.order, extras=extras,
            scale_map=self.scale_map if self.spline is None else None, inverse=inverse, log_det=log_det,
            packed=packed, masked=not packs, spline=self.spline,
        )  # fmt: skip
