"""Rational-quadratic spline couplings of nflows, glasflow and normflows: their splines are ``ops.rq_spline``.

    forward, data to noise   y = S(moved; net(kept, context)),  and S(kept; parameters of its own) where it has them
    raw widths and heights   net / sqrt(the net's hidden_features or hidden_channels)

Only the spline is replaced, so any conditioner will do. On a CPU a conditioner that is an MLP or a ResidualNet is
computed as one function whose last layer is W h^T, so that each bin is a plane in memory, and a long batch is taken
in parts of as many rows as fit the cache (``rows.py``).

With a list of tails normflows returns 0, not x, outside the interval; so does this. Where the library raises an
error outside the interval [0, 1] of a spline without tails, its own spline runs on a CPU; on a GPU nothing is read
from the device, and such values do not change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..dispatch import autocast_dtype
from ..rows import by_rows, rows_at_once
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit
from .identity import PLAN, changed_method, defined_as, has_own, original_class
from .masked import redraw
from .mlp import MLP, find_mlp
from .residual import find_residual
from .sides import Split, split_of_indices
from .spline_curves import CURVE_METHODS, Other, apply_own_spline, apply_spline, curve_for, curve_of

_HIDDEN = ("hidden_features", "hidden_channels")


# The conditioner


def _temperature(net: Any) -> float:
    found = next((getattr(net, name) for name in _HIDDEN if hasattr(net, name)), 1)
    return math.sqrt(found)


class _Net:
    """A conditioner, and whether it is known.

    Args:
        run: (kept, context) -> params [B, n], by the known conditioner in planes, or by its own call.
        widths: values per row of its layers; [None] where its rows may depend on each other.
    """

    def __init__(self, net: Any, kept: Tensor, context: Any) -> None:
        self.run: Callable[[Tensor, Any], Tensor] = lambda kept, context: net(kept.contiguous(), context)
        self.widths: Sequence[int | None] = [None]
        if kept.ndim != 2:
            return
        residual = find_residual(net)
        mlp = find_mlp(net) if residual is None and context is None else None
        if residual is not None and residual.takes(kept, context):
            self.run, self.widths = residual, residual.widths
        elif mlp is not None:
            self.run, self.widths = functools.partial(in_planes, mlp), mlp.widths


def in_planes(mlp: MLP, kept: Tensor, context: None = None) -> Tensor:
    """The MLP's output [B, n], transposed in memory."""
    (weight, bias), body = mlp.layers[-1], mlp.parts[:-1]
    h = functools.reduce(lambda h, part: part(h), body, kept).t()
    return (weight @ h if bias is None else torch.addmm(bias[:, None], weight, h)).t()


def _bins_last(params: Tensor, x: Tensor) -> Tensor:
    """A conditioner's output [B, D P, ...] as params [B, D, ..., P] of the moved features x [B, D, ...]."""
    params = params.reshape(x.shape[0], x.shape[1], -1, *x.shape[2:])
    return params if x.ndim == 2 else params.movedim(2, -1)


# The coupling


