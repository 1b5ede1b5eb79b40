"""Couplings with MLP conditioners, and the maps between them, as one launch of ``ops.coupling_stack``.

    x -> head -> coupling_0 -> map_0 -> ... -> coupling_{L-1} -> map_{L-1}

The kernel moves the halves in turn. A permutation that brings a coupling's kept and moved features there is one
of the maps, and neighbouring maps are one. A single coupling with m / s + t, given s, undoes (m - t) s: it is the
kernel's inverse with the shift negated.

Weights are brought to the op's form at every call, and kept only inside ``lf.freeze``: [raw | shift] rows are
swapped, one net's rows used twice, a shift without a raw value is given zeros, two nets are laid side by side and
masked columns left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import has_global_hook, without_autocast
from ..freeze import derived
from ..kernels.stack_configs import config_for, mode_on, target_of
from ..kernels.stack_spec import DENSE, DIAGONAL, NO_MAPS
from ..ops.activations import ACTIVATION_NAMES
from ..ops.affine_coupling import HALVES, LAYOUTS, split_sizes
from ..ops.coupling_stack import run_packed, stack_spec
from ..ops.stack_weights import AffineMap, CouplingLayer, CouplingStack, PackedStack, StackWeights, pack_stacks
from ..precision import half_dtype, resolve_precision
from .mlp import MLP, find_mlp
from .sides import Affine, Index, Side, Split

Layers = list[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Coupling:
    """One side of a coupling whose conditioners are MLPs.

    Args:
        side: what moves, and how.
        mlps: its nets; one that gives both the shift and the raw value is there once.
        kept, moved: the features that its conditioner takes and those that move, in the conditioner's order.
    """

    side: Side
    mlps: tuple[MLP, ...]
    kept: list[int]
    moved: list[int]

    @property
    def features(self) -> int:
        return len(self.kept) + len(self.moved)


@functools.lru_cache(maxsize=1024)
def _index(features: tuple[int, ...]) -> Index:
    """One object for each permutation: a launch is made at every call, and a GPU is waited for once."""
    return Index([*features])


Member = Coupling | Index | Affine | nn.Module
"""What a member of a chain is; a module runs as it is."""


def coupling_of(side: Side) -> Coupling | None:
    """The side where its nets are MLPs, and all of their sizes fit."""
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


@dataclass(frozen=True, eq=False)
class Launch:
    """The couplings, and the permutations and maps before the first and after each.

    Args:
        couplings, rows: as above; a row's entries follow one another.
        moves: the half that the first coupling moves.
        ends: permutations that run outside the launch, before and after it.
    """

    couplings: list[Coupling]
    rows: list[list[Index | Affine]]
    moves: str
    ends: tuple[list[Index | Affine], list[Index | Affine]] = ([], [])

    @property
    def features(self) -> int:
        return self.couplings[0].features

    def has_tile(self, like: Tensor, precision: str | None) -> bool:
        """Whether like's device, or a GPU where it is a CPU, runs it in one launch."""
        if like.dtype == torch.float64:
            return False
        n_linear, entries = len(self.couplings[0].mlps[0].layers), [entry for row in self.rows for entry in row]
        sizes = [[mlp.sizes[1:-1] for mlp in coupling.mlps] for coupling in self.couplings]
        widths = [sum(layer) for of_nets in sizes for layer in zip(*of_nets, strict=True)]
        diagonal = all(isinstance(entry, Affine) and entry.module is None for entry in entries)
        maps = NO_MAPS if not entries else DIAGONAL if diagonal else DENSE
        mode, target = mode_on(target_of(like), resolve_precision(like, precision)), target_of(like)
        return config_for(self.features, max((1, *widths)), n_linear, mode, target, maps) is not None

    def __call__(self, owner: nn.Module, x: Tensor, inverse: bool, precision: str | None) -> tuple[Tensor, Tensor]:
        """(y, log_det [B])."""
        mode, half = mode_on(target_of(x), resolve_precision(x, precision)), half_dtype(x)
        first, last = self.ends[::-1] if inverse else self.ends
        for index in first:
            x = index(x, inverse)[0]
        undone = inverse != self.couplings[0].side.tail.undoes

        maps_undone = undone and any(self.rows)  # couplings are packed alike for both directions

        def pack() -> tuple[CouplingStack, PackedStack]:
            stack = self._stack(maps_undone)
            weights = StackWeights(stack.layers, self.features, stack.head, maps_undone)
            return stack, pack_stacks([weights], mode, half)[0]

        stack, packed = derived(owner, ("one launch", maps_undone, mode, half), pack)
        y, total = run_packed(x, packed, stack_spec(stack, packed.layout, undone, True, mode))
        assert total is not None
        for entry in (stack.head, *[layer.map for layer in stack.layers]):
            if entry is not None and entry.log_det is not None:
                total = total - entry.log_det if inverse else total + entry.log_det
        for index in last:
            y = index(y, inverse)[0]
        return y, total

    def _stack(self, inverse: bool) -> CouplingStack:
        like = self.couplings[0].mlps[0].layers[0][0]
        head, *maps = without_autocast(
            like.device.type, lambda: [_folded(row, self.features, like, inverse) for row in self.rows]
        )
        layers = [
            _arranged(coupling)._replace(map=entry) for coupling, entry in zip(self.couplings, maps, strict=True)
        ]
        activation, tail = self.couplings[0].mlps[0].activation, self.couplings[0].side.tail
        assert tail.scale_map is not None
        activation = activation if activation in ACTIVATION_NAMES else "relu"  # of a lone layer
        order = "shift_first" if tail.undoes else tail.order
        return CouplingStack(layers, activation, tail.scale_map, order, self.moves, head)


