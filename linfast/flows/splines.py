"""SplineCoupling: half of the channels are mapped by monotonic splines whose knots the other half determines.

    y = S(m; p) element by element,  p = conditioner(kept),  log|det| = sum log S'(m; p)

m is the half of x [B, C, ...] that moves. S is the rational-quadratic spline of ``linfast.ops.rq_spline``.
Source: Neural Spline Flows (arXiv 1906.04032).
"""

from __future__ import annotations

from torch import Tensor, nn

from ..checks import check_choice, check_number
from ..dispatch import cat
from ..kernels.spline_spec import Spline
from ..ops.affine_coupling import HALVES, split_sizes
from ..ops.rq_spline import MOST_BOUND, spline_backward, spline_of, spline_transform
from ..ops.spline_plain import unit_derivative
from .couplings import _Coupling
from .undo import Made, Outputs

SPLINE_LAYOUTS = ("features_first", "bins_first")


def flow_spline(
    bins: int,
    tail_bound: float = 3.0,
    tails: str = "linear",
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> Spline:
    """The checked options of a flow's spline, which zeros as parameters make the identity."""
    bound = check_number("tail_bound", tail_bound, 0.0, MOST_BOUND, above=True)
    spline = spline_of(
        bins, interval=(-bound, bound), tails=tails, min_width=min_width, min_height=min_height,
        min_derivative=min_derivative,
    )  # fmt: skip
    return spline._replace(offset=unit_derivative(spline.min_derivative))


class SplineCoupling(_Coupling):
    """y = S(m; p) on the moved half, a monotonic rational-quadratic spline with parameters p from the other half.

    The spline maps [-tail_bound, tail_bound] to itself in K bins; outside it y = m. With raw widths u, heights v
    and derivatives w of one value of m (the formula of S is in ``linfast.ops.rq_spline``)

        widths, heights   2 tail_bound (min_width + (1 - K min_width) softmax(u)), and likewise from v
        derivatives       min_derivative + softplus(w + log(exp(1 - min_derivative) - 1)),  1 where w = 0

    so that a conditioner that returns zeros makes it the identity, as our conditioners do before training. nflows
    adds nothing to w: to use weights of nflows, subtract the constant from the last layer's biases of w.

    Args:
        conditioner: any module mapping the kept half [B, C_kept, ...] to [B, C_moved P, ...] with P = 3 K - 1
            parameters per channel, K widths, K heights and K - 1 derivatives at the inner knots; context keywords
            are passed on to it. It must be deterministic, as that of ``AffineCoupling``.
        features: C, at least 2.
        moves: which half moves, "first" or "second".
        bins: K, at least 2.
        tail_bound: half the length of the interval, at most 1e6; values that differ by less than eps tail_bound are
            the same.
        tails: "linear", derivatives 1 at both ends; "circular", for angles, equal ones, P = 3 K; "bounded", any,
            P = 3 K + 1, for data within the interval, as S then has kinks at its ends.
        min_width, min_height: least size of a bin as a fraction of the interval, at most 1 / K.
        min_derivative: least derivative at a knot, below 1.
        layout: of the conditioner's output: "features_first", all P parameters of a channel, then those of the next
            one, as in nflows; "bins_first", one parameter of all channels, then the next, which takes no copy of
            an image's parameters.

    Raises:
        ValueError: unknown option, wrong feature count, or a conditioner whose output has another shape.
    """

    _shown = ("features", "moves", "bins", "tail_bound", "tails")

    def __init__(
        self,
        conditioner: nn.Module,
        features: int,
        moves: str = "first",
        bins: int = 8,
        tail_bound: float = 3.0,
        *,
        tails: str = "linear",
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_derivative: float = 1e-3,
        layout: str = "features_first",
    ) -> None:
        super().__init__(conditioner, features, moves)
        self.spline = flow_spline(bins, tail_bound, tails, min_width, min_height, min_derivative)
        self.layout = check_choice("layout", layout, SPLINE_LAYOUTS)
        self.bins, self.tail_bound, self.tails = self.spline.bins, self.spline.high, tails
        self.min_width, self.min_height, self.min_derivative = min_width, min_height, min_derivative

    @property
    def _outputs(self) -> int:  # type: ignore[override]
        return self.spline.per_feature

    def _couple(self, x: Tensor, params: Tensor, inverse: bool, log_det: bool) -> Outputs:
        params = self._per_value(params)
        out, total = spline_transform(self._moved(x), params, self.spline, inverse, log_det)
        return cat((out, self._kept(x)) if self.moves == "first" else (self._kept(x), out), dim=1), total

    def _per_value(self, params: Tensor) -> Tensor:
        """[B, C_moved, ..., P], a view of params [B, C_moved P, ...]."""
        n = self.spline.per_feature
        if self.layout == "features_first":
            return params.unflatten(1, (params.shape[1] // n, n)).movedim(2, -1)
        return params.unflatten(1, (n, params.shape[1] // n)).movedim(1, -1)

    def _uncouple(self, made: Made, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        y, (grad, grad_log_det), _ = made
        x, _ = self._couple(y, params, not inverse, False)
        grad, (moved, grad_moved) = grad.clone(), map(self._moved, (x, grad))
        of_moved, of_params = spline_backward(
            moved, self._per_value(params), grad_moved, grad_log_det, self.spline, inverse
        )
        self._moved(grad).copy_(of_moved)
        return x, grad, of_params.movedim(-1, 2 if self.layout == "features_first" else 1).flatten(1, 2)

    def _moved(self, x: Tensor) -> Tensor:
        return x.split(split_sizes(x.shape[1]), dim=1)[HALVES.index(self.moves)]
