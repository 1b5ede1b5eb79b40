"""Decides which code runs a coupling outside a chain.

on a GPU   one launch with its MLP conditioners (``launch.py``), else ``ops.affine_coupling`` on their output
else       the library's own code; on a CPU a long batch is cut into parts of as many rows as fit the cache
           (``rows.py``), where the conditioners are MLPs or ResidualNets, whose rows do not depend on each other

The check before a swap (``verify.py``) runs ``ops.affine_coupling`` wherever it fits, in plain torch on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import has_global_hook, tensor_of, uses_triton
from ..ops.affine_coupling import affine_coupling, split_sizes
from ..rows import by_rows, checks_all_lengths, is_worth_cutting, rows_at_once, rows_in_cache
from .adapter import ORIGINAL, Adapter, Draw, Options, Plan, Stub, put_inside
from .identity import PLAN
from .launch import lone_launch
from .mlp import MLP, find_mlp
from .residual import Residual, find_residual
from .sides import Affine, Side

Members = Callable[[Any, Any, Sequence[Any]], Sequence[Any]]
"""(instance, layout, context) -> its sides, maps and permutations, in the order in which its forward runs them."""
Methods = tuple[Mapping[str, Callable[..., Any]], Callable[[Any, Draw, tuple[int, ...]], list[Tensor]]]
"""An adapter's methods, and (copy, draw, shape) -> their outputs in both directions; stubs also get a context."""