def _folded(row: list[Index | Affine], features: int, like: Tensor, inverse: bool) -> AffineMap | None:
    """The row as one map: W = W_n ... W_1, its inverse W_1^-1 ... W_n^-1."""
    if not row:
        return None
    made = [entry if isinstance(entry, Index) else entry.make(inverse) for entry in row]
    maps = [entry for entry in made if isinstance(entry, AffineMap)]
    log_det = sum((entry.log_abs_det() for entry in maps[1:]), start=maps[0].log_abs_det()) if maps else None
    diagonal = len(maps) == len(made) and all(entry.weight.ndim == 1 for entry in maps)
    times = torch.mul if diagonal else torch.matmul

    def full(weight: Tensor) -> Tensor:
        return weight if diagonal or weight.ndim == 2 else weight.diag()

    wide = torch.promote_types(like.dtype, torch.float32)
    weight = undo = full(torch.ones(features, dtype=wide, device=like.device))
    bias: Tensor | None = None
    for entry in made:
        if isinstance(entry, Index):
            index, _ = entry.on(like.device)
            weight, undo = weight.index_select(0, index), undo.index_select(1, index)
            bias = None if bias is None else bias.index_select(0, index)
            continue
        assert entry.bias is not None
        bias = entry.bias if bias is None else times(full(entry.weight), bias) + entry.bias
        weight = times(full(entry.weight), weight)
        if inverse:
            undo = times(undo, full(entry.inverted()[0]))
    return AffineMap(weight, bias, undo if inverse else None, log_det)


