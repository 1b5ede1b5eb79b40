"""register_adapter: affine couplings of a class of your own, one or several in a module.

A coupling computes a shift t and a raw value r from the features that it keeps, and moves the others by
y = (m + t) e^s or y = m e^s + t, with s = scale_map(r). What the description leaves open is found by ``watch.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_function, check_kind
from ...ops.affine_coupling import HALVES, ORDERS
from ...rows import SHORT
from ...scale_maps import ScaleMap
from ..adapter import Adapter, Draw, Options, Plan, Unfit, add
from ..chain import fused_of
from ..coupling import couple, coupling_adapter
from ..formula import Formula, Parameter, ShapedStub, at, settings_of
from ..fused import Fused, Maps
from ..identity import PLAN, original_class
from ..networks import LAYOUTS, Description
from ..own_state import OwnState
from ..swap import is_unchanged
from ..watch import find_formula

__all__ = ["register_adapter"]

_FORWARDS = ("forward", "encode")
_INVERSES = ("inverse", "decode", "reverse", "undo")


def register_adapter(
    cls: type[nn.Module],
    *,
    conditioner: str | Collection[str],
    scale_map: ScaleMap | Callable[[Any], ScaleMap],
    order: str | None = None,
    layout: str | None = None,
    moves: str | None = None,
    log_det: bool | None = None,
    forward: str | None = None,
    inverse: str | None = None,
    features: str | None = None,
) -> None:
    """Describe a class of affine couplings to ``accelerate``: exactly this class, not its subclasses.

    An instance may hold one coupling or several that follow one another. ``accelerate`` replaces its networks, on a
    copy, by random functions and watches which features they get; what is None here, it finds by comparison with
    the class's own code. An instance is swapped only if both directions and their gradients agree with its own code
    on random inputs. docs/register_adapter.md shows classes of several shapes.

    Args:
        cls: its forward and inverse take x [B, C, ...] and return y of the same shape, or (y, log_det [B]).
            Further arguments are a context, which is passed on to the networks, or a flag, a bool that turns the
            direction round. Calls with other arguments run the original.
        conditioner: name of the module attribute that maps the kept features to params [B, 2 C_moved, ...] or to a
            tuple or dict of two tensors [B, C_moved, ...]; or the names of two networks, one that gives the
            shift and one that gives the raw value; or of several couplings' networks. A name may be a path,
            "nets.0". A ModuleList or a ModuleDict stands for the modules in it. A second network that is not named
            is looked for among the other attributes.
        scale_map: from raw, one half of params, to s; a function of the instance where instances differ.
        order: y = (m + t) e^s of the moved half m is "shift_first", y = m e^s + t is "scale_first".
        layout: of params: "halves" [t | raw], "raw_first" [raw | t] or "interleaved". Of two outputs, or of two
            networks in the order in which they are called: "halves" (t, raw) or "raw_first" (raw, t).
        moves: which half the first coupling moves, "first" or "second"; of alternating features the even ones are
            "first".
        log_det: whether the forward returns (y, log_det [B]); else it returns y.
        forward: name of the method that computes y; by default forward or encode, or both.
        inverse: name of the inverse method, or of the argument of the forward that makes it the inverse; by default
            those of inverse, decode, reverse and undo that the class has, or the forward's flag.
        features: name of the attribute that holds C; None where the networks' own sizes give it, or where an
            instance takes any C.

    Raises:
        TypeError: cls is not a subclass of nn.Module, or an option is of another type.
        ValueError: an option has an unknown value, or a name is not that of an attribute or method.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of nn.Module; got {cls!r}")
    choices: tuple[tuple[str, Any, Any], ...] = (
        ("order", order, ORDERS),
        ("layout", layout, LAYOUTS),
        ("moves", moves, HALVES),
    )
    for option, value, allowed in choices:
        if value is not None:
            check_choice(option, value, allowed)
    if not isinstance(scale_map, ScaleMap):
        check_function("scale_map", scale_map)
    if log_det is not None:
        check_flag("log_det", log_det)
    for option, value in (("forward", forward), ("inverse", inverse), ("features", features)):
        check_kind(option, value, (str, NoneType))
    names = _names(cls, conditioner)
    if features is not None and not features.isidentifier():
        raise ValueError(f"features must name an attribute of a {cls.__name__}; got {features!r}")
    methods = _methods(cls, forward, inverse)
    add(_Taught(cls, Description(names, order, layout, moves, log_det, features, methods), scale_map).adapter())


