"""Finds the ``Formula`` of an instance of a registered class by watching its own code run.

The networks of a bare copy are replaced by random smooth functions that record every call (``Recorder``). The
forward then runs once, in float64 and in plain torch, on random x [B, C, ...]:

    input of a network           the kept features of a coupling: its columns are columns of the coupling's input
    networks with equal inputs   the shift's and the raw value's, of one coupling
    order of the calls           order of the couplings
    output                       y of the formula, for one of the orders and layouts; its columns, permuted

The inverse, the other value of each flag, and a call with a context are then compared with the formula found.
Whatever the description of the class states is taken as given. The first row's parameters are large, in two further
rows those of each network are larger, so that a clamp shows, and in the last row x is large. Rows are compared one
by one.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import plain_torch, tensor_of
from ..ops.affine_coupling import ORDERS
from ..rows import all_lengths
from ..scale_maps import ScaleMap
from .adapter import Unfit, put_inside
from .formula import Call, Formula, Path, Step, at, by_formula
from .identity import original_class, uncompiled
from .networks import LAYOUTS, Description, Net, Recorder, Seen, candidates, sizes_of
from .own_state import OwnState
from .sides import Index, Split, split_of
from .verify import bare_copy

_SEED = 20260102
_FAR = 50.0  # times x, in one more row
_CLOSE = 1e-9  # relative L2 difference in float64 of one row


@torch.inference_mode(False)
@torch.no_grad()
def find_formula(instance: nn.Module, given: Description, scale_map: ScaleMap) -> Formula:
    """The formula of the instance. Raises Unfit, with the reason, where there is none that it agrees with."""
    like = tensor_of(instance)
    device = torch.device("cpu") if like is None else like.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        all_lengths(),
        plain_torch(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(_SEED)
        reasons: list[Unfit] = []
        for nets, features in candidates(instance, given):
            found = _attempt(instance, given, scale_map, nets, features, device)
            if isinstance(found, Formula):
                return found
            reasons.append(found)
    raise min(reasons, key=lambda reason: getattr(reason, "far", 2.0))


def _attempt(instance: nn.Module, given: Description, *arguments: Any) -> Formula | Unfit:
    try:
        return _Watch(instance, given, *arguments).formula()
    except Unfit as reason:
        return reason


class _Writes(Unfit):
    """A method has effects beside its outputs."""

    far = 0.0


def _unfit(why: str, far: float) -> Unfit:
    """An Unfit; of those of all attempts, the one with the least ``far`` is reported."""
    reason = Unfit(why)
    reason.far = far  # type: ignore[attr-defined]
    return reason


def _differs(method: str, error: float) -> Unfit:
    far = f"by {error:.1e}" if error < 1 else "in every order and layout that was tried"
    return _unfit(f"its {method}, as described, differs from the original {far} on a random input", min(error, 1.0))


class _Watch:
    """One attempt, with these networks and this number of features."""

    def __init__(
        self,
        instance: nn.Module,
        given: Description,
        scale_map: ScaleMap,
        nets: list[Net],
        features: int,
        device: torch.device,
    ) -> None:
        self.given, self.scale_map, self.nets, self.device = given, scale_map, nets, device
        self.log: list[Seen] = []
        sizes = [sizes_of(i, len(nets)) for i in range(len(nets))]
        self.shape = (len(sizes[0]), features, *nets[0].positions)
        originals = [at(instance, net.path) for net in nets]
        self.copy: Any = bare_copy(instance, torch.float64, {id(uncompiled(net)) for net in originals})
        self.others = _others(instance, originals)
        recorders = [Recorder(i, net, features, self.log, sizes[i]) for i, net in enumerate(nets)]
        put_inside(self.copy, {id(at(self.copy, each.net.path)): each for each in recorders})

    def formula(self) -> Formula:
        names = [*self.given.methods]
        forward, x = names[0], self._draw()
        y, log_det = self._call(forward, x, {})
        if self.given.log_det is not None and self.given.log_det != (log_det is not None):
            returned = "no log-determinant" if log_det is None else "a log-determinant"
            raise _unfit(f"log_det is {self.given.log_det}, but the original's {forward} returns {returned}", 1.0)
        seen = [*self.log]
        if not seen:
            raise Unfit(f"the original's {forward} does not call the networks named as its conditioner")
        found = [self._replayed(x, y, log_det, seen, *how) for how in self._ways()]
        error, formula = min(found, key=lambda each: each[0])
        if not error <= _CLOSE or formula is None:
            raise _differs(forward, error)
        calls = {name: call for name in names if (call := self._compared(name, formula)) is not None}
        if not any(call.inverse or call.flag for call in calls.values()):
            raise _differs(" or ".join(name for name in names if self.given.methods[name][0]) or forward, 1.0)
        return replace(formula, calls=calls, others=self.others)

    def _ways(self) -> Iterator[tuple[str, str]]:
        """(order, layout) to try."""
        orders = [self.given.order] if self.given.order else ORDERS
        several = LAYOUTS if self.nets[0].keys is None else LAYOUTS[:2]  # two outputs: not interleaved
        return itertools.product(orders, [self.given.layout] if self.given.layout else several)

    def _draw(self) -> Tensor:
        x = torch.randn(self.shape, dtype=torch.float64)
        x[-1] *= _FAR
        return x.to(self.device)

    def _call(self, method: str, x: Tensor, named: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """(y, log_det or None) of the copy's method; the log holds the calls of the networks in it."""
        self.log.clear()
        state, given = OwnState(self.copy, [at(self.copy, net.path) for net in self.nets]), x.clone()
        try:
            found = getattr(original_class(self.copy), method)(self.copy, given, **named)
        except Exception as error:
            raise _unfit(f"the original raised {type(error).__name__} on a random input: {error}", 1.5) from error
        if not state.holds() or not torch.equal(given, x):
            raise _Writes(f"the original's {method} writes to the instance or to its input, which would be lost")
        if isinstance(found, tuple) and type(found) is not tuple:
            raise _unfit(f"the original's {method} returns a {type(found).__name__}, not a tensor or a tuple", 1.5)
        y, log_det = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise _unfit(f"the original's {method} returns no tensor of its input's shape", 1.5)
        return y, log_det

    def _replayed(
        self, x: Tensor, y: Tensor, log_det: Any, seen: Sequence[Seen], order: str, layout: str
    ) -> tuple[float, Formula | None]:
        """(error, formula) with this order and layout."""
        steps: list[Step] = []
        state, features, sized = x, x.shape[1], self.nets[0].outputs is not None or self.given.features is not None
        for group in _groups(seen):
            kept, full = _columns(group[0].kept, state)
            moved = [i for i in range(features) if i not in kept]
            moved = moved[::-1] if kept != sorted(kept) and kept == sorted(kept, reverse=True) else moved
            outputs = group[0].output.shape[1] * len(group)
            if not kept or not moved or len(group) > 2 or outputs != 2 * (features if full else len(moved)):
                return 1.0, None
            split = _split(kept, moved, features, sized)
            if self.given.moves and not steps and split.kind != "gather" and split.moves != self.given.moves:
                return 1.0, None
            steps.append(Step(tuple(self.nets[call.net].path for call in group), split, full))
            part = Formula(self.shape, sized, (steps[-1],), layout, order, self.nets[group[0].net].keys)
            state, _ = by_formula(part.members(self.copy, self.scale_map), state, False)
        index, _ = _columns(y, state)
        if len(index) < features:
            return max(_error(state, y), 2 * _CLOSE), None
        end = None if index == [*range(features)] else Index(index)
        formula = Formula(self.shape, sized, tuple(steps), layout, order, self.nets[seen[0].net].keys, end)
        return self._error(formula, x, y, log_det), formula

    def _error(self, formula: Formula, x: Tensor, y: Tensor, log_det: Any, inverse: bool = False,
               context: Sequence[Any] = ()) -> float:  # fmt: skip
        """Largest difference of the formula's result from the original's (y, log_det)."""
        ours, total = by_formula(formula.members(self.copy, self.scale_map, context), x, inverse)
        error = _error(ours, y)
        if log_det is None:
            return error
        if not isinstance(log_det, Tensor) or log_det.shape != total.shape:
            return 1.0
        return max(error, float((total - log_det).abs().max() / total.abs().max().clamp(min=1)))

    def _compared(self, name: str, formula: Formula) -> Call | None:
        """What the method computes; None where that is neither the formula nor its inverse."""
        inverse, parameters = self.given.methods[name]
        found = self._agrees(name, formula, inverse, {})
        if found is None:
            return None
        ways: list[tuple[bool, dict[str, Any]]] = [(inverse, {})]
        returns, flag = (found, found), None
        for parameter in parameters:
            if isinstance(parameter.default, bool):
                other = {parameter.name: not parameter.default}
                turned = self._agrees(name, formula, not inverse, other)
                if turned is not None:
                    returns, flag = (found, turned), parameter.name
                    ways.append((not inverse, other))
                    break
        others = (p.name for p in parameters if p.default is None)
        passed = (p for p in others if all(self._agrees(name, formula, *way, p) is not None for way in ways))
        return Call(inverse, returns, flag, next(passed, None))

    def _agrees(
        self, name: str, formula: Formula, inverse: bool, flag: Mapping[str, Any], argument: str | None = None
    ) -> bool | None:
        """Whether the method returns a log-determinant too; None where it differs from the formula.

        ``argument``: a context, which every network must get as it is; else the result is None too.
        """
        x, named = self._draw(), dict(flag)
        if argument is not None:
            named[argument] = torch.randn(self.shape[0], 2, dtype=torch.float64).to(self.device)
        context = [] if argument is None else [named[argument]]
        try:
            y, log_det = self._call(name, x, named)
        except Unfit as reason:
            if isinstance(reason, _Writes) and argument is None:
                raise
            return None
        if argument is not None and not all([*map(id, call.context)] == [*map(id, context)] for call in self.log):
            return None
        close = self._error(formula, x, y, log_det, inverse, context) <= _CLOSE
        return log_det is not None if close else None


