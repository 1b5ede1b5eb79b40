"""Couplings with MLP conditioners, and the maps between them, as one call of ``ops.coupling_stack``.

    x -> head -> coupling_0 -> map_0 -> ... -> coupling_{L-1} -> map_{L-1}

The kernel moves the two halves alternately. Where a coupling moves other features, a permutation brings them to the
half. Permutations and maps that follow one another are multiplied into one. A single coupling y = m / s + t, where
the kernel's scale is s, is the inverse of (m - t) s: it runs as the kernel's inverse, with the shift negated.

Weights are brought into the op's form at every call, and kept only inside ``lf.freeze``. [raw | shift] rows are
swapped, the rows of a net that gives shift and raw at once are used twice, an additive coupling gets raw values of
zero, two nets become one block-diagonal net, and columns of masked features are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import has_global_hook, without_autocast
from ..freeze import derived
from ..kernels.stack_configs import LayersConfig, StackEntry, mode_on, target_of, tiles_for
from ..kernels.stack_spec import DENSE, DIAGONAL, NO_MAPS
from ..ops.activations import ACTIVATION_NAMES
from ..ops.affine_coupling import HALVES, LAYOUTS, split_sizes
from ..ops.coupling_stack import run_packed, stack_spec
from ..ops.stack_weights import AffineMap, CouplingLayer, CouplingStack, PackedStack, StackWeights, pack_stacks
from ..precision import half_dtype, resolve_precision
from .members import Coupling, Layers, Member, arranged, members_of, narrowed
from .sides import Affine, Index, Side

Row = list[Index | Affine]


@dataclass(frozen=True, eq=False)
class Launch:
    """L couplings, with permutations and affine maps before the first and after each, as one launch.

    Args:
        couplings, rows: L couplings; L + 1 lists of permutations and maps, each applied in order.
        moves: the half that the first coupling moves, "first" or "second".
        ends: permutations that run outside the launch, before and after it.
    """

    couplings: list[Coupling]
    rows: list[Row]
    moves: str
    ends: tuple[Row, Row] = ([], [])

    @property
    def features(self) -> int:
        return self.couplings[0].features

    def tiles(
        self, like: Tensor, precision: str | None, gradients: bool = False
    ) -> StackEntry | LayersConfig | None:
        """The tiles for this launch on like's device, or None; where that is a CPU, on a GPU."""
        if like.dtype == torch.float64:
            return None
        n_linear, entries = len(self.couplings[0].mlps[0].layers), [entry for row in self.rows for entry in row]
        sizes = [[mlp.sizes[1:-1] for mlp in coupling.mlps] for coupling in self.couplings]
        widths = [sum(layer) for of_nets in sizes for layer in zip(*of_nets, strict=True)]
        diagonal = all(isinstance(entry, Affine) and entry.diagonal for entry in entries)
        maps = NO_MAPS if not entries else DIAGONAL if diagonal else DENSE
        mode, target = mode_on(target_of(like), resolve_precision(like, precision)), target_of(like)
        return tiles_for(self.features, max((1, *widths)), n_linear, mode, target, maps, gradients)

    def in_words(self, like: Tensor, precision: str | None) -> str | None:
        """What runs where ``tiles`` is not None."""
        tiles = self.tiles(like, precision)
        if tiles is None:
            return None
        return "one launch" if isinstance(tiles, StackEntry) else "one launch per linear layer"

    def __call__(self, owner: nn.Module, x: Tensor, inverse: bool, precision: str | None) -> tuple[Tensor, Tensor]:
        """(y, log_det [B]) of x [B, D], or of the inverse."""
        mode, half = mode_on(target_of(x), resolve_precision(x, precision)), half_dtype(x)
        first, last = self.ends[::-1] if inverse else self.ends
        for index in first:
            x = index(x, inverse)[0]
        undone = inverse != self.couplings[0].side.tail.undoes

        maps_undone = undone and any(self.rows)  # without maps both directions share one packing

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
        activation = activation if activation in ACTIVATION_NAMES else "relu"  # a single layer has none
        order = "shift_first" if tail.undoes else tail.order
        return CouplingStack(layers, activation, tail.scale_map, order, self.moves, head)


