"""Registered: a class of affine couplings that a user has described; how its instances are planned and run.

What the description leaves open is found by ``watch.py``, for each instance, and again where its state has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..rows import SHORT
from ..scale_maps import ScaleMap
from .adapter import Adapter, Draw, Options, Plan, Unfit
from .chain import fused_of
from .coupling import couple, coupling_adapter
from .formula import Formula, ShapedStub, at, settings_of
from .fused import Fused
from .identity import PLAN, original_class
from .maps import NO_MAPS
from .networks import Description
from .own_state import OwnState
from .swap import is_unchanged
from .watch import find_formula


@dataclass(frozen=True)
class _Fewest:
    """From where the loop is as fast as a class's own code on a CPU (one thread of an AMD EPYC, batch 1)."""

    networks: int = 4
    per_permutation: int = 2  # couplings for each permutation in the loop
    rows: int = SHORT  # per thread, of networks that take all features: their weights are sliced at every call


_FEWEST = _Fewest()
Layout = tuple[Formula, ScaleMap]


@dataclass(frozen=True)
class _Found:
    """An instance's formula, or why it has none, and what it depends on; without a state it was told to a copy."""

    state: OwnState | None
    scale_map: ScaleMap
    formula: Formula | str

    def holds(self, scale_map: ScaleMap) -> bool:
        return self.state is None or (scale_map == self.scale_map and self.state.holds())


class Registered:
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
        what, layout = self._find(module)
        plan = replace(made.plan(module, options), own_settings=tuple(settings_of(module)), kind=repr(layout))
        formula, _ = plan.layout
        try:
            fused = Fused(module, lambda stack: iter([("", stack)]), None, NO_MAPS, options)
        except Unfit:
            return plan
        networks, full = len(formula.nets(module)), any(step.full for step in formula.steps)
        permuted = len(formula.steps) < _FEWEST.per_permutation * fused.permutations
        if networks < _FEWEST.networks or permuted:
            return plan
        together, least = fused.plan(module), _FEWEST.rows if full else 0.0
        runs, takes = f"{what}: {together.runs}", together.takes_precision
        return replace(plan, runs=runs, fused=fused, takes_precision=takes, least_rows=(least, least))

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
            inverse, returns = undoes != turned, call.log_det[int(turned)]  # Dynamo of torch 2.11 needs the int
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