def coupling_adapter(
    *,
    find: Callable[[Any], tuple[str, Any]],
    members: Members,
    nets: Callable[[Any], Sequence[nn.Module]],
    shapes: Callable[[Any], Iterable[tuple[int, ...]]],
    methods: Methods,
    extra: Callable[[Any], int] = lambda module: 0,
    stub: Callable[[Any], type[Stub]] = lambda module: Stub,
    **what: Any,
) -> Adapter:
    """The adapter of a class of couplings.

    Args:
        find: instance -> (description for the report, the layout that ``members`` takes); raises Unfit.
        members, methods: see ``Members`` and ``Methods``; ``two_methods`` makes those of a forward and an inverse.
        nets: instance -> its conditioners, equally many for each side.
        shapes: instance -> shapes of inputs for the check.
        extra: instance -> number of context channels that its conditioners take in addition to the kept channels.
        stub: instance -> the class that replaces its conditioners in the check.
    """

    def plan(module: Any, options: Options) -> Plan:
        text, layout = find(module)
        return _plan(text, module, members(module, layout, ()), options, layout)

    def put_stubs(module: Any, sides: Sequence[Side], features: int, draw: Draw) -> None:
        conditioners, made, stubs = nets(module), stub(module), {}
        for i, net in enumerate(conditioners):
            side = sides[i * len(sides) // len(conditioners)]
            n_in, n_out = side.widths(*map(len, side.split.features_of(features)))
            stubs[id(net)] = made(n_in + extra(module), n_out, draw)
        put_inside(module, stubs)

    def probe(module: Any, draw: Draw) -> list[Tensor]:
        outputs: list[Tensor] = []
        sides, stubbed = _sides(members(module, find(module)[1], ())), 0
        for shape in shapes(module):
            features = sides[0].split.features or shape[1]
            if features != stubbed:
                put_stubs(module, sides, features, draw)
                stubbed = features
            outputs += both_ways(module, draw, shape)
        return outputs

    replaced, both_ways = methods
    return Adapter(
        methods=replaced,
        plan=plan,
        probe=probe,
        conditioners=nets,
        layout=lambda module: find(module)[1],
        members=lambda module, layout: members(module, layout, ()),
        vectors=lambda module, draw, features: both_ways(module, draw, (3, features)),
        **what,
    )


def two_methods(members: Members, context: str = "none", log_det: bool = True, inverse: str = "inverse") -> Methods:
    """The Methods of couplings with a forward and an inverse, (x, context) -> y or (y, log_det [B]).

    Args:
        context: the arguments after x: "none", "one" that may be None, or "any" number.
        log_det: whether they return a log-determinant.
        inverse: the name of the inverse.
    """

    def method(name: str) -> Callable[..., Any]:
        def run(module: Any, x: Tensor, *given: Any) -> Any:
            def original(x: Tensor, *given: Any) -> tuple[Tensor, Any]:
                outputs = getattr(module._linfast_original, name)(module, x, *given)
                return outputs if log_det else (outputs, None)

            found = members(module, module._linfast_plan.layout, [c for c in given if c is not None])
            outputs = couple(module, found, x, name == inverse, original, given)
            return outputs if log_det else outputs[0]

        takes = {"none": lambda module, x: run(module, x), "any": run}
        return takes.get(context, lambda module, x, context=None: run(module, x, context))

    def both_ways(module: Any, draw: Draw, shape: tuple[int, ...]) -> list[Tensor]:
        stubs = context == "one" and any(isinstance(inside, Stub) for inside in module.modules())
        forth = module.forward(draw(*shape))
        back = getattr(module, inverse)(draw(*shape), *([draw(2)] if stubs else []))
        return [t for each in (forth, back) for t in (each if isinstance(each, tuple) else (each,))]

    return {name: method(name) for name in ("forward", inverse)}, both_ways


def _sides(members: Sequence[Any]) -> list[Side]:
    return [member for member in members if isinstance(member, Side)]


def couple(
    owner: nn.Module, members: Sequence[Any], x: Tensor, inverse: bool, original: Callable[..., Any],
    given: Sequence[Any] = (),
) -> tuple[Tensor, Any]:  # fmt: skip
    """(y, log_det [B]) of x [B, C, ...] under a swapped coupling, or under its inverse.

    Args:
        owner: the swapped module.
        members: its sides, diagonal maps and permutations, in the order in which the library's forward runs them.
        original: the library's own code, (x, *given) -> (y, log_det or None).
        given: its other arguments: contexts of as many rows as x, or None.
    """
    sides = _sides(members)
    like = tensor_of(owner)
    if sides[0].full and like is not None:  # the library multiplies x by the mask
        x = x.to(torch.promote_types(x.dtype, like.dtype))
    if uses_triton(x):
        precision = vars(owner)[PLAN].options.precision if PLAN in vars(owner) else None  # None: restored since
        launch = lone_launch(members, x, precision, torch.is_grad_enabled()) if x.ndim == 2 else None
        if launch is not None and launch.features == x.shape[1]:
            y, log_det = launch(owner, x, inverse, precision)
            return y, log_det.to(x.dtype)
    elif (rows := rows_at_once(x, lambda: _widths(members, x, given))) is not None:
        return by_rows(original, x, rows, *given)
    elif not checks_all_lengths():
        return original(x, *given)
    if not all(_has_tail(side, x.shape[1], x.ndim) for side in sides):
        return original(x, *given)
    total: Tensor | None = None
    for member in reversed(members) if inverse else members:
        x, log_det = _by_tail(member, x, inverse) if isinstance(member, Side) else member(x, inverse)
        if log_det is not None:
            total = log_det if total is None else total + log_det
    return x, total


def _plan(what: str, owner: nn.Module, members: Sequence[Any], options: Options, layout: Any) -> Plan:
    """The plan of the coupling described by ``what``. It reports which code runs on this device and on a GPU."""
    like = next((p for p in owner.parameters() if p.is_floating_point()), torch.empty(0))
    sides = _sides(members)
    whole = lone_launch(members, like, options.precision)
    tail = all(_has_tail(side, side.split.features, None) for side in sides)
    words = None if whole is None else whole.in_words(like, options.precision)
    fused, here = words or ("fused tail" if tail else ORIGINAL), ORIGINAL
    known = _known(members)
    rows = (
        2 * rows_in_cache(max(size for net in known for size in net.sizes), like.element_size())
        if known
        else math.inf
    )
    if known:
        here += f", and from {rows * torch.get_num_threads()} rows on as many at a time as fit its cache"
    where = fused if like.is_cuda else f"on a GPU: {fused}; on this CPU: {here}"
    return Plan(f"{what} ({where})", layout=layout, takes_precision=whole is not None, least_rows=(rows, rows))


def _known(members: Sequence[Any]) -> list[MLP | Residual]:
    """The nets, where all are MLPs or residual networks that are worth cutting, of rows apart; else nothing."""
    nets = [side.nets or side.calls for side in _sides(members)]
    per_batch = any(isinstance(member, Affine) and member.per_batch for member in members)
    if per_batch or has_global_hook() or not all(nets):
        return []
    found = [find_mlp(net) or find_residual(net) for each in nets for net in each]
    known = [net for net in found if isinstance(net, Residual) or (net is not None and is_worth_cutting(net.sizes))]
    return known if len(known) == len(found) else []


def _widths(members: Sequence[Any], x: Tensor, given: Sequence[Any]) -> list[int | None]:
    """Values per row of the nets' layers; [None] where the rows of x may depend on each other."""
    if not all(each is None or (isinstance(each, Tensor) and each.shape[:1] == x.shape[:1]) for each in given):
        return [None]
    return [width for net in _known(members) for width in net.widths] or [None]


def _has_tail(side: Side, features: int | None, ndim: int | None) -> bool:
    """Whether the kernel computes this tail on this split; ``features`` or ``ndim`` None: for some number."""
    split = side.split
    if side.run is None or side.tail.scale_map is None or side.tail.layout == "shift" or split.kind == "gather":
        return False
    if split.kind == "alternate":
        return (features is None or features % 2 == 0) and ndim in (None, 2)
    return split.first is None or features is None or split.first == split_sizes(features)[0]


def _by_tail(side: Side, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    tail, alternate = side.tail, side.split.kind == "alternate"
    assert tail.scale_map is not None
    assert side.run is not None
    kept, _ = side.split.parts(x.shape[1], x.device)
    params, layout = side.run(x[:, kept]), tail.layout
    if isinstance(params, tuple) or layout == "raw_first" or tail.undoes:
        params, layout = tail.halves(params), "halves"
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, params.dtype))  # as the libraries' own arithmetic does
    view = x
    if alternate:  # [B, D] as two channels of D / 2 positions
        view = x.unflatten(1, (-1, 2)).mT
        params = params.unflatten(1, (2, -1)) if layout == "halves" else params.unflatten(1, (-1, 2)).mT
        layout = "halves"
    y, log_det = affine_coupling(
        view,
        params,
        tail.scale_map,
        order="shift_first" if tail.undoes else tail.order,
        layout=layout,
        moves=side.split.moves,
        inverse=inverse != tail.undoes,
        log_det=True,
    )
    assert log_det is not None
    return (y.mT.flatten(1) if alternate else y), log_det.to(dtype)
