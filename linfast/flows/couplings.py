"""Coupling layers: half of the channels pass unchanged and condition the transform of the other half.

    affine    y = (m + t) exp(log_s) or m exp(log_s) + t,  (t, raw) = conditioner(kept)
    additive  y = m + t,  t = conditioner(kept)

m is the half of x [B, C, ...] that moves; the first half has ceil(C / 2) channels. Sources:
NICE (arXiv 1410.8516), RealNVP (1605.08803), the Linearizer paper (2510.08570).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import DTYPES, check_choice, check_count, check_kind, check_tensor
from ..dispatch import cat
from ..ops.affine_coupling import HALVES, LAYOUTS, ORDERS, affine_coupling, affine_coupling_undo, split_sizes
from ..ops.coupling_mix import coupling_mix
from ..scale_maps import SCALE_MAP_KINDS, ScaleMap
from .bijection import Bijection, constant_log_det
from .undo import Context, Made, Outputs, Undone, gradients


class _Coupling(Bijection):
    """Base class of both couplings: which half moves, and the conditioner's call on the other half."""

    _outputs: int  # the conditioner's output channels per channel that moves
    _shown: tuple[str, ...] = ("features", "moves")

    def __init__(self, conditioner: nn.Module, features: int, moves: str = "first") -> None:
        super().__init__()
        check_kind("conditioner", conditioner)
        check_choice("moves", moves, HALVES)
        self.conditioner = conditioner
        self.features = check_count("features", features, least=2)
        self.moves = moves

    def _couple(self, x: Tensor, params: Tensor, inverse: bool, log_det: bool) -> Outputs:
        """The transform of x, given the conditioner's output ``params``."""
        raise NotImplementedError

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        return self._couple(x, self._condition(self._kept(x), context), inverse, log_det)

    def _uncouple(self, made: Made, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(x, dx, dparams) with ``_couple(x)`` = y, from the gradients of its outputs; dx is a new tensor."""
        raise NotImplementedError

    def _undo(self, made: Made, context: Context, inverse: bool, log_det: bool) -> Undone:
        """Evaluates the conditioner once: the half that it reads is equal in x and y."""
        kept = self._kept(made.y).detach().requires_grad_()
        with torch.enable_grad():
            params = self._condition(kept, context)
        x, grad, grad_params = self._uncouple(made, params.detach(), inverse)
        grad_kept, *rest = gradients([params], [grad_params], (kept, *made.tensors))
        if grad_kept is not None:
            self._kept(grad).add_(grad_kept)
        return x, [grad, *rest]

    def _kept(self, x: Tensor) -> Tensor:
        first, second = x.split(split_sizes(x.shape[1]), dim=1)
        return second if self.moves == "first" else first

    def _condition(self, kept: Tensor, context: Context) -> Tensor:
        params = self.conditioner(kept, **context)
        moved = split_sizes(self.features or 0)[HALVES.index(self.moves)]
        expected = (kept.shape[0], self._outputs * moved, *kept.shape[2:])
        if (  # check_tensor's conditions
            not isinstance(params, Tensor)
            or params.dtype not in DTYPES
            or params.layout is not torch.strided
            or params.is_nested
            or params.device != kept.device
            or params.shape != expected
        ):
            check_tensor("what conditioner returns", params, kept, "its input")
            raise ValueError(
                f"{type(self).__name__}: conditioner must return {expected} for a kept half {tuple(kept.shape)} "
                f"with moves={self.moves!r}; got {tuple(params.shape)}"
            )
        return params


class AffineCoupling(_Coupling):
    """y = (m + t) exp(log_s(raw)) on the moved half, with (t, raw) from the other half.

    Args:
        conditioner: any module mapping the kept half [B, C_kept, ...] to
            [B, 2 C_moved, ...]; context keywords are passed on to it. It must be
            deterministic: with dropout the coupling is invertible in eval mode only.
        features: C, at least 2.
        moves: which half moves, "first" or "second".
        scale_map: a ScaleMap or a kind's name; by default smooth with |log_s| < 0.5.
            A flow of n layers stays well conditioned with bounds from 2/n to 4/n.
        order: "shift_first" (x + t) e^s, the paper's; "scale_first" x e^s + t.
        layout: of the conditioner's output: "halves" [shift | raw] or "interleaved".

    Raises:
        ValueError: unknown option, wrong feature count, or a conditioner whose
            output has another shape.
    """

    _outputs = 2
    _shown = ("features", "moves", "scale_map", "order")

    def __init__(
        self,
        conditioner: nn.Module,
        features: int,
        moves: str = "first",
        scale_map: ScaleMap | str = "smooth",
        order: str = "shift_first",
        layout: str = "halves",
    ) -> None:
        super().__init__(conditioner, features, moves)
        check_choice("order", order, ORDERS)
        check_choice("layout", layout, LAYOUTS)
        if isinstance(scale_map, str):
            check_choice("scale_map", scale_map, SCALE_MAP_KINDS)
            scale_map = ScaleMap(scale_map)
        check_kind("scale_map", scale_map, ScaleMap, "a ScaleMap or its kind")
        self.scale_map = scale_map
        self.order = order
        self.layout = layout

    def _couple(self, x: Tensor, params: Tensor, inverse: bool, log_det: bool) -> Outputs:
        return affine_coupling(x, params, self.scale_map, inverse=inverse, log_det=log_det, **self._options)

    def _uncouple(self, made: Made, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        y, (grad, grad_log_det), _ = made
        return affine_coupling_undo(y, params, grad, grad_log_det, self.scale_map, inverse=inverse, **self._options)

    def transform_then_mix(
        self,
        x: Tensor,
        context: Context,
        inverse: bool,
        log_det: bool,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Outputs:
        """(weight u + bias over channels, log|det| of x -> u), with u the output of ``_transform``."""
        params = self._condition(self._kept(x), context)
        return coupling_mix(
            x, params, self.scale_map, weight, bias, inverse=inverse, log_det=log_det, **self._options
        )

    @property
    def _options(self) -> dict[str, str]:
        return {"order": self.order, "layout": self.layout, "moves": self.moves}


class AdditiveCoupling(_Coupling):
    """y = m + t on the moved half, with t from the other half; log|det| = 0.

    Args:
        conditioner: any module mapping [B, C_kept, ...] to [B, C_moved, ...].
        features: C, at least 2.
        moves: which half moves, "first" or "second". Errors are those of AffineCoupling.
    """

    _outputs = 1

    def __init__(self, conditioner: nn.Module, features: int, moves: str = "first") -> None:
        super().__init__(conditioner, features, moves)

    def _couple(self, x: Tensor, params: Tensor, inverse: bool, log_det: bool) -> Outputs:
        first, second = x.split(split_sizes(x.shape[1]), dim=1)
        moved = first if self.moves == "first" else second
        out = (moved - params if inverse else moved + params).to(x.dtype)
        y = cat((out, second) if self.moves == "first" else (first, out), dim=1)
        return y, constant_log_det(x) if log_det else None

    def _uncouple(self, made: Made, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        grad, _ = made.cotangents
        moved = grad.split(split_sizes(grad.shape[1]), dim=1)[HALVES.index(self.moves)]
        return self._couple(made.y, params, not inverse, False)[0], grad.clone(), -moved if inverse else moved
