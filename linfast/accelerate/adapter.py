"""Adapter, which describes one class of one library, and the registry of all adapters.

An adapter imports no library. Its functions take an instance of the class and read its attributes at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import read_at_once
from ..flows.drift import DriftGuard
from ..flows.remembered import writes
from .identity import find_class, has, original_class


class Unfit(Exception):
    """Raised, with the reason, where an instance of a recognised class cannot be swapped."""


@dataclass(frozen=True)
class Options:
    """The options of ``accelerate``."""

    keep_defects: frozenset[str] = frozenset()
    memory: str = "store"
    precision: str | None = None


@dataclass(frozen=True)
class Plan:
    """How one swapped instance runs. It is made again when a mask or a setting that it depends on has changed.

    Args:
        runs: the report's description of the code that now runs.
        note: the report's note on a defect of the original that was fixed or kept.
        layout: values that the replaced methods need at every call and that are computed once.
        fused: the couplings of a chain, or of one module, that run together: a ``fused.Fused``.
        takes_precision: whether that code has matrix products of its own, which follow ``options.precision``.
        vectors: the number of features of the vectors on which the check also runs its own conditioners, if any.
        kind: what else tells its code apart from another instance's; the check runs once for equal ones.
        own_settings: names of this instance's attributes on which the plan depends, beside ``settings``.
        options: the options of ``accelerate``. ``plan_for`` fills in this field and the next three.
        seen: the tensors that the plan depends on, each with its version counter at that time.
        values, settings: the values of masks on a CPU, and the settings, at that time.
        least_rows: a CPU batch of fewer rows per thread runs the original; without and with gradients enabled.
        guard: measures the error of tensors that the instance rebuilds in a backward, and warns of it.
    """

    runs: str
    note: str = ""
    layout: Any = None
    fused: Any = None
    takes_precision: bool = False
    vectors: int | None = None
    kind: Hashable = ()
    own_settings: tuple[str, ...] = ()
    options: Options = Options()
    seen: tuple[tuple[Tensor, int], ...] = field(default=(), compare=False)
    values: tuple[Tensor, ...] = field(default=(), compare=False)
    settings: tuple[Any, ...] = field(default=(), compare=False)
    least_rows: tuple[float, float] = field(default=(0.0, 0.0), compare=False)
    guard: DriftGuard = field(default_factory=DriftGuard, compare=False)


Draw = Callable[..., Tensor]
"""draw(*shape): standard normal values from a fixed seed, in the check's dtype and on its device."""


ORIGINAL = "the original's own code"  # in reports
_IN_NO_CHAIN = "it is in no chain of a known class"


