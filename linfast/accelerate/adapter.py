"""What an adapter says about one class of one library, and the list of all adapters.

An adapter names a class, says which of its methods are replaced by which functions, how to
tell that an instance fits, and how to compare the two. It imports no library: the functions
are given the instance and use its own attributes, live, at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.drift import DriftGuard
from .identity import find_class, original_class
from .tail import Side

__all__ = ["ADAPTERS", "Adapter", "Options", "Plan", "Stub", "Unfit", "adapter_for", "add", "parent_adapter"]


class Unfit(Exception):
    """Why an instance of a recognised class is left alone."""


@dataclass(frozen=True)
class Options:
    """What ``accelerate`` was asked for."""

    keep_defects: frozenset[str] = frozenset()
    memory: str = "store"
    precision: str | None = None


@dataclass(frozen=True)
class Plan:
    """What one instance runs; made anew where a mask or a setting that it was made from is another.

    Args:
        runs: for the report.
        note: for the report; a defect of the original that was fixed or kept.
        layout: what the replaced methods need to know and would otherwise compute at every call.
        takes_precision: whether what runs has products of its own, which follow ``options.precision``.
        options: what ``accelerate`` was asked for; the adapter puts them in.
        seen: what it was made from, by ``Adapter.seen``; the adapter puts it in.
        values, settings: the same, by ``Adapter.values_of`` and ``Adapter.settings_of``.
        guard: of what the instance rebuilds in a backward.
    """

    runs: str
    note: str = ""
    layout: Any = None
    takes_precision: bool = False
    options: Options = Options()
    seen: tuple[tuple[Tensor, int], ...] = field(default=(), compare=False)
    values: tuple[Tensor, ...] = field(default=(), compare=False)
    settings: tuple[Any, ...] = field(default=(), compare=False)
    guard: DriftGuard = field(default_factory=DriftGuard, compare=False)


Draw = Callable[..., Tensor]
"""draw(*shape): standard normal, seeded, of the check's dtype and device; an input whose gradient is compared."""