def _run(transform: Any, x: Any, context: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """(y, log_det [B]) of x [B, D] or [B, D, H, W]; None where the library's own code is to run."""
    plan = vars(transform)[PLAN]
    if type(x) not in (Tensor, nn.Parameter) or x.ndim not in (2, 4) or x.shape[1] != transform.features:
        return None
    if autocast_dtype(x.device.type) is not None or forward_ad._current_level >= 0:
        return None
    if x.ndim > 2 and isinstance(transform.tail_bound, Tensor):
        return None
    own = transform.unconditional_transform
    if not torch.compiler.is_compiling() and not (
        has_own(original_class(transform), _ASSUMES)
        and (own is None or has_own(original_class(own), CURVE_METHODS))
    ):
        return None
    split = plan.layout
    kept, moved = split.parts(transform.features, x.device)
    net = _Net(transform.transform_net, x[:, kept], context)
    rows = rows_at_once(x, lambda: net.widths)
    work = functools.partial(_couple, transform, net.run, kept, moved, inverse)
    return work(x, context) if rows is None else by_rows(work, x, rows, context)


def _couple(
    transform: Any, net: Callable[[Tensor, Any], Tensor], kept: Any, moved: Any, inverse: bool, x: Tensor,
    context: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    result, found, log_det = couple(transform, net, x[:, kept], x[:, moved], inverse, context)
    y = x.clone()
    y[:, moved] = found
    if transform.unconditional_transform is not None:
        y[:, kept] = result
    return y, log_det


def couple(
    transform: Any, net: Callable[[Tensor, Any], Tensor], given: Tensor, value: Tensor, inverse: bool, context: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(the kept features, the moved ones, log_det [B]) from those that are given.

    The conditioner runs once, also where the library's own spline is to follow: it may count calls, or draw.
    """
    own, result, of_kept = transform.unconditional_transform, given, None
    params = net(given, context) if own is None or not inverse else None  # in the library's order
    if own is not None:
        try:
            result, of_kept = apply_own_spline(own, given, inverse)
        except Other:
            result, of_kept = (own.inverse if inverse else own)(given, context)
    params = net(result, context) if params is None else params
    try:
        spline = curve_for(transform, transform.num_bins, _temperature(transform.transform_net), value)
        found, log_det = apply_spline(transform, spline, value, _bins_last(params, value), inverse)
    except Other:
        name = "_coupling_transform_inverse" if inverse else "_coupling_transform_forward"
        found, log_det = getattr(transform, name)(value, params)
    return result, found, log_det if of_kept is None else log_det + of_kept


def _find(transform: Any, cdf: tuple[str, str], tails: tuple[Any, ...]) -> tuple[str, Split]:
    """The description for the report, and which features move; raises Unfit."""
    split = split_of_indices(transform.features, transform.identity_features, transform.transform_features)
    own, net = transform.unconditional_transform, transform.transform_net
    owners = [transform, *([] if own is None else [own])]
    if own is not None:
        if not defined_as(own, *cdf):
            raise Unfit(f"its unconditional transform is a {type(own).__name__}")
        changed = changed_method(own, CURVE_METHODS)
        if changed is not None:
            raise Unfit(f"the {changed} of its unconditional transform was replaced: not the library's own")
    for owner in owners:
        if not isinstance(owner.tails, list | tuple) and owner.tails not in tails:
            raise Unfit(f"its tails are {owner.tails!r}")
    try:
        curve_of(transform, transform.num_bins, _temperature(net))
        if own is not None:
            curve_of(own, own.unnormalized_widths.shape[-1], 1.0)
    except (TypeError, ValueError) as error:
        raise Unfit(f"its spline: {error}") from error
    kinds = transform.tails if isinstance(transform.tails, list | tuple) else [transform.tails]
    words = " and ".join(dict.fromkeys("no" if kind is None else str(kind) for kind in kinds))
    return f"rational-quadratic spline coupling, {transform.num_bins} bins, {words} tails, mask {split.kind}", split


def context_size(transform: Any) -> int:
    """The number of features of the context that a known conditioner takes; 0 for none."""
    found = find_residual(transform.transform_net)
    return 0 if found is None else found.network.first[0].shape[1] - len(transform.identity_features)


_ROWS = 4  # of a batch in the check
_LEAST_ROWS = (64, 192)
"""Without and with autograd. Measured with nflows, glasflow and normflows on an AMD EPYC, one thread."""


def _redraw(transform: Any) -> None:
    """Random parameters for a copy: a new one is the identity, with log-determinants that are only roundings."""
    redraw(transform)
    own = transform.unconditional_transform
    with torch.no_grad():
        for parameter in () if own is None else own.parameters():
            parameter.normal_()


def _both_ways(transform: Any, draw: Draw, shape: Sequence[int], context: Tensor | None) -> list[Tensor]:
    """The outputs of both directions, on values inside the interval and, where there are tails, outside too."""
    bound = torch.as_tensor(transform.tail_bound).max()
    outputs: list[Tensor] = []
    for size in (0.5, 1.5):
        for run in (transform.forward, transform.inverse):
            x = draw(_ROWS, *shape)
            outputs += run(x.sigmoid() if transform.tails is None else x * (size * bound), context)
    return outputs


_ASSUMES = (
    "_transform_dim_multiplier",
    "_piecewise_cdf",
    "_coupling_transform",
    "_coupling_transform_forward",
    "_coupling_transform_inverse",
)


def spline_coupling(
    library: str, where: str, name: str, cdf: tuple[str, str], tails: tuple[Any, ...] = (None, "linear")
) -> Adapter:
    """The adapter of a class of spline couplings.

    Args:
        cdf: where its unconditional transform is defined.
        tails: those that its spline has, besides a list.
    """

    def plan(transform: Any, options: Options) -> Plan:
        text, split = _find(transform, cdf, tails)
        known = find_residual(transform.transform_net) or find_mlp(transform.transform_net)
        text += " (on a CPU from {} rows per thread on, from {} with gradients)".format(*_LEAST_ROWS)
        return Plan(
            text, layout=split, vectors=None if known is None else transform.features, least_rows=_LEAST_ROWS
        )

    def method(name: str) -> Callable[..., Any]:
        def run(transform: Any, inputs: Any, context: Any = None) -> Any:
            outputs = _run(transform, inputs, context, name == "inverse")
            if outputs is not None:
                return outputs
            return getattr(transform._linfast_original, name)(transform, inputs, context)

        return run

    def probe(transform: Any, draw: Draw) -> list[Tensor]:
        net, features = transform.transform_net, transform.features
        kept, moved = map(len, _find(transform, cdf, tails)[1].features_of(features))
        transform.transform_net = stub = Stub(kept, moved * transform._transform_dim_multiplier(), draw)
        vars(stub).update({name: getattr(net, name) for name in _HIDDEN if hasattr(net, name)})
        _redraw(transform)
        own = transform.unconditional_transform
        images = [own.unnormalized_widths.shape[1:-1]] if own is not None else [(), (2, 3)]
        if isinstance(transform.tail_bound, Tensor):
            images = [()]
        return [t for image in images for t in _both_ways(transform, draw, (features, *image), draw(2))]

    def with_own_net(transform: Any, draw: Draw, features: int) -> list[Tensor]:
        size = context_size(transform)
        _redraw(transform)
        return _both_ways(transform, draw, (features,), draw(_ROWS, size) if size else None)

    return Adapter(
        library=library,
        where=where,
        name=name,
        methods={name: method(name) for name in ("forward", "inverse")},
        plan=plan,
        layout=lambda transform: _find(transform, cdf, tails)[1],
        probe=probe,
        masks=lambda transform: (transform.identity_features, transform.transform_features),
        settings=("unconditional_transform", "tails"),
        assumes=_ASSUMES,
        inner=lambda transform: [m for m in (transform.unconditional_transform,) if m is not None],
        conditioners=lambda transform: (transform.transform_net,),
        vectors=with_own_net,
        many_steps=True,
        is_spline=True,
    )
