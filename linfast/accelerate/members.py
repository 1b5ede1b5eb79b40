"""The members of a chain as couplings with MLP conditioners, and the permutations that they need between them.

``launch.py`` runs them in one launch on a GPU, ``loop.py`` in one loop on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .mlp import MLP, find_mlp
from .sides import Affine, Index, Side, Split

Layers = list[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Coupling:
    """One side of a coupling whose conditioners are MLPs.

    Args:
        side: which features move, and how.
        mlps: its nets; a net that gives both the shift and the raw value is listed once.
        kept, moved: the features that the conditioner takes and those that move, in the conditioner's order.
    """

    side: Side
    mlps: tuple[MLP, ...]
    kept: list[int]
    moved: list[int]

    @property
    def features(self) -> int:
        return len(self.kept) + len(self.moved)


Member = Coupling | Index | Affine | nn.Module
"""A member of a chain; a module runs by the library's own code."""


def coupling_of(side: Side) -> Coupling | None:
    """The side as a Coupling; None where a net is not an MLP, or the nets' sizes do not fit."""
    nets = dict.fromkeys(side.nets)
    mlps = tuple(mlp for mlp in map(find_mlp, nets) if mlp is not None)
    if not mlps or len(mlps) < len(nets) or len({(m.activation, m.constants, m.sizes) for m in mlps}) > 1:
        return None
    if any(type(t) not in (Tensor, nn.Parameter) for m in mlps for w in m.layers for t in w if t is not None):
        return None
    n_in, n_out = mlps[0].sizes[0], mlps[0].sizes[-1]
    features = n_in if side.full else n_in + n_out // side.tail.params
    kept, moved = side.split.features_of(features)
    fits = (n_in, n_out) == side.widths(len(kept), len(moved)) and side.split.features in (None, features)
    return Coupling(side, mlps, kept, moved) if fits and kept and moved else None


def members_of(found: Sequence[Any]) -> list[Member] | None:
    """An adapter's members, with each Side as a Coupling; None where a Side has no MLPs that fit."""
    members: list[Any] = [coupling_of(member) if isinstance(member, Side) else member for member in found]
    return members if members and None not in members else None


@functools.lru_cache(maxsize=1024)
def _index(features: tuple[int, ...]) -> Index:
    """One Index per permutation: a new one at every call would be copied to the GPU again and wait for it."""
    return Index([*features])


def arranged(
    members: Sequence[Member], features: int, moves_of: Callable[[Coupling, list[int]], int]
) -> Iterator[tuple[Member, int]]:
    """(member, the half that it moves: 0 or 1), and between members the permutations that they need.

    Column i holds the library's feature order[i]; ``moves_of`` (coupling, order) chooses the half.
    """
    order = identity = list(range(features))
    for member in (*members, None):
        if isinstance(member, Index):
            order = [member.index.index(feature) for feature in order]
            continue
        moves, wanted = 0, identity
        if isinstance(member, Coupling):
            moves = moves_of(member, order)
            wanted = member.kept + member.moved if moves else member.moved + member.kept
        if wanted != order:
            where = {feature: i for i, feature in enumerate(order)}
            yield _index(tuple(map(where.__getitem__, wanted))), 0
        order = wanted
        if member is not None:
            yield member, moves


def narrowed(mlp: MLP, split: Split) -> Layers:
    """The layers without the first one's columns of moved features (zeros) and the last one's rows of kept ones."""
    layers = list(mlp.layers)
    kept, moved = split.parts(mlp.sizes[0], layers[0][0].device)
    layers[0] = layers[0][0][:, kept], layers[0][1]
    weight, bias = layers[-1]
    layers[-1] = weight[moved], None if bias is None else bias[moved]
    return layers