def arranged(
    members: Sequence[Member], features: int, moves_of: Callable[[Coupling, list[int]], int]
) -> Iterator[tuple[Member, int]]:
    """(member, which half moves) with the permutations that bring the features to where each member takes them.

    x as it stands is x[:, order] as the library has it; ``moves_of`` gives the half of (coupling, order).
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


def launch_of(members: Sequence[Member]) -> Launch | None:
    """The members, of one width, as one launch; None where they are no such stack."""
    couplings = [member for member in members if isinstance(member, Coupling)]
    features = couplings[0].features
    rows: list[list[Index | Affine]] = [[]]
    turns: list[int] = []

    def in_turn(coupling: Coupling, order: list[int]) -> int:
        kept, moved = coupling.kept, coupling.moved
        turns.append(1 - turns[-1] if turns else int(len(kept) >= len(moved) and order != moved + kept))
        return turns[-1]

    for member, moves in arranged(members, features, in_turn):
        if isinstance(member, (Index, Affine)):
            rows[-1].append(member)
        elif isinstance(member, Coupling) and len(member.moved) == split_sizes(features)[moves]:
            rows.append([])
        else:
            return None
    parts = [(coupling.side.tail, coupling.mlps[0]) for coupling in couplings]
    usual = ((), ("none",))  # constants of the activations that the op has
    kinds = {(t.scale_map, t.order, m.activation, m.constants in usual, len(m.layers)) for t, m in parts}
    if len(kinds) > 1 or (len(members) > 1 and any(tail.undoes for tail, _ in parts)):
        return None
    tail, mlp = parts[0]
    known = mlp.constants in usual and (mlp.activation in ACTIVATION_NAMES or len(mlp.layers) == 1)
    if tail.scale_map is None or not known:  # the op has no such formula or conditioner
        return None
    ends: tuple[list[Index | Affine], list[Index | Affine]] = ([], [])
    if not any(rows[1:-1]) and all(isinstance(entry, Index) for entry in rows[0] + rows[-1]):
        ends, rows = (rows[0], rows[-1]), [[] for _ in rows]
    return Launch(couplings, rows, HALVES[turns[0]], ends)


def members_of(found: Sequence[Any]) -> list[Member] | None:
    """An adapter's sides as couplings, and what is beside them; None where a side is no coupling with MLPs."""
    members: list[Any] = [coupling_of(member) if isinstance(member, Side) else member for member in found]
    return members if members and None not in members else None


def lone_launch(found: Sequence[Any], like: Tensor, precision: str | None) -> Launch | None:
    """A coupling's sides and maps in one launch, where like's device, or a GPU where it is a CPU, has a tile."""
    members = None if has_global_hook() else members_of(found)
    launch = None if members is None else launch_of(members)
    return launch if launch is not None and launch.has_tile(like, precision) else None


# The nets as the op's layers.


def _arranged(coupling: Coupling) -> CouplingLayer:
    """The nets as one layer of the op."""
    side, tail = coupling.side, coupling.side.tail
    nets = [narrowed(mlp, side.split) if side.full else list(mlp.layers) for mlp in coupling.mlps]
    layers = _side_by_side(*nets) if len(nets) == 2 else nets[0]
    as_given = tail.layout in LAYOUTS or len(nets) == 2
    layout = "interleaved" if tail.layout == "interleaved" else "halves"
    if not as_given or tail.undoes or side.factor != 1:
        layers[-1] = _rows(*layers[-1], side, len(nets))
        layout = "halves"
    return CouplingLayer([weight for weight, _ in layers], [bias for _, bias in layers], layout)


def _rows(weight: Tensor, bias: Tensor | None, side: Side, nets: int) -> tuple[Tensor, Tensor]:
    """The last layer with its rows as the op has them, times the factor."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    given = [tensor[None] for tensor in (weight, bias)]
    twice = side.tail.layout == "pair" and nets == 1
    weight, bias = (side.tail.halves((tensor, tensor) if twice else tensor)[0] for tensor in given)
    return (weight, bias) if side.factor == 1 else (side.factor * weight, side.factor * bias)


def _side_by_side(one: Layers, two: Layers) -> Layers:
    """One net that gives [one(k) | two(k)]."""
    layers: Layers = []
    for (a, a_bias), (b, b_bias) in zip(one, two, strict=True):
        weight = torch.block_diag(a, b) if layers else torch.cat((a, b))
        biases = [w.new_zeros(len(w)) if bias is None else bias for w, bias in ((a, a_bias), (b, b_bias))]
        layers.append((weight, torch.cat(biases)))
    return layers


def narrowed(mlp: MLP, split: Split) -> Layers:
    """Without the columns of what is zero and the rows of what is not looked at."""
    layers = list(mlp.layers)
    kept, moved = split.parts(mlp.sizes[0], layers[0][0].device)
    layers[0] = layers[0][0][:, kept], layers[0][1]
    weight, bias = layers[-1]
    layers[-1] = weight[moved], None if bias is None else bias[moved]
    return layers