def _names(cls: type, conditioner: Any) -> tuple[tuple[str, ...], ...]:
    """The paths of the conditioner's networks."""
    check_kind("conditioner", conditioner, (str, list, tuple, dict))
    given = [conditioner] if isinstance(conditioner, str) else [
        *(conditioner.values() if isinstance(conditioner, Mapping) else conditioner)
    ]  # fmt: skip
    paths = [tuple(name.split(".")) if isinstance(name, str) else () for name in given]
    if not paths or not all(path and path[0].isidentifier() and all(path) for path in paths):
        raise ValueError(f"conditioner must name an attribute of a {cls.__name__}; got {conditioner!r}")
    return tuple(paths)


def _methods(cls: type, forward: str | None, inverse: str | None) -> dict[str, tuple[bool, tuple[Parameter, ...]]]:
    """By name: whether it is to be an inverse, and its arguments after x. Forwards come first."""

    def those(names: Iterable[str]) -> list[str]:
        own = (name for name in names if getattr(cls, name, None) is not getattr(nn.Module, name, None))
        functions = [(name, getattr(cls, name, None)) for name in own]
        return [name for name, f in functions if inspect.isfunction(f) and f.__name__ == name]

    forwards = those(_FORWARDS if forward is None else (forward,))
    if not forwards:
        raise ValueError(f"forward must name a method of {cls.__name__}; got {forward!r}")
    flags = [p.name for name in forwards for p in _parameters(cls, name) if isinstance(p.default, bool)]
    inverses = [name for name in those(_INVERSES if inverse is None else (inverse,)) if name not in forwards]
    if not inverses and not (flags if inverse in (None, *forwards) else inverse in flags):
        raise ValueError(f"inverse must name a method of {cls.__name__} or a flag of its forward; got {inverse!r}")
    named = [(name, False) for name in forwards] + [(name, True) for name in inverses]
    return {name: (undoes, _parameters(cls, name)) for name, undoes in named}