def _folded(row: Row, features: int, like: Tensor, inverse: bool) -> AffineMap | None:
    """The row as one map, W = W_n ... W_1 and its inverse W_1^-1 ... W_n^-1; None for an empty row."""
    if not row:
        return None
    wide = torch.promote_types(like.dtype, torch.float32)
    made = [entry if isinstance(entry, Index) else _cast(entry.make(inverse), wide) for entry in row]
    maps = [entry for entry in made if isinstance(entry, AffineMap)]
    log_dets = [
        found.log_abs_det()
        for entry, found in zip(row, made, strict=True)
        if isinstance(found, AffineMap) and not (isinstance(entry, Affine) and entry.orthogonal)
    ]
    diagonal = len(maps) == len(made) and all(entry.weight.ndim == 1 for entry in maps)
    times = torch.mul if diagonal else torch.matmul

    def full(weight: Tensor) -> Tensor:
        return weight if diagonal or weight.ndim == 2 else weight.diag()

    weight = undo = full(torch.ones(features, dtype=wide, device=like.device))
    bias: Tensor | None = None
    undo_bias: Tensor | None = None
    for entry in made:
        if isinstance(entry, Index):
            index, _ = entry.on(like.device)
            weight, undo = weight.index_select(0, index), undo.index_select(1, index)
            bias = None if bias is None else bias.index_select(0, index)
            continue
        matrix = full(entry.weight)
        bias, weight = _after(matrix, bias, entry.bias, times), times(matrix, weight)
        if inverse:
            back, back_bias = entry.inverted()
            undo_bias, undo = _after(undo, back_bias, undo_bias, times), times(undo, full(back))
    log_det = sum(log_dets[1:], start=log_dets[0]) if log_dets else None
    return AffineMap(weight, bias, undo if inverse else None, log_det, undo_bias)


def _cast(entry: AffineMap, dtype: torch.dtype) -> AffineMap:
    given = {name: tensor.to(dtype) for name, tensor in entry._asdict().items() if tensor is not None}
    return entry._replace(**given)


def _after(
    weight: Tensor, bias: Tensor | None, added: Tensor | None, times: Callable[..., Tensor]
) -> Tensor | None:
    """weight bias + added, where None is zero."""
    if bias is None:
        return added
    return times(weight, bias) if added is None else times(weight, bias) + added


def launch_of(members: Sequence[Member]) -> Launch | None:
    """The members, which have the same number of features, as one launch; None where the op cannot run them."""
    couplings = [member for member in members if isinstance(member, Coupling)]
    features = couplings[0].features
    rows: list[Row] = [[]]
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
    ends: tuple[Row, Row] = ([], [])
    if not any(rows[1:-1]) and all(isinstance(entry, Index) for entry in rows[0] + rows[-1]):
        ends, rows = (rows[0], rows[-1]), [[] for _ in rows]
    return Launch(couplings, rows, HALVES[turns[0]], ends)


def lone_launch(
    found: Sequence[Any], like: Tensor, precision: str | None, gradients: bool = False
) -> Launch | None:
    """The members of a coupling outside a chain as one launch; None where no tile fits (``Launch.tiles``)."""
    members = None if has_global_hook() else members_of(found)
    launch = None if members is None else launch_of(members)
    return launch if launch is not None and launch.tiles(like, precision, gradients) is not None else None


def _arranged(coupling: Coupling) -> CouplingLayer:
    """The coupling as one layer of the op."""
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
    """The nets' last layer with its rows in the op's order, times the factor."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    given = [tensor[None] for tensor in (weight, bias)]
    twice = side.tail.layout == "pair" and nets == 1
    weight, bias = (side.tail.halves((tensor, tensor) if twice else tensor)[0] for tensor in given)
    return (weight, bias) if side.factor == 1 else (side.factor * weight, side.factor * bias)


def _side_by_side(one: Layers, two: Layers) -> Layers:
    """One net that computes [one(kept) | two(kept)]."""
    layers: Layers = []
    for (a, a_bias), (b, b_bias) in zip(one, two, strict=True):
        weight = torch.block_diag(a, b) if layers else torch.cat((a, b))
        biases = [w.new_zeros(len(w)) if bias is None else bias for w, bias in ((a, a_bias), (b, b_bias))]
        layers.append((weight, torch.cat(biases)))
    return layers
