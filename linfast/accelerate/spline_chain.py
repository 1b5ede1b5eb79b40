"""A chain of spline couplings as a whole: what does not depend on x is computed at once, for all members.

    context     the products of all conditioners' weights with it are one product, cut into views
    LU maps     all weights in one pass (``lu_maps.py``)
    order       a permutation, and the order [kept | moved] in which a coupling takes its features, are rows and
                columns of the LU map beside them

Other members run by the library's own code. Parameters are read at each call; the members are recognised again
where something was replaced (``fused.Together``). On a CPU a long batch goes through the whole chain in parts of as
many rows as fit the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import autocast_dtype, cat, has_global_hook, is_transformed, uses_triton
from ..freeze import derived
from ..ops.residual_network import Terms, all_context_terms, counted_at_once
from ..rows import by_rows, one_row, rows_at_once
from .adapter import Options, Plan, Unfit, adapter_for
from .fused import Together, like_of, recognise
from .identity import changed_method, is_hooked
from .loop import NO_CONTEXT, Run
from .lu_maps import LUMap, LUMaps
from .maps import Flat, Maps
from .mlp import MLP, find_mlp
from .residual import Residual, find_residual
from .sides import Index, Split, Triangular
from .splines import couple, in_planes

_FEWEST = 2  # couplings


@dataclass(frozen=True, eq=False)
class _Spline:
    """A coupling whose conditioner is known; its columns are [kept | moved]."""

    transform: Any
    kept: list[int]
    moved: list[int]
    net: Residual | MLP

    @property
    def features(self) -> int:
        return len(self.kept) + len(self.moved)

    @property
    def widths(self) -> Sequence[int | None]:
        return self.net.widths

    def takes(self, x: Tensor, context: Any) -> bool:
        """Whether the library's code accepts these, without an error."""
        if isinstance(self.net, Residual):
            return self.net.takes(x[:, : len(self.kept)], context)
        return context is None

    def __call__(self, x: Tensor, context: Any, terms: Terms | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """(y, log_det [B]) of x [B, D]."""
        of = self.net
        net = functools.partial(of, terms=terms) if isinstance(of, Residual) else functools.partial(in_planes, of)
        given, value = x.split((len(self.kept), len(self.moved)), 1)
        kept, moved, log_det = couple(self.transform, net, given, value, inverse, context)
        return cat((kept, moved), 1), log_det


def _spline(transform: Any, layout: Split) -> _Spline:
    """The coupling; raises Unfit where its conditioner is not known, or its spline may leave it to the library."""
    net = find_residual(transform.transform_net) or find_mlp(transform.transform_net)
    kept, moved = layout.features_of(transform.features)
    if net is None or not kept or not isinstance(transform.tails, str) or isinstance(transform.tail_bound, Tensor):
        raise Unfit("its conditioner is not known, or its spline has no tails")
    n_out = net.network.last[0].shape[0] if isinstance(net, Residual) else net.sizes[-1]
    if n_out != len(moved) * transform._transform_dim_multiplier():
        raise Unfit("its conditioner does not fit its spline")
    return _Spline(transform, kept, moved, net)


_Step = LUMap | Index | _Spline | nn.Module
"""A module runs by the library's own code."""


class SplineChain(Together):
    """The members of a chain of spline couplings. Raises Unfit where fewer than two are known."""

    # In float32 the roundings of 30 couplings with batch norm, on a few rows, are as large as a small mistake.
    compared_in = torch.float64

    def __init__(self, chain: nn.Module, flat: Flat, run: Run | None, maps: Maps, options: Options) -> None:
        super().__init__(chain, flat, run, maps, options)
        members, _ = self._find(chain, _recognised)
        self._run = run
        self.couplings = couplings = [member for member in members if isinstance(member, _Spline)]
        sizes = {coupling.features for coupling in couplings}
        dtypes = {weight.dtype for coupling in couplings for weight in coupling.transform.parameters()}
        if len(couplings) < _FEWEST or len(sizes) > 1 or len(dtypes) > 1 or run is None:
            raise Unfit("fewer than two couplings of it are spline couplings of one width")
        (self.features,), self.first = sizes, couplings[0].transform
        self.like = like_of(self.first)
        self._steps = [*_arranged(members, self.features)]
        self._maps = LUMaps([step for step in self._steps if isinstance(step, LUMap)], self.features)
        self._own = [step for step in self._steps if isinstance(step, nn.Module)]
        widths = [width for coupling in couplings for width in coupling.widths]
        self._widths: list[int | None] = [self.features, *widths]

    def plan(self, chain: nn.Module) -> Plan:
        return Plan(f"{len(self.couplings)} spline couplings in one loop", fused=self, vectors=self.features)

    def takes(self, x: Any, context: Mapping[str, Any] = NO_CONTEXT) -> bool:
        if not super().takes(x) or autocast_dtype(x.device.type) is not None or is_transformed():
            return False
        return all(coupling.takes(x, context.get("context")) for coupling in self.couplings)

    def __call__(
        self, chain: nn.Module, x: Tensor, inverse: bool, context: Mapping[str, Any] = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        maps, log_det = derived(chain, ("maps", inverse), functools.partial(self._maps, x, inverse))
        given: Any = context.get("context")
        given = given if given is None else one_row(given)
        terms: Sequence[Terms | None] = [None] * len(self.couplings)
        # All terms at once take as much memory as a training step keeps of them anyway.
        if given is not None and (given.shape[0] == 1 or (torch.is_grad_enabled() and uses_triton(x))):
            terms = all_context_terms(given, [c.net.network for c in self.couplings if isinstance(c.net, Residual)])
        work = functools.partial(self._steps_on, maps, terms, inverse)
        rows = rows_at_once(x, lambda: self._widths if self._arguments[2].rows_apart(self._own) else [None])
        if rows is None or (terms[0] is not None and given.shape[0] > 1):
            with counted_at_once():
                y, total = work(x, context.get("context"))
        else:
            y, total = by_rows(work, x, rows, context.get("context"))
        return y, total if log_det is None else total + log_det

    def _steps_on(
        self, maps: Sequence[tuple[Tensor, Tensor]], terms: Sequence[Terms | None], inverse: bool, x: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(y, the couplings' log_det [B]) of rows x."""
        log_dets: list[Tensor] = []
        of_maps, of_couplings = iter(maps[::-1] if inverse else maps), iter(terms[::-1] if inverse else terms)
        for step in reversed(self._steps) if inverse else self._steps:
            log_det = None
            if isinstance(step, Index):
                x = step(x, inverse)[0]
            elif isinstance(step, LUMap):
                weight, bias = next(of_maps)
                x = torch.addmm(bias, x, weight.t())
            elif isinstance(step, _Spline):
                x, log_det = step(x, context, next(of_couplings), inverse)
            else:
                assert self._run is not None
                x, log_det = self._run(step, x, {"context": context}, inverse)
            log_dets += [] if log_det is None else [log_det]
        return x, torch.stack(log_dets).sum(0)


def _recognised(module: nn.Module, maps: Maps) -> tuple[Sequence[Any], Iterable[Tensor]] | None:
    """The module as a _Spline, Index or Triangular: see ``fused.Recognise``."""
    adapter = adapter_for(module)
    if adapter is None:
        found = recognise(module, maps)
        return found if found is not None and isinstance(found[0][0], Index | Triangular) else None
    inside = [module, *adapter.inner(module)]
    if not adapter.is_spline or has_global_hook() or any(map(is_hooked, inside)):
        return None
    if changed_method(module, (*adapter.methods, *adapter.assumes)) is not None:
        return None
    try:
        layout = adapter.layout(module)
        return [_spline(module, layout)], adapter.masks_of(module, layout)
    except Unfit:
        return None


def _arranged(members: Sequence[Any], features: int) -> Iterator[_Step]:
    """The steps, each coupling on columns [kept | moved]; a permutation joins the map before it, where one is."""
    identity = [*range(features)]
    order, last = identity, None  # column i holds the library's feature order[i]; the map that it comes from
    for member in (*members, None):
        if isinstance(member, Index):
            order = [member.index.index(feature) for feature in order]
            continue
        if isinstance(member, Triangular):
            last, order = LUMap(member.module, identity, order), identity
            yield last
            continue
        wanted = [*member.kept, *member.moved] if isinstance(member, _Spline) else identity
        if wanted != order:
            index = [order.index(feature) for feature in wanted]
            if last is None:
                yield Index(index)
            else:
                last.rows = index
        order, last = wanted, None
        if member is not None:
            yield member
