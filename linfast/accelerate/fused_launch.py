"""A chain's couplings, with the maps between them, as one launch of ``ops.coupling_stack``.

    x -> head -> coupling_0 -> map_0 -> ... -> coupling_{L-1} -> map_{L-1}

The kernel moves the halves in turn. A permutation that brings a coupling's kept and moved features there is one
of the maps, and neighbouring maps are one: W = W_n ... W_1, its inverse W_1^-1 ... W_n^-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..dispatch import without_autocast
from ..freeze import derived
from ..kernels.stack_configs import config_for, mode_on, target_of
from ..kernels.stack_spec import DENSE, DIAGONAL, NO_MAPS
from ..ops.activations import ACTIVATION_NAMES
from ..ops.affine_coupling import HALVES, split_sizes
from ..ops.coupling_stack import CouplingStack, run_packed, stack_spec
from ..ops.stack_weights import AffineMap, PackedStack, StackWeights, pack_stacks
from ..precision import half_dtype, resolve_precision
from .coupling_launch import arranged, takes_launch
from .coupling_side import Side
from .mlp import MLP

__all__ = ["Affine", "Coupling", "Launch", "Member", "launch_of"]


@dataclass(frozen=True, eq=False)
class Coupling:
    """One side of a coupling, recognised.

    Args:
        side: what moves, and how.
        mlps: its nets.
        kept, moved: the features that its conditioner takes and those that move, in the conditioner's order.
    """

    side: Side
    mlps: tuple[MLP, ...]
    kept: list[int]
    moved: list[int]


@dataclass(frozen=True, eq=False)
class Affine:
    """An affine map of all features; ``make`` gives it, with its inverse where that is asked for."""

    module: nn.Module
    make: Callable[[bool], AffineMap]
    diagonal: bool = False


Member = Coupling | list[int] | Affine | nn.Module
"""What a member is: a permutation as a list p, y = x[:, p]; a module runs as it is."""


@dataclass(frozen=True, eq=False)
class Launch:
    """The couplings, and the permutations and maps before the first and after each."""

    couplings: list[Coupling]
    rows: list[list[list[int] | Affine]]
    moves: str

    @property
    def features(self) -> int:
        return len(self.couplings[0].kept) + len(self.couplings[0].moved)

    def has_tile(self, like: Tensor, precision: str | None) -> bool:
        """Whether like's device, or a GPU where it is a CPU, runs it in one launch."""
        if like.dtype == torch.float64:
            return False
        n_linear, entries = len(self.couplings[0].mlps[0].layers), [entry for row in self.rows for entry in row]
        hidden = (
            max(sum(m.sizes[i] for m in c.mlps) for c in self.couplings for i in range(1, n_linear))
            if n_linear > 1
            else 1
        )
        maps = NO_MAPS
        if entries:
            maps = DIAGONAL if all(isinstance(entry, Affine) and entry.diagonal for entry in entries) else DENSE
        mode, target = mode_on(target_of(like), resolve_precision(like, precision)), target_of(like)
        return config_for(self.features, hidden, n_linear, mode, target, maps) is not None

    def __call__(self, owner: nn.Module, x: Tensor, inverse: bool, precision: str | None) -> tuple[Tensor, Tensor]:
        """(y, log_det [B])."""
        mode, half = mode_on(target_of(x), resolve_precision(x, precision)), half_dtype(x)

        def pack() -> tuple[CouplingStack, PackedStack]:
            stack = self._stack(inverse)
            weights = StackWeights(stack.layers, self.features, stack.head, inverse)
            return stack, pack_stacks([weights], mode, half)[0]

        stack, packed = derived(owner, ("chain", inverse, mode, half), pack)
        y, total = run_packed(x, packed, stack_spec(stack, packed.layout, inverse, True, mode))
        assert total is not None
        for entry in (stack.head, *[layer.map for layer in stack.layers]):
            if entry is not None and entry.log_det is not None:
                total = total - entry.log_det if inverse else total + entry.log_det
        return y, total

    def _stack(self, inverse: bool) -> CouplingStack:
        like = self.couplings[0].mlps[0].layers[0][0]
        head, *maps = without_autocast(
            like.device.type, lambda: [_folded(row, self.features, like, inverse) for row in self.rows]
        )
        layers = [
            arranged(coupling.mlps, coupling.side)._replace(map=entry)
            for coupling, entry in zip(self.couplings, maps, strict=True)
        ]
        first = self.couplings[0]
        activation, scale_map = first.mlps[0].activation, first.side.tail.scale_map
        assert scale_map is not None
        activation = activation if activation in ACTIVATION_NAMES else "relu"  # of a lone layer
        return CouplingStack(layers, activation, scale_map, first.side.tail.order, self.moves, head)


def _folded(row: list[list[int] | Affine], features: int, like: Tensor, inverse: bool) -> AffineMap | None:
    """The row as one map."""
    if not row:
        return None
    made = [entry if isinstance(entry, list) else entry.make(inverse) for entry in row]
    maps = [entry for entry in made if isinstance(entry, AffineMap)]
    log_det = sum((entry.log_abs_det() for entry in maps[1:]), start=maps[0].log_abs_det()) if maps else None
    wide = torch.promote_types(like.dtype, torch.float32)
    diagonal = len(maps) == len(made) and all(entry.weight.ndim == 1 for entry in maps)
    weight = torch.ones(features, dtype=wide, device=like.device)
    weight = weight if diagonal else weight.diag()
    undo, bias = weight, None
    for entry in made:
        if isinstance(entry, list):
            index = torch.tensor(entry, device=like.device)
            weight, undo = weight.index_select(0, index), undo.index_select(1, index)
            bias = None if bias is None else bias.index_select(0, index)
            continue
        times, back = entry.weight, entry.inverted()[0] if inverse else None
        if times.ndim == 1 and not diagonal:
            times, back = times.diag(), None if back is None else back.diag()
        moved = None if bias is None else (times * bias if diagonal else times @ bias)
        bias = entry.bias if moved is None else moved if entry.bias is None else moved + entry.bias
        weight = times * weight if diagonal else times @ weight
        if back is not None:
            undo = undo * back if diagonal else undo @ back
    return AffineMap(weight, bias, undo if inverse else None, log_det)


def launch_of(members: Sequence[Member], features: int) -> Launch | None:
    """The members as one launch; None where they are no such stack."""
    order = identity = list(range(features))
    couplings: list[Coupling] = []
    rows: list[list[list[int] | Affine]] = [[]]
    start = None
    sizes = split_sizes(features)

    def arrange(wanted: list[int]) -> None:
        nonlocal order
        if wanted != order:
            rows[-1].append([order.index(feature) for feature in wanted])
            order = wanted

    for member in members:
        if isinstance(member, list):
            order = [member.index(feature) for feature in order]
        elif isinstance(member, Affine):
            arrange(identity)
            rows[-1].append(member)
        elif isinstance(member, Coupling):
            if start is None:
                start = int(len(member.kept) >= len(member.moved) and order != member.moved + member.kept)
            moves = (start + len(couplings)) % 2
            if len(member.moved) != sizes[moves] or not takes_launch(member.side):
                return None
            arrange(member.kept + member.moved if moves else member.moved + member.kept)
            couplings.append(member)
            rows.append([])
        else:
            return None
    arrange(identity)
    kinds = {
        (c.side.tail.scale_map, c.side.tail.order, c.mlps[0].activation, len(c.mlps[0].layers)) for c in couplings
    }
    return Launch(couplings, rows, HALVES[start or 0]) if len(kinds) == 1 else None
