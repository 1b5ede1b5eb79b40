"""Chains of other libraries: their couplings run together (``fused.py``), or memory="invert" rebuilds activations.

A chain to be rebuilt is a list of ``Part``s, which become the steps of ``flows.reversible``. The backward evaluates
each conditioner of a coupling once (``evaluate_once.py``). Of any other part it runs the inverse and the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import has_values
from ..flows.reversible import Step, drops, inverts, reversible
from ..flows.undo import Context, Made, Outputs, Undone, undo
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit, adapter_for
from .evaluate_once import recalling
from .fused import Fused, Together
from .identity import PLAN, changed_method
from .maps import Maps
from .spline_chain import SplineChain
from .spline_curves import Other

Named = Iterator[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Part:
    """One step of a chain.

    Args:
        name: for messages.
        module: the first argument of ``run``, whose parameters it reads.
        run: (module, x, context, inverse) -> (y, log_det [B] or None).
        conditioners: those of a coupling; empty for any other part.
    """

    name: str
    module: nn.Module
    run: Callable[[Any, Tensor, Context, bool], Outputs]
    conditioners: tuple[nn.Module, ...] = ()

    def step(self, inverse: bool) -> Step:
        def undo_once(made: Made, context: Context) -> Undone:
            run, run_back = self._run_and_run_back(recalling(self.module, self.conditioners, made.tensors), inverse)
            with torch.no_grad():  # ``recalling`` gives the conditioners graphs of their own
                return undo(lambda x: run(x, context), lambda y: run_back(y, context), made)

        step = Step.of(self.name, self.module, *self._run_and_run_back(self.module, inverse))
        return replace(step, undo=undo_once) if self.conditioners else step

    def _run_and_run_back(self, module: Any, inverse: bool) -> tuple[Callable[..., Outputs], Callable[..., Tensor]]:
        return (
            lambda x, context: self.run(module, x, context, inverse),
            lambda y, context: self.run(module, y, context, not inverse)[0],
        )


def parts_to_invert(instance: Any, x: Any, find: Callable[[Any], list[Part]]) -> list[Part] | None:
    """The parts of a swapped instance that this call's backward is to rebuild; None where it stores activations.

    They are found again at every call. A part added since ``accelerate`` that cannot be rebuilt is warned of once.
    """
    plan = instance._linfast_plan
    if plan.options.memory == "store":
        return None
    is_replica = getattr(instance, "_is_replica", False)  # of nn.DataParallel: its weights are not parameters
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
    """(y, log_det) of the parts one after another, or of their inverse."""
    steps = [part.step(inverse) for part in parts]
    return reversible(steps[::-1] if inverse else steps, x, context, instance._linfast_plan.guard)


def check_parts(parts: Sequence[Part]) -> None:
    """Raise Unfit where a part cannot be rebuilt, or where none is a coupling, so that little memory is saved."""
    if not any(part.conditioners for part in parts):
        raise Unfit("stored: none of its steps is a known coupling")
    for part in parts:
        modules = [module for net in part.conditioners for module in net.modules()]
        if len(part.conditioners) > 1 and any(map(drops, modules)):
            raise Unfit(f"stored: the conditioners of its {part.name} have dropout, and the backward reorders them")


def per_sample(log_det: Any, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The log-determinant [B] from a library's: a number, a tensor of one value, or [B]."""
    if not isinstance(log_det, Tensor):
        return torch.full((x.shape[0],), log_det, dtype=dtype or x.dtype, device=x.device)
    return log_det.expand(x.shape[0]).to(dtype or log_det.dtype)


def part_of(name: str, module: nn.Module, known: bool, run: Callable[..., Outputs]) -> Part:
    """The module as a Part. Raises Unfit where it is not known to be invertible, or a method was replaced."""
    adapter, conditioners = adapter_for(module), tuple(nets_of([module]))
    changed = None if adapter is None else changed_method(module, (*adapter.methods, *adapter.assumes))
    if changed is not None or not (known or conditioners):
        raise Unfit(f"stored: its {type(module).__name__} is not known to be invertible")
    return Part(f"{name} ({type(module).__name__})", module, run, conditioners)


def nets_of(members: Iterable[nn.Module]) -> list[nn.Module]:
    """The conditioners of all couplings among the members."""
    adapters = [(module, adapter_for(module)) for module in members]
    return [net for module, adapter in adapters if adapter is not None for net in adapter.conditioners(module)]


def put_stubs(members: Sequence[nn.Module], draw: Draw) -> None:
    """Replace the conditioners of a copy's couplings by the stubs of their own checks, with scales near one."""
    for member in members:
        adapter = adapter_for(member)
        if adapter is not None and nets_of([member]):
            adapter.probe(member, draw)
        for module in member.modules():
            if isinstance(module, Stub):
                module.size = 1 / len(members)


def fused_of(owner: Any) -> Together | None:
    """The Together of a swapped module, renewed where it has changed; None where its couplings run one by one."""
    plan = vars(owner)[PLAN]
    if plan.fused is None:
        return None
    now: Together | None = plan.fused.renewed(owner)
    if now is not None and now is not plan.fused:
        vars(owner)[PLAN] = replace(plan, fused=now, layout=owner._linfast_adapter.layout(owner))
    return now


def run_chain(chain: Any, x: Any, context: Context, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """(y, log_det [B]) of a swapped chain; None where the library's own loop is to run.

    A chain that was swapped with memory="store" runs its couplings together, affine ones only without a context.
    """
    plan = vars(chain)[PLAN]
    if plan.fused is not None:
        fused = fused_of(chain) if plan.fused.takes(x, context) else None
        try:
            return None if fused is None else fused(chain, x, inverse, context)
        except Other:
            return None
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
        flat: chain -> (name, module) of all members.
        run_part: runs a member by the library's own code; None for a chain of couplings that is never rebuilt.
        maps: the library's invertible classes, and the permutations and affine maps that their instances are.
        parts_of: chain -> its parts, where ``run_part`` alone does not give them; raises Unfit.
        why_apart: chain -> why its couplings cannot run together, or None.
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
            arguments = chain, flat, run_part, maps, options
            try:
                return Fused(*arguments).plan(chain)
            except Unfit:
                return SplineChain(*arguments).plan(chain)
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