def _nothing(*arguments: Any) -> tuple[Any, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """How one class is recognised, and the functions that replace its methods.

    The first six fields are required. ``members`` makes the class a coupling, ``chain`` a chain. Only zuko's
    coupling and masked autoregressive transforms set ``decides``, and only the research repository's FlowMatcher
    sets ``float64`` to False.

    Args:
        library: the library's name, for the report.
        where: the module that defines the class, or the class itself. None for a class that people copy into
            other repositories: it is recognised in any module, by its name and ``attributes``.
        name: the class's qualified name.
        methods: {name: function(instance, ...)} of the replaced methods.
        plan: (instance, options) -> Plan; raises Unfit with the reason.
        probe: (copy, draw) -> the methods' outputs on random inputs. It may replace the copy's conditioners.
        masks: instance -> tensors whose values ``plan`` reads. Where it cannot read them, the original runs: under
            torch.compile, torch.export and torch.jit.trace, and for an ensemble under torch.vmap.
        reads_masks: layout -> whether the plan depends on the masks' values.
        settings: names of the attributes, other than tensors, that ``plan`` reads.
        assumes: names of methods that ``methods`` reimplement but do not replace; they must be unmodified.
        attributes: names of attributes that distinguish the class from unrelated classes of the same name.
        inner: instance -> submodules whose calls ``methods`` bypass; where one has a hook, the original runs.
        conditioners: instance -> its conditioners. The report describes them; the check copies them ``emptied``.
        emptied: instance -> further modules that the check copies without parameters, buffers and submodules.
        members: of a coupling: (instance, layout) -> its sides, and permutations and diagonal maps between them.
        layout: of a coupling: instance -> the layout that ``members`` takes; raises Unfit.
        copied: (instance, bare copy) -> None: tells the copy what only the instance itself can show.
        vectors: of a coupling or a chain: (copy, draw, features) -> the outputs of both directions on vectors, with
            the copy's own conditioners.
        decides: whether the replaced methods decide themselves when the original runs.
        many_steps: whether each output is the result of many dependent steps, so that roundings grow as in a chain.
        is_spline: whether it is a spline coupling, of which a chain's run together.
        chain: whether the class runs other modules one after another. They then run together, or with
            memory="invert" their activations are rebuilt in the backward.
        stored: why memory="invert" stores activations of this chain, or coupling in no chain; "" where it does not.
        tolerance: largest relative L2 difference in float64; larger where the original itself computes in float32.
        float64: whether the original runs in float64.
    """

    library: str
    where: str | type | None
    name: str
    methods: Mapping[str, Callable[..., Any]]
    plan: Callable[[Any, Options], Plan]
    probe: Callable[[Any, Draw], Sequence[Tensor]]
    masks: Callable[[Any], Iterable[Tensor]] | None = None
    reads_masks: Callable[[Any], bool] = lambda layout: True
    settings: tuple[str, ...] = ()
    assumes: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    inner: Callable[[Any], Iterable[nn.Module]] = _nothing
    conditioners: Callable[[Any], Iterable[nn.Module]] = _nothing
    emptied: Callable[[Any], Iterable[nn.Module]] = _nothing
    members: Callable[[Any, Any], Sequence[Any]] = _nothing
    layout: Callable[[Any], Any] = _nothing
    copied: Callable[[Any, Any], Any] = _nothing
    vectors: Callable[[Any, Draw, int], Sequence[Tensor]] = _nothing
    decides: bool = False
    many_steps: bool = False
    is_spline: bool = False
    chain: bool = False
    stored: str = _IN_NO_CHAIN
    tolerance: float = 1e-10
    float64: bool = True

    @property
    def title(self) -> str:
        return f"{self.library} {self.name}"

    @property
    def is_coupling(self) -> bool:
        return self.members is not _nothing

    def wanted(self, options: Options) -> bool:
        """Whether these options give a reason to swap the class."""
        if not self.chain:
            return True
        return self.vectors is not _nothing if options.memory == "store" else self.stored == _IN_NO_CHAIN

    @torch.inference_mode(False)  # the plan's tensors are also used outside inference mode
    def plan_for(self, instance: Any, options: Options) -> Plan:
        """The instance's plan, with the options, tensors and settings that it depends on."""
        plan = self.plan(instance, options)
        seen, settings, values = self._sources(instance, plan)
        values = tuple(value.detach().clone() for value in values)
        return replace(plan, options=options, seen=seen, settings=settings, values=values)

    def settings_of(self, instance: Any, plan: Plan) -> tuple[Any, ...]:
        """The current values of the settings that the instance's plan depends on."""
        return tuple(getattr(instance, name, None) for name in (*self.settings, *plan.own_settings))

    def masks_of(self, instance: Any, layout: Any) -> tuple[Tensor, ...]:
        """The masks whose values a plan of this layout depends on."""
        return tuple(self.masks(instance)) if self.masks and self.reads_masks(layout) else ()

    def _sources(
        self, instance: Any, plan: Plan
    ) -> tuple[tuple[tuple[Tensor, int], ...], tuple[Any, ...], tuple[Tensor, ...]]:
        """(frozen tensors of the instance and ``inner``, with version counters; settings; masks on a CPU)."""
        modules = (instance, *self.inner(instance)) if isinstance(instance, nn.Module) else ()
        seen = tuple((t, writes(t)) for module in modules for t in untrained(module))
        # Comparing a GPU's masks at every call would wait for the device.
        values = tuple(mask for mask in self.masks_of(instance, plan.layout) if read_at_once(mask))
        return seen, self.settings_of(instance, plan), values

    def holds(self, plan: Plan, instance: Any) -> bool:
        """Whether nothing that the plan depends on has changed; on a GPU, writes through ``.data`` go unnoticed."""
        seen, settings, values = self._sources(instance, plan)
        if (len(seen), settings, len(values)) != (len(plan.seen), plan.settings, len(plan.values)):
            return False
        same = (t is then and now == before for (t, now), (then, before) in zip(seen, plan.seen, strict=True))
        return all(same) and all(map(torch.equal, values, plan.values))


def untrained(module: nn.Module) -> list[Tensor]:
    """The module's own buffers and its parameters that require no gradient."""
    own = (*module._buffers.values(), *module._parameters.values())
    return [t for t in own if t is not None and not t.requires_grad]


ADAPTERS: dict[tuple[str | None, str], Adapter] = {}
"""By (the class's module, or None for a class that people copy; the class's qualified name)."""


def add(*adapters: Adapter) -> None:
    """Register adapters. Each replaces an earlier one for the same class."""
    for adapter in adapters:
        where = adapter.where.__module__ if isinstance(adapter.where, type) else adapter.where
        ADAPTERS[where, adapter.name] = adapter


def _adapter_of(cls: type) -> Adapter | None:
    """The adapter of exactly this class object, not of another one with the same name."""
    found = ADAPTERS.get((cls.__module__, cls.__qualname__))
    if found is None:
        return None
    where = found.where
    return found if cls is (where if isinstance(where, type) else find_class(str(where), found.name)) else None


def adapter_for(instance: object) -> Adapter | None:
    """The adapter for exactly this instance's class."""
    cls = original_class(instance)
    found = _adapter_of(cls) or ADAPTERS.get((None, cls.__qualname__))
    return found if found is not None and has(instance, found.attributes) else None


def parent_adapter(instance: object) -> Adapter | None:
    """The adapter of a class that this instance's class derives from."""
    return next(filter(None, map(_adapter_of, original_class(instance).__mro__[1:])), None)


class Stub(nn.Module):
    """Replaces a conditioner by a smooth function of each position's channels, y = size tanh(W x).

    A check with it does not depend on the conditioner's cost, random numbers or state.
    The mean of each tensor among the arguments after x is added to y.
    """

    def __init__(self, channels_in: int, channels_out: int, draw: Draw, size: float = 1.5) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(draw(channels_out, channels_in).detach())

    def forward(self, x: Tensor, *context: Any, **named: Any) -> Tensor:
        y = self.size * torch.einsum("oc,bc...->bo...", self.weight, x).tanh()  # callers may write to y
        return sum((c.to(y).mean() for c in (*context, *named.values()) if isinstance(c, Tensor)), start=y)


def put_inside(module: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Replace submodules, by their ids, wherever they are held."""
    for inside in [*module.modules()]:
        for name, child in [*inside._modules.items()]:
            if id(child) in replaced:
                inside._modules[name] = replaced[id(child)]
