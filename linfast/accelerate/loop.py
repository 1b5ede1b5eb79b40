"""The members of a chain in one loop of plain torch, ops.plain_couplings, for CPUs.

    y = f_n( ... f_1(x))     f_i a coupling with MLP conditioners, an affine map, a permutation, or any other member

Affine maps are made from their parameters once per call, also where a long batch is cut into parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.undo import Outputs
from ..ops.activations import ACTIVATIONS
from ..ops.plain_couplings import Map, PlainCoupling, run_couplings
from ..ops.stack_weights import AffineMap
from .members import Coupling, Member, arranged, narrowed
from .sides import Affine, Index

Run = Callable[[Any, Tensor, Mapping[str, Any], bool], Outputs]

NO_CONTEXT: Mapping[str, Any] = {"context": None}


@dataclass(frozen=True, eq=False)
class Loop:
    """Couplings and other members, run by ops.plain_couplings.

    Args:
        members: affine maps without a module; of other members functions that return them as the op takes them.
        first: the length of the first half.
    """

    members: list[Affine | Callable[[], PlainCoupling | Map]]
    first: int

    @property
    def permutations(self) -> int:
        """How many of the members are permutations."""
        return sum(not isinstance(member, Affine) and isinstance(member(), Index) for member in self.members)

    def made(self, inverse: bool, scales: list[Tensor], log_det: bool) -> Callable[[Tensor], Outputs]:
        """x -> (y, log_det [B] or None) with the current parameters, or the inverse.

        The log-determinants of maps that do not give them are left out: their diagonals are added to ``scales``.
        """
        entries: list[PlainCoupling | Map] = []
        known: dict[Affine | None, AffineMap] = {}
        for member in self.members:
            if isinstance(member, Affine):
                made = _turned_back(known.get(member.inverse_of)) or member.make(inverse)
                known[member] = made
                if member.diagonal and made.log_det is None:
                    scales.append(made.weight)
                entries.append(partial(member.apply, made))
            else:
                entries.append(member())

        return lambda x: run_couplings(x, entries, None, inverse, log_det, self.first)


def _turned_back(made: AffineMap | None) -> AffineMap | None:
    """The inverse of an orthogonal map."""
    return None if made is None or made.inverse is None else AffineMap(made.inverse, None, made.weight)


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


def loops_of(members: Sequence[Member], features: int, run: Run | None) -> list[Loop]:
    """All members in order: one loop, and a further one wherever the halves have other lengths."""
    loops: list[Loop] = []
    waiting: list[Any] = []  # for the first coupling
    for member, moves in arranged(members, features, lambda c, order: int(order != c.moved + c.kept)):
        if isinstance(member, Coupling):
            first = len(member.kept if moves else member.moved)
            if not loops or loops[-1].first != first:
                loops.append(Loop(waiting, first))
                waiting = []
        found: Any = member
        if isinstance(member, Coupling):
            found = _plain(member, moves)
        elif isinstance(member, Index):
            found = _always(member)
        elif not isinstance(member, Affine) or member.module is not None:
            found = _always(_own(member.module if isinstance(member, Affine) else member, run))
        (loops[-1].members if loops else waiting).append(found)
    return loops


def _own(module: nn.Module | None, run: Any) -> Map:
    """A step of the loop that runs a member by the library's own code."""
    return lambda x, inverse: run(module, x, NO_CONTEXT, inverse)


def _plain(coupling: Coupling, moves: int) -> Callable[[], PlainCoupling]:
    """A function that returns the coupling with its current parameters, as ops.plain_couplings takes it."""
    side, tail, mlp = coupling.side, coupling.side.tail, coupling.mlps[0]
    activation = mlp.parts[1] if len(mlp.parts) > 1 else torch.relu
    if not mlp.constants:
        activation = ACTIVATIONS.get(mlp.activation, activation)

    def build() -> PlainCoupling:
        nets = [narrowed(mlp, side.split) if side.full else mlp.layers for mlp in coupling.mlps]
        (weights, biases), *others = [([w for w, _ in net], [b for _, b in net]) for net in nets]
        raw_net = [(weights, biases), *others][-1] if tail.layout == "pair" else None
        return PlainCoupling(
            weights, biases, activation, tail.log_scale, tail.order == "scale_first", tail.layout == "interleaved",
            moves, tail.layout == "raw_first", raw_net, side.factor, tail.keeps_volume,
        )  # fmt: skip

    if side.full:  # its columns are selected at each call
        return build
    return _always(build())
