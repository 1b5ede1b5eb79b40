"""Chains of other libraries' steps: their couplings together (``fused.py``), or with memory="invert" rebuilt.

What ``flows.reversible`` rebuilds in the backward is a list of ``Part``s. A part that is a coupling names its
conditioners, each of which is then evaluated once; of any other part the inverse and the forward run once each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import has_values
from ..flows.reversible import Step, inverts, reversible
from ..flows.undo import Made, Outputs, Undone, undo
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit, adapter_for
from .evaluate_once import recalling
from .fused import Fused, Maps
from .identity import PLAN, changed_method

Context = Mapping[str, Any]
Named = Iterator[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Part:
    """One step of a chain.

    Args:
        name: for messages.
        module: whose parameters it reads.
        run: (module, x, context, inverse) -> (y, log_det [B] or None).
        conditioners: of a coupling.
    """

    name: str
    module: nn.Module
    run: Callable[[Any, Tensor, Context, bool], Outputs]
    conditioners: tuple[nn.Module, ...] = ()

    def step(self, inverse: bool) -> Step:
        def undo_once(made: Made, context: Context) -> Undone:
            run, run_back = self._run_and_run_back(recalling(self.module, self.conditioners, made.tensors), inverse)
            with torch.no_grad():  # the conditioners see to their own graphs
                return undo(lambda x: run(x, context), lambda y: run_back(y, context), made)

        step = Step.of(self.name, self.module, *self._run_and_run_back(self.module, inverse))
        return replace(step, undo=undo_once) if self.conditioners else step

    def _run_and_run_back(self, module: Any, inverse: bool) -> tuple[Callable[..., Outputs], Callable[..., Tensor]]:
        return (
            lambda x, context: self.run(module, x, context, inverse),
            lambda y, context: self.run(module, y, context, not inverse)[0],
        )


def parts_to_invert(instance: Any, x: Any, find: Callable[[Any], list[Part]]) -> list[Part] | None:
    """The parts of a swapped instance that this call of its method is to rebuild; None: it stores.

    They are found at every call: what was put in since ``accelerate``, and cannot be rebuilt, is said once.
    """
    plan = instance._linfast_plan
    if plan.options.memory == "store":
        return None
    is_replica = getattr(instance, "_is_replica", False)  # nn.DataParallel's, whose weights are no parameters
    if not isinstance(x, Tensor) or not has_values(x) or is_replica or not inverts(plan.options.memory, x, 0.0):
        return None
    try:
        parts = find(instance)
        check_parts(parts)
    except Unfit as reason:
        plan.guard.say(str(reason), f"{type(instance).__name__} was changed after accelerate; {reason}")
        return None
    return parts


def run_inverting(instance: Any, parts: Sequence[Part], x: Tensor, context: Context, inverse: bool) -> Outputs:
    """(y, log_det) of the parts in turn, or of the inverse of that."""
    steps = [part.step(inverse) for part in parts]
    return reversible(steps[::-1] if inverse else steps, x, context, instance._linfast_plan.guard)


def check_parts(parts: Sequence[Part]) -> None:
    """Raise Unfit where the parts cannot be undone one by one, or there is nothing to gain."""
    if not any(part.conditioners for part in parts):
        raise Unfit("stored: no coupling of it is known")
    for part in parts:
        modules = [module for net in part.conditioners for module in net.modules()]
        if len(part.conditioners) > 1 and any(isinstance(m, _DROPOUTS) and m.p > 0 for m in modules):
            raise Unfit(f"stored: the conditioners of its {part.name} drop out, and are undone in another order")


_DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout


def per_sample(log_det: Any, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[B], from what libraries return: a number, one for all samples, or [B]."""
    if not isinstance(log_det, Tensor):
        return torch.full((x.shape[0],), log_det, dtype=dtype or x.dtype, device=x.device)
    return log_det.expand(x.shape[0]).to(dtype or log_det.dtype)


