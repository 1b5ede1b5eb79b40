"""Formula: what ``watch.py`` found out about an instance of a registered class of couplings, and how it runs.

    steps      couplings in the order in which the forward runs them: which features move, and their networks
    end        the permutation of the features after the last coupling, if any
    calls      the replaced methods: the direction that each computes, its flag, and what it returns

Networks are named by their paths in the instance and read again at every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..scale_maps import ScaleMap
from .adapter import Stub
from .mlp import find_halved_mlp
from .sides import Index, Params, Side, Split, Tail

Path = tuple[str, ...]
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Parameter:
    """An argument of a method after x; ``default`` is None for one without a default."""

    name: str
    default: Any = None


@dataclass(frozen=True)
class Call:
    """One replaced method.

    Args:
        inverse: whether it computes the inverse.
        log_det: whether it returns (y, log_det [B]), else y; of the flag's default and of its other value.
        flag: name of the bool argument whose other value turns the direction round; None without one.
        context: name of the argument that is passed on to every network as it is; None without one.
    """

    inverse: bool
    log_det: tuple[bool, bool]
    flag: str | None = None
    context: str | None = None

    def read(
        self, parameters: Sequence[Parameter], given: Sequence[Any], named: Mapping[str, Any]
    ) -> tuple[bool, list[Any]] | None:
        """(whether the direction is turned round, context) of the arguments after x; None: the original runs."""
        if len(given) > len(parameters) or not {p.name for p in parameters[len(given) :]}.issuperset(named):
            return None
        turned, context = False, []
        pairs = [*zip(parameters, given, strict=False)]
        pairs += [(parameter, named[parameter.name]) for parameter in parameters if parameter.name in named]
        for parameter, value in pairs:
            if parameter.name == self.flag and isinstance(value, bool):
                turned = value != parameter.default
            elif isinstance(value, PLAIN) and type(value) is type(parameter.default) and value == parameter.default:
                continue
            elif parameter.name == self.context and isinstance(value, Tensor):
                context.append(value)
            else:
                return None
        return turned, context


@dataclass(frozen=True)
class Step:
    """One coupling.

    Args:
        nets: paths of its networks: one, or two in the order in which they are called.
        split: which features move.
        full: whether the networks take all features, the moved ones as zeros, and return all.
    """

    nets: tuple[Path, ...]
    split: Split
    full: bool = False


@dataclass(frozen=True)
class Formula:
    """How an instance computes its couplings.

    Args:
        shape: of the random input on which this was found; other numbers of dimensions run the original.
        sized: whether it holds for this number of features alone.
        steps, end, calls: see the module's docstring.
        layout: "halves", "raw_first" or "interleaved" of a network's output; of two outputs "halves", which is
            (shift, raw), or "raw_first".
        order: "shift_first" or "scale_first".
        output: what one network returns: None for a tensor, else the keys of its two outputs: (0, 1) in a tuple.
        others: paths of the other submodules, whose calls are bypassed.
        constant: whether the instance's own state is plain values and functions: ``OwnState.constant``.
    """

    shape: tuple[int, ...]
    sized: bool
    steps: tuple[Step, ...]
    layout: str
    order: str
    output: tuple[Any, Any] | None = None
    end: Index | None = None
    calls: Mapping[str, Call] = ()  # type: ignore[assignment]
    others: tuple[Path, ...] = ()
    constant: bool = False

    def takes(self, x: Any) -> bool:
        """Whether x has as many dimensions and features as the input on which the formula was found."""
        if not isinstance(x, Tensor) or x.ndim != len(self.shape):
            return False
        return not self.sized or x.shape[1] == self.shape[1]

    def nets(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """The networks of all couplings, in order."""
        return tuple(at(module, path) for step in self.steps for path in step.nets)

    def members(self, module: nn.Module, scale_map: ScaleMap, context: Sequence[Any] = ()) -> list[Any]:
        """The couplings' sides, and the permutation after them."""
        sides: list[Any] = [self._side(module, step, scale_map, context) for step in self.steps]
        return sides if self.end is None else [*sides, self.end]

    def _side(self, module: nn.Module, step: Step, scale_map: ScaleMap, context: Sequence[Any]) -> Side:
        nets = tuple(at(module, path) for path in step.nets)
        swapped = self.layout == "raw_first"

        def outputs(kept: Tensor) -> list[Any]:
            if not step.full:
                return [net(kept, *context) for net in nets]
            features = self.shape[1]
            inside, moved = step.split.parts(features, kept.device)
            wide = kept.new_zeros(kept.shape[0], features, *kept.shape[2:])
            wide[:, inside] = kept
            return [net(wide, *context)[:, moved] for net in nets]

        def run(kept: Tensor) -> Params:
            found = outputs(kept)
            if len(found) == 2:
                return (found[1], found[0]) if swapped else (found[0], found[1])
            if self.output is None:
                params: Tensor = found[0]
                return params
            return torch.cat([found[0][key] for key in self.output], 1)

        alone: tuple[nn.Module, ...]
        if len(nets) == 2:
            alone, layout = nets[::-1] if swapped else nets, "pair"
        else:
            inner = nets[0] if self.output is None else find_halved_mlp(nets[0])
            alone, layout = () if inner is None else (inner,), self.layout
        return Side(step.split, Tail(layout, scale_map, order=self.order), run, () if context else alone,
                    full=step.full)  # fmt: skip


def at(module: nn.Module, path: Path) -> Any:
    """The submodule at the path."""
    found: Any = module
    for name in path:
        found = found._modules[name]
    return found


def by_formula(members: Sequence[Any], x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, log_det [B]) of x [B, C, ...] by the members' formulas in plain torch, for any split."""
    total = x.new_zeros(len(x))
    for member in reversed(members) if inverse else members:
        if isinstance(member, Index):
            x, _ = member(x, inverse)
            continue
        kept, moved = member.split.parts(x.shape[1], x.device)
        shift, raw = member.tail.halves(member.run(x[:, kept])).chunk(2, 1)
        log_s, m = member.tail.log_scale(raw), x[:, moved]
        if member.tail.order == "scale_first":
            m = (m - shift) * (-log_s).exp() if inverse else m * log_s.exp() + shift
        else:
            m = m * (-log_s).exp() - shift if inverse else (m + shift) * log_s.exp()
        x = x.clone()
        x[:, moved] = m
        total = total + log_s.flatten(1).sum(1)
    return x, -total if inverse else total


class ShapedStub(Stub):
    """A Stub whose output has the form of the network that it replaces: ``output`` as in ``Formula``."""

    output: tuple[Any, Any] | None = None

    def forward(self, x: Tensor, *context: Any, **named: Any) -> Any:
        return shaped(super().forward(x, *context, **named), self.output)


def shaped(y: Tensor, output: tuple[Any, Any] | None) -> Any:
    """y, or its halves along dim 1 as a tuple or a dict."""
    if output is None:
        return y
    halves = y.chunk(2, 1)
    return halves if output == (0, 1) else dict(zip(output, halves, strict=True))


def settings_of(module: nn.Module) -> Iterator[str]:
    """Names of the module's own attributes that are plain values or functions, on which its formula may depend."""
    for name, value in vars(module).items():
        if name != "training" and (
            isinstance(value, PLAIN) or (callable(value) and not isinstance(value, nn.Module))
        ):
            yield name