def _parameters(cls: type, name: str) -> tuple[Parameter, ...]:
    every = [*inspect.signature(getattr(cls, name)).parameters.values()][2:]
    named = [p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(Parameter(p.name, None if p.default is p.empty else p.default) for p in named)


@dataclass(frozen=True)
class _Fewest:
    """From where the loop is as fast as a class's own code on a CPU (one thread of an AMD EPYC, batch 1)."""

    networks: int = 4
    per_permutation: int = 2  # couplings for each permutation in the loop
    rows: int = SHORT  # per thread, of networks that take all features: their weights are sliced at every call


_FEWEST = _Fewest()
Layout = tuple[Formula, ScaleMap]
_NO_MAPS = Maps((), (), {})


@dataclass(frozen=True)
class _Found:
    """An instance's formula, or why it has none, and what it depends on; without a state it was told to a copy."""

    state: OwnState | None
    scale_map: ScaleMap
    formula: Formula | str

    def holds(self, scale_map: ScaleMap) -> bool:
        return self.state is None or (scale_map == self.scale_map and self.state.holds())


class _Taught:
    """A registered class: how its instances are described, found and run."""

    def __init__(
        self, cls: type[nn.Module], description: Description, scale_map: ScaleMap | Callable[[Any], ScaleMap]
    ) -> None:
        self.cls, self.description, self.scale_map = cls, description, scale_map
        self.found: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()

    def adapter(self) -> Adapter:
        made = coupling_adapter(
            library=self.cls.__module__.partition(".")[0],
            where=self.cls,
            name=self.cls.__qualname__,
            find=self._find,
            members=lambda module, layout, context: layout[0].members(module, layout[1], context),
            nets=lambda module: self._formula(module).nets(module),
            shapes=lambda module: (self._formula(module).shape,),
            methods=({name: self._method(name) for name in self.description.methods}, self._both_ways),
            stub=self._stub,
            inner=self._inner,
            copied=self._tell,
        )
        return replace(made, plan=lambda module, options: self._plan(module, options, made))

    def _formula(self, module: nn.Module) -> Formula:
        """The instance's formula, found again where something that it may depend on has changed."""
        known = self.found.get(module)
        if known is None or not known.holds(self._map(module)):
            self.found[module] = known = self._look(module)
        if isinstance(known.formula, str):
            raise Unfit(known.formula)
        return known.formula

    def _look(self, module: nn.Module) -> _Found:
        scale_map = self._map(module)
        try:
            formula = find_formula(module, self.description, scale_map)
            state = OwnState(module, formula.nets(module))
            if PLAN in vars(module) and state.trained:  # the check before the swap has not seen its gradient
                raise Unfit("a parameter outside its networks requires a gradient")
        except Unfit as reason:
            if PLAN not in vars(module):
                raise
            return _Found(OwnState(module, ()), scale_map, str(reason))
        return _Found(state, scale_map, replace(formula, constant=state.constant))

    def _renewed(self, module: Any) -> bool:
        """Plan again where the instance's own state has changed. Returns whether it is to run by its plan."""
        plan = vars(module)[PLAN]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the trace outlives later changes
            return bool(plan.layout[0].constant)
        try:
            if self._formula(module) is not plan.layout[0]:
                vars(module)[PLAN] = module._linfast_adapter.plan_for(module, plan.options)
        except (Unfit, RuntimeError):  # RuntimeError: there are no values to read
            return False
        return True

    def _map(self, module: nn.Module) -> ScaleMap:
        return self.scale_map if isinstance(self.scale_map, ScaleMap) else self.scale_map(module)

    def _find(self, module: nn.Module) -> tuple[str, Layout]:
        formula, found = self._formula(module), self._map(module)
        several = f"{len(formula.steps)} affine couplings" if len(formula.steps) > 1 else "affine coupling"
        return f"{several}, {found.kind}", (formula, found)

    def _tell(self, module: nn.Module, copied: nn.Module) -> None:
        self.found[copied] = _Found(None, self._map(module), self._formula(module))

    def _stub(self, module: nn.Module) -> type[ShapedStub]:
        return type("_Stub", (ShapedStub,), {"output": self._formula(module).output})

    def _inner(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """The submodules that are not part of the networks: their calls are bypassed."""
        formula = vars(module)[PLAN].layout[0] if PLAN in vars(module) else self._formula(module)
        return tuple(at(module, path) for path in formula.others)

    def _plan(self, module: nn.Module, options: Options, made: Adapter) -> Plan:
        """The coupling's plan; where the module holds several couplings with MLPs, they run together."""
        plan = replace(made.plan(module, options), own_settings=tuple(settings_of(module)), kind=self._kind(module))
        formula, _ = plan.layout
        try:
            fused = Fused(module, lambda stack: iter([("", stack)]), None, _NO_MAPS, options)
        except Unfit:
            return plan
        networks, full = len(formula.nets(module)), any(step.full for step in formula.steps)
        permuted = len(formula.steps) < _FEWEST.per_permutation * fused.permutations
        if networks < _FEWEST.networks or permuted:
            return plan
        together, least = fused.plan(module), _FEWEST.rows if full else 0.0
        runs = f"{self._find(module)[0]}: {together.runs}"
        takes = together.takes_precision
        return replace(plan, runs=runs, fused=fused, takes_precision=takes, least_rows=(least, least))

    def _kind(self, module: nn.Module) -> str:
        return repr(self._find(module)[1])

    def _method(self, name: str) -> Callable[..., Any]:
        undoes, parameters = self.description.methods[name]

        def run(module: Any, x: Any, *given: Any, **named: Any) -> Any:
            def original(x: Tensor) -> Any:
                return getattr(original_class(module), name)(module, x, *given, **named)

            def own(x: Tensor) -> tuple[Tensor, Any]:
                outputs = original(x)
                return outputs if isinstance(outputs, tuple) else (outputs, None)

            checked = vars(module)[PLAN].fused is None
            if not self._renewed(module):
                return original(x)
            fused = vars(module)[PLAN].fused
            together: Any = fused_of(module) if fused is not None and fused.takes(x) else None
            formula, scale_map = vars(module)[PLAN].layout
            call = formula.calls.get(name) if formula.takes(x) else None
            asked = None if call is None else call.read(parameters, given, named)
            if call is None or asked is None:
                return original(x)
            turned, context = asked
            inverse, returns = undoes != turned, call.log_det[turned]
            if together is not None and not context and (together is fused or together.takes(x)):
                if not returns:
                    return together.value(module, x, inverse)
                y, log_det = together(module, x, inverse)
                log_det = log_det.to(y.dtype)
            elif checked or is_unchanged(module, module._linfast_adapter, name):
                y, log_det = couple(module, formula.members(module, scale_map, context), x, inverse, own)
            else:
                return original(x)
            return (y, log_det) if returns else y

        return run

    def _both_ways(self, module: Any, draw: Draw, shape: tuple[int, ...]) -> list[Tensor]:
        """The outputs of all replaced methods, with each value of their flags."""
        outputs: list[Tensor] = []
        for name, call in self._formula(module).calls.items():
            flags = {p.name: not p.default for p in self.description.methods[name][1] if p.name == call.flag}
            for named in [{}, flags] if flags else [{}]:
                found = getattr(module, name)(draw(*shape), **named)
                outputs += found if isinstance(found, tuple) else (found,)
        return outputs
