"""What is known of one class of one library, and all adapters by the class that they are for.

An adapter imports no library. Its functions are given the instance and read its attributes at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.drift import DriftGuard
from .identity import find_class, has, original_class


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
    """How one instance runs. It is made again when a mask or a setting that it was made from has changed.

    Args:
        runs: what runs now, for the report.
        note: for the report: a defect of the original that was fixed or kept.
        layout: what the replaced methods would otherwise compute at every call.
        takes_precision: whether what runs has products of its own, which follow ``options.precision``.
        options: what ``accelerate`` was asked for. This and the following are filled in by the adapter.
        seen: the tensors that it was made from, and how often each had been written to.
        values, settings: the masks' values and the settings that it was made from.
        least_rows: of a coupling: from how many rows per thread on it runs on a CPU; else the original does.
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
    least_rows: float = field(default=0.0, compare=False)
    guard: DriftGuard = field(default_factory=DriftGuard, compare=False)


Draw = Callable[..., Tensor]
"""draw(*shape): standard normal values from a fixed seed, of the check's dtype and device."""


_IN_NO_CHAIN = "it is in no chain of a known class"


def _nothing(*arguments: Any) -> tuple[Any, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """How one class is recognised and what replaces its methods.

    Every class has the first six. ``members`` makes it a coupling, ``chain`` a chain. Only zuko ``decides``, and
    only the research repository's FlowMatcher has no ``float64``.

    Args:
        library: its name, for the report.
        where: the module that defines the class; the class itself; None for a class that people copy into their own
            repositories, which is recognised wherever it is by its name and ``attributes``.
        name: the class's qualified name.
        methods: name -> function(instance, ...), what the swapped class runs.
        plan: (instance, options) -> Plan; raises Unfit with the reason.
        probe: (copy, draw) -> outputs of its methods on drawn inputs. It may replace the copy's conditioners.
        masks: tensors whose values ``plan`` reads. Where they cannot be read, the original runs: under
            torch.compile, torch.export and torch.jit.trace, and of an ensemble under torch.vmap.
        settings: attributes other than tensors that ``plan`` reads.
        assumes: methods that ``methods`` stand in for without replacing them.
        attributes: names that tell an instance of the class that is meant from others of the same name.
        inner: modules that the replaced methods pass by; one with a hook keeps the original running.
        conditioners: modules to report on; the check's copies have them without their weights.
        hollow: more modules whose weights the check does not need.
        members: of a coupling: (instance, layout) -> its sides, and permutations and diagonal maps between them. On
            a CPU it then runs the original on short batches.
        vectors: of a coupling or a chain: (copy, draw, features) -> outputs both ways on vectors, with its own
            conditioners.
        decides: whether the replaced methods decide themselves when the original runs.
        chain: whether the class runs other modules in turn; they then run together, or with memory="invert" are
            rebuilt in the backward.
        stored: why a coupling in no chain, or a chain, stores its activations; "" for one that rebuilds its own.
        tolerance: largest relative L2 difference in float64; larger where the original itself drops to float32.
        float64: whether the original runs in float64.
    """

    library: str
    where: str | type | None
    name: str
    methods: Mapping[str, Callable[..., Any]]
    plan: Callable[[Any, Options], Plan]
    probe: Callable[[Any, Draw], Sequence[Tensor]]
    masks: Callable[[Any], Iterable[Tensor]] | None = None
    settings: tuple[str, ...] = ()
    assumes: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    inner: Callable[[Any], Iterable[nn.Module]] = _nothing
    conditioners: Callable[[Any], Iterable[nn.Module]] = _nothing
    hollow: Callable[[Any], Iterable[nn.Module]] = _nothing
    members: Callable[[Any, Any], Sequence[Any]] = _nothing
    vectors: Callable[[Any, Draw, int], Sequence[Tensor]] = _nothing
    decides: bool = False
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

    @torch.inference_mode(False)  # the plan is used outside it
    def plan_for(self, instance: Any, options: Options) -> Plan:
        """The plan, with the options and the tensors that it was made from."""
        plan = self.plan(instance, options)
        seen, settings, values = self._sources(instance)
        values = tuple(value.detach().clone() for value in values)
        return replace(plan, options=options, seen=seen, settings=settings, values=values)

    def settings_of(self, instance: Any) -> tuple[Any, ...]:
        """What its ``settings`` are now."""
        return tuple(getattr(instance, name, None) for name in self.settings)

    def _sources(self, instance: Any) -> tuple[tuple[tuple[Tensor, int], ...], tuple[Any, ...], tuple[Tensor, ...]]:
        """Its untrained tensors and those of modules passed by, with their writes; settings; masks on a CPU."""
        modules = (instance, *self.inner(instance)) if isinstance(instance, nn.Module) else ()
        own = (t for m in modules for t in (*m._buffers.values(), *m._parameters.values()))
        untrained = [t for t in own if t is not None and not t.requires_grad]
        seen = tuple((t, 0 if t.is_inference() else t._version) for t in untrained)
        # Comparing a GPU's masks at every call would wait for the device.
        values = tuple(mask for mask in self.masks(instance) if mask.is_cpu) if self.masks else ()
        return seen, self.settings_of(instance), values

    def holds(self, plan: Plan, instance: Any) -> bool:
        """Whether all that the plan was made from is as it was; torch counts no write through ``.data``."""
        seen, settings, values = self._sources(instance)
        if (len(seen), settings, len(values)) != (len(plan.seen), plan.settings, len(plan.values)):
            return False
        same = (t is then and writes == before for (t, writes), (then, before) in zip(seen, plan.seen, strict=True))
        return all(same) and all(map(torch.equal, values, plan.values))


ADAPTERS: dict[tuple[str | None, str], Adapter] = {}
"""By the class's module, None for a class that people copy, and its qualified name."""


def add(*adapters: Adapter) -> None:
    """Put adapters into the table; one for the same class is replaced."""
    for adapter in adapters:
        where = adapter.where.__module__ if isinstance(adapter.where, type) else adapter.where
        ADAPTERS[where, adapter.name] = adapter


def _adapter_of(cls: type) -> Adapter | None:
    """That of exactly this class object of its module."""
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