def part_of(name: str, module: nn.Module, known: bool, run: Callable[..., Outputs]) -> Part:
    """A step, or Unfit."""
    adapter, conditioners = adapter_for(module), tuple(nets_of([module]))
    changed = None if adapter is None else changed_method(module, (*adapter.methods, *adapter.assumes))
    if changed is not None or not (known or conditioners):
        raise Unfit(f"stored: its {type(module).__name__} is not known to be invertible")
    return Part(f"{name} ({type(module).__name__})", module, run, conditioners)


def nets_of(members: Iterable[nn.Module]) -> list[nn.Module]:
    """The conditioners of those that are couplings."""
    adapters = [(module, adapter_for(module)) for module in members]
    return [net for module, adapter in adapters if adapter is not None for net in adapter.conditioners(module)]


def put_stubs(members: Sequence[nn.Module], draw: Draw) -> None:
    """Stubs in place of a copy's conditioners, as the couplings' own checks have them, with scales near one."""
    for member in members:
        adapter = adapter_for(member)
        if adapter is not None and nets_of([member]):
            adapter.probe(member, draw)
        for module in member.modules():
            if isinstance(module, Stub):
                module.size = 1 / len(members)


def fused_of(chain: Any) -> Fused | None:
    """What runs a swapped chain's couplings together, as the chain is now; None where nothing does."""
    plan = vars(chain)[PLAN]
    if not isinstance(plan.layout, Fused):
        return None
    now = plan.layout.renewed(chain)
    if now is not None and now is not plan.layout:
        vars(chain)[PLAN] = replace(plan, layout=now)
    return now


def run_chain(chain: Any, x: Any, context: Context, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """(y, log_det [B]) of a swapped chain; None where the library's own loop is to run.

    Without a context the couplings run together, where the chain was swapped for that.
    """
    plan = vars(chain)[PLAN]
    if isinstance(plan.layout, Fused):
        alone = all(value is None for value in context.values()) and plan.layout.takes(x)
        fused = fused_of(chain) if alone else None
        return None if fused is None else fused(chain, x, inverse)
    parts = parts_to_invert(chain, x, plan.layout)
    if parts is None:
        return None
    y, log_det = run_inverting(chain, parts, x, context, inverse)
    assert log_det is not None
    return y, log_det


def chain_adapter(
    library: str,
    where: str,
    name: str,
    flat: Callable[[Any], Named],
    run_part: Callable[[Any, Tensor, Context, bool], Outputs] | None,
    maps: Maps,
    parts_of: Callable[[Any], list[Part]] | None = None,
    why_apart: Callable[[Any], str | None] = lambda chain: None,
    **what: Any,
) -> Adapter:
    """The adapter of a chain.

    Args:
        flat: names all members.
        run_part: runs one of them as the library does; None of a chain that is never rebuilt, of couplings alone.
        maps: of the library: which members are invertible, and what permutations and affine maps they are.
        parts_of: the members as parts, where they differ from what ``run_part`` runs; raises Unfit.
        why_apart: why the couplings of this chain cannot run together, where they cannot.
    """

    def find(chain: Any) -> list[Part]:
        if parts_of is not None:
            return parts_of(chain)
        assert run_part is not None
        return [part_of(name, module, maps.known(module), run_part) for name, module in flat(chain)]

    def plan(chain: Any, options: Options) -> Plan:
        if options.memory == "store":
            if (why := why_apart(chain)) is not None:
                raise Unfit(why)
            fused = Fused(chain, flat, run_part, maps, options)
            like = next(p for p in chain.parameters() if p.is_floating_point())
            one = fused.launch is not None and fused.launch.has_tile(like, options.precision)
            return Plan(fused.describe(like), layout=fused, takes_precision=one)
        parts = find(chain)
        check_parts(parts)
        return Plan(f"{len(parts)} steps, rebuilt in the backward", layout=find)

    return Adapter(
        library=library,
        where=where,
        name=name,
        chain=True,
        plan=plan,
        inner=lambda chain: [module for _, module in flat(chain)],
        **what,
    )