def _others(instance: nn.Module, nets: Sequence[nn.Module]) -> tuple[Path, ...]:
    """Paths of the submodules that are neither lists nor part of a network."""
    inside = {id(module) for net in nets for module in net.modules()}
    return tuple(
        tuple(path.split("."))
        for path, module in instance.named_modules()
        if path and id(module) not in inside and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    )


def _groups(seen: Sequence[Seen]) -> list[list[Seen]]:
    """The calls of each coupling: those that follow one another with one input; a repeated call counts once."""
    groups: list[list[Seen]] = []
    for call in seen:
        if not groups or not torch.equal(groups[-1][0].kept, call.kept):
            groups.append([call])
        elif all(call.net != other.net for other in groups[-1]):
            groups[-1].append(call)
    return groups


def _columns(given: Tensor, state: Tensor) -> tuple[list[int], bool]:
    """(columns of the state that are the given columns, whether the others among the given ones are zeros)."""
    size = _norms(state)
    found, zeros = [], 0
    for column in given.unbind(1):
        if not column.any():
            zeros += 1
            continue
        gap = _norms(state - column.unsqueeze(1))
        best = int((gap / size).argmin())
        if not gap[best] <= _CLOSE * size[best] or best in found:
            return [], False
        found.append(best)
    full = zeros > 0 and given.shape[1] == state.shape[1]
    return (found, full) if full or not zeros else ([], False)


def _norms(state: Tensor) -> Tensor:
    """The L2 norm of each column."""
    return state.transpose(0, 1).flatten(1).norm(dim=1)


def _split(kept: list[int], moved: list[int], features: int, sized: bool) -> Split:
    if kept != sorted(kept):
        return Split("gather", features=features, indices=(kept, moved))
    passes = torch.zeros(features, dtype=torch.bool)
    passes[kept] = True
    split = split_of(passes)
    return split if sized or split.kind == "gather" else replace(split, first=None, features=None)


def _error(ours: Tensor, theirs: Tensor) -> float:
    """The largest relative L2 difference of a row."""
    gap, size = ((t.flatten(1)).norm(dim=1) for t in (ours - theirs, theirs))
    error = float((gap / size).max())
    return error if error == error else 1.0