def _nothing(instance: Any) -> tuple[nn.Module, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """How one class is recognised and what replaces its methods.

    Args:
        library: its name, for the report.
        where: the module that defines the class; None: any, as for a class that people copy
            into their own repositories. ``recognises`` then has to tell it from its namesakes.
        name: the class's qualified name.
        float64: whether the original runs in float64.
        cls: the class itself, where it is at hand.
        methods: name -> function(instance, ...), what the swapped class runs.
        plan: (instance, options) -> Plan; raises Unfit with the reason.
        probe: (copy, draw) -> outputs. Runs the methods on drawn inputs. It may replace the
            copy's conditioners by stubs: the copy's dictionaries are its own.
        masks: what ``plan`` reads the values of. Where they cannot be read, the original runs: under
            torch.compile, torch.export and torch.jit.trace, and of an ensemble under torch.vmap.
        settings: attributes, no tensors, that ``plan`` reads and that may be set to something else later.
        assumes: methods that ``methods`` stand in for without replacing them.
        recognises: whether an instance has the attributes of the class that is meant.
        inner: modules that the replaced methods pass by; one with a hook keeps the original running.
        conditioners: modules to report on; the check gets them without their weights.
        hollow: more modules whose weights the check does not need.
        sides: (instance, layout) -> the sides of a coupling, which the check needs where they run whole.
        vectors: (copy, draw, features) -> outputs, both ways on vectors, with its own conditioners.
        chain: whether the class runs other modules one after another, so that there is a reason to
            swap it only where ``options`` ask for what is done to a whole chain.
        stored: why a coupling that is in no chain stores its activations; "" for one that rebuilds its own.
        tolerance: largest relative L2 difference in float64; 1e-8 where the original itself drops to float32.
    """

    library: str
    where: str | None
    name: str
    methods: Mapping[str, Callable[..., Any]]
    plan: Callable[[Any, Options], Plan]
    probe: Callable[[Any, Draw], Sequence[Tensor]]
    masks: Callable[[Any], Iterable[Tensor]] | None = None
    settings: tuple[str, ...] = ()
    assumes: tuple[str, ...] = ()
    recognises: Callable[[Any], bool] = lambda instance: True
    inner: Callable[[Any], Iterable[nn.Module]] = _nothing
    conditioners: Callable[[Any], Iterable[nn.Module]] = _nothing
    hollow: Callable[[Any], Iterable[nn.Module]] = _nothing
    sides: Callable[[Any, Any], Sequence[Side]] = lambda instance, layout: ()
    vectors: Callable[[Any, Draw, int], Sequence[Tensor]] = lambda instance, draw, features: ()
    chain: bool = False
    stored: str = "it is in no chain of a known class"
    tolerance: float = 1e-10
    float64: bool = True
    cls: type | None = None

    @property
    def title(self) -> str:
        return f"{self.library} {self.name}"

    def wanted(self, options: Options) -> bool:
        """Whether these options give a reason to swap the class."""
        return not self.chain or options.memory != "store"

    @torch.inference_mode(False)  # the plan outlives it
    def plan_for(self, instance: Any, options: Options) -> Plan:
        """The plan, with the options it was made for."""
        plan = self.plan(instance, options)
        values = tuple(value.detach().clone() for value in self.values_of(instance))
        return replace(
            plan, options=options, seen=self.seen(instance), values=values, settings=self.settings_of(instance)
        )

    def settings_of(self, instance: Any) -> tuple[Any, ...]:
        """What its ``settings`` are now."""
        return tuple(getattr(instance, name, None) for name in self.settings)

    def seen(self, instance: Any) -> tuple[tuple[Tensor, int], ...]:
        """Masks and the like, its own and of modules passed by, and how often each was written to."""
        modules = (instance, *self.inner(instance)) if isinstance(instance, nn.Module) else ()
        own = (t for m in modules for t in (*m._buffers.values(), *m._parameters.values()))
        untrained = [t for t in own if t is not None and not t.requires_grad]
        return tuple((t, 0 if t.is_inference() else t._version) for t in untrained)

    def values_of(self, instance: Any) -> tuple[Tensor, ...]:
        """Its ``masks``, as far as their values can be compared at every call: a GPU would be waited for."""
        return tuple(m for m in self.masks(instance) if m.is_cpu) if self.masks else ()

    def holds(self, plan: Plan, instance: Any) -> bool:
        """Whether these are still what the plan was made from.

        A write through ``.data`` does not count as one in torch: on a CPU values are compared besides.
        """
        now = self.seen(instance)
        same = (t is seen and writes == then for (t, writes), (seen, then) in zip(now, plan.seen, strict=False))
        if len(now) != len(plan.seen) or not all(same) or self.settings_of(instance) != plan.settings:
            return False
        values = self.values_of(instance)
        return len(values) == len(plan.values) and all(map(torch.equal, values, plan.values))

    def matches(self, cls: type) -> bool:
        """Whether this is the class the adapter is for."""
        if self.cls is not None:
            return cls is self.cls
        if self.where is None:
            return cls.__qualname__ == self.name
        return cls is find_class(self.where, self.name)


ADAPTERS: list[Adapter] = []
"""All of them; the first that fits is taken."""


def add(*adapters: Adapter) -> None:
    """Put adapters on the list, newest first."""
    ADAPTERS[:0] = adapters


def adapter_for(instance: object) -> Adapter | None:
    """The adapter for exactly this instance's class."""
    cls = original_class(instance)
    return next((a for a in ADAPTERS if a.matches(cls) and a.recognises(instance)), None)


def parent_adapter(instance: object) -> Adapter | None:
    """The adapter of a class that this instance's class derives from."""
    parents = original_class(instance).__mro__[1:]
    return next((a for cls in parents for a in ADAPTERS if a.where is not None and a.matches(cls)), None)


class Stub(nn.Module):
    """A smooth function of each position's channels, y = size tanh(W x), in a conditioner's place.

    A check with it does not depend on what the conditioner costs, draws or remembers.
    Arguments after x, where they are tensors, move y by their mean.
    """

    def __init__(self, channels_in: int, channels_out: int, draw: Draw, size: float = 1.5) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(draw(channels_out, channels_in).detach())

    def forward(self, x: Tensor, *context: Any, **named: Any) -> Tensor:
        y = self.size * torch.einsum("oc,bc...->bo...", self.weight, x).tanh()  # whose output may be written to
        return sum((c.to(y).mean() for c in (*context, *named.values()) if isinstance(c, Tensor)), start=y)
