"""Compares linfast's code for a module with the original, on bare copies and random inputs, before the swap."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from ..dispatch import has_values, plain_torch, uses_triton
from ..flows.drift import DriftWarning
from ..precision import full_precision, resolve_precision
from ..rows import all_lengths
from .adapter import Adapter, Draw, Plan, Unfit
from .identity import PLAN, modules_of, original_class, uncompiled, without_hooks
from .launch import lone_launch
from .swap import swap

_SEED = 20260101
# Relative L2 difference of one layer's outputs and gradients: some hundred roundings.
_TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same for a layer whose products run in this precision mode, whatever the original's precision.
_OF_MODES = {"exact": 2e-5, "high": 2e-4, "tf32": 1e-2, "fast": 1e-1}
# Times more for many steps, and for a chain: it has many layers, and rebuilt inputs add an error of the same size.
_CHAIN = 10
# Where terms cancel, as in the gradient of a reflection's vector, the original itself is less accurate than that.
# Then this many times its own error is allowed, up to so many times the tolerance.
_OWN_ERROR, _AT_MOST = 4, 10


def check_values(instance: Any) -> None:
    """Raise Unfit where nothing can be compared, because a tensor has no shape (lazy) or no values (meta, fake)."""
    tensors = _tensors(instance)
    if any(is_lazy(t) for t in tensors):
        raise Unfit("it has lazy modules, whose parameters the first call makes: call it once, then accelerate")
    if not all(map(has_values, tensors)):
        raise Unfit("it is on the meta device or fake: without values there is nothing to compare")


@torch.inference_mode(False)
@full_precision()
def difference(instance: Any, adapter: Adapter, plan: Plan) -> float:
    """Largest relative L2 difference in the instance's own dtype, on its own device.

    Neither the instance nor torch's random state is changed: two copies run, which have no hooks and
    share no tensor with it. Both compute float32 in full precision, the original in plain torch.

    Raises:
        Unfit: the difference is larger than allowed, in this dtype or in float64, or a copy raised an error.
    """
    like = next((t for t in _tensors(instance) if t.is_floating_point()), torch.empty(0, dtype=torch.float32))
    worst = 0.0
    for case in _cases(instance, adapter, plan, like):
        original, copied = (_copied(instance, adapter, case, case.dtype) for _ in range(2))
        with plain_torch():
            before = _run(original, adapter, case, like.device)
        swap(copied, adapter, adapter.plan_for(copied, plan.options))
        after = _run(copied, adapter, case, like.device)
        if len(before) != len(after):
            raise Unfit(f"it returns {len(after)} tensors, the original {len(before)}")
        least = case.least * max((float(b.double().norm()) for b in before), default=0.0)
        errors = [_relative(a, b, least) for a, b in zip(after, before, strict=True)]
        error = max(errors, default=0.0)
        if not error <= case.allowed and not _explained(errors, before, least, instance, adapter, case):
            other = "has other shapes or dtypes than the original, or infinite values,"
            far = other if error == math.inf else f"differs from the original by {error:.1e}"
            raise Unfit(f"{case.what} {far}{case.where} on a random input")
        worst = max(error, worst) if case.dtype == like.dtype or plan.fused is not None else worst
    return worst


def _copied(instance: Any, adapter: Adapter, case: _Case, dtype: torch.dtype) -> Any:
    copied = bare_copy(instance, dtype, case.emptied)
    adapter.copied(instance, copied)
    if case.training is not None and isinstance(instance, nn.Module):
        copied.train(case.training)
    return copied


def _explained(
    errors: Sequence[float], before: Sequence[Tensor], least: float, instance: Any, adapter: Adapter, case: _Case
) -> bool:
    """Whether the original's own rounding, seen by its results in float64, explains each of these differences."""
    if case.dtype == torch.float64 or not adapter.float64 or not max(errors) <= _AT_MOST * case.allowed:
        return False
    try:
        with plain_torch():
            exact = _run(
                _copied(instance, adapter, case, torch.float64), adapter, case, before[0].device, exact=True
            )
    except Unfit:  # it has tensors that stay in another dtype
        return False
    own = [_relative(b.double(), e.double(), least) for b, e in zip(before, exact, strict=True)]
    return all(error <= max(case.allowed, _OWN_ERROR * o) for error, o in zip(errors, own, strict=True))


@dataclass(frozen=True)
class _Case:
    """One comparison of two copies: the probe that both run, and the largest relative difference allowed.

    Args:
        what, where: parts of the message where the difference is larger.
        emptied: ids of modules to copy without parameters, buffers and submodules.
        training: whether the copies run in training mode; None for the instance's own mode.
        least: the least size to which a difference is relative, as a part of the largest output's or gradient's.
    """

    probe: Callable[[Any, Draw], Sequence[Tensor]]
    dtype: torch.dtype
    allowed: float
    what: str
    where: str = ""
    emptied: Collection[int] = ()
    training: bool | None = None
    least: float = 0.0


# Batch norm makes the gradient of the bias before it zero: the two codes differ in what rounding leaves of it.
_LEAST_OF_NETS = 1e-2


def _cases(instance: Any, adapter: Adapter, plan: Plan, like: Tensor) -> Iterator[_Case]:
    """With stubs as conditioners, in both dtypes; with its own, where it would run in one launch or one loop."""
    layers = _CHAIN if plan.fused is not None or adapter.chain or adapter.many_steps else 1
    features = plan.vectors
    what = "its couplings together" if plan.fused is not None else "the layer with its own conditioner"
    if plan.fused is None or adapter.is_coupling:
        emptied = {id(uncompiled(m)) for of in (adapter.conditioners, adapter.emptied) for m in of(instance)}
        # A class that people copy may behave differently in the other mode, for instance by dropout.
        modes = (None,) if isinstance(adapter.where, str) else (True, False)
        dtypes = dict.fromkeys((torch.float64, like.dtype) if adapter.float64 else (like.dtype,))
        for dtype, training in itertools.product(dtypes, modes):
            allowed = max(adapter.tolerance, _TOLERANCES.get(dtype, 0.0) * layers)
            if adapter.many_steps and plan.takes_precision and dtype == like.dtype and uses_triton(like):
                allowed = max(allowed, _OF_MODES[resolve_precision(like, plan.options.precision)] * layers)
            yield _Case(adapter.probe, dtype, allowed, "it", f" in {str(dtype)[6:]}", emptied, training)
        if features is None and adapter.is_coupling and uses_triton(like):
            launch = lone_launch(adapter.members(instance, plan.layout), like, plan.options.precision)
            features, what = None if launch is None else launch.features, "the layer in one launch"
    if features is not None:
        probe = lambda copied, draw: adapter.vectors(copied, draw, features)  # noqa: E731
        dtype, allowed = getattr(plan.fused, "compared_in", None), adapter.tolerance
        if dtype is None:
            mode, dtype = resolve_precision(like, plan.options.precision), like.dtype
            allowed = max(_TOLERANCES.get(dtype, 0.0), _OF_MODES[mode]) * layers
        yield _Case(probe, dtype, allowed, what, least=_LEAST_OF_NETS)


def kind_of(instance: Any, adapter: Adapter, plan: Plan) -> Hashable:
    """Equal for two instances that run the same code on tensors of the same shapes: one check serves both."""
    own = id(instance) if not isinstance(instance, nn.Module) else None
    modules = instance.named_modules() if isinstance(instance, nn.Module) else ()
    parts = tuple((path, original_class(module), _settings(module)) for path, module in modules)
    tensors = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in _tensors(instance))
    return adapter, parts, tensors, plan.runs, plan.kind, plan.options, own


def _settings(module: nn.Module) -> Hashable:
    """The module's own attributes that are plain values, and those that are functions, by identity."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, value if isinstance(value, plain) else id(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, plain) or callable(value)
    )


def _run(instance: Any, adapter: Adapter, case: _Case, device: torch.device, exact: bool = False) -> list[Tensor]:
    """The probe's outputs and the gradients of a random sum of them; ``exact``: in float64, of the same inputs."""
    inputs: list[Tensor] = []
    generator = torch.Generator().manual_seed(_SEED)

    def draw(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, case.dtype)
        value = (value.double() if exact else value).requires_grad_()
        inputs.append(value)
        return value

    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        all_lengths(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", DriftWarning)  # a layer that drifts even here must store
        torch.manual_seed(_SEED)
        try:
            outputs = list(case.probe(instance, draw))
            wanted = inputs + [p for p in _tensors(instance) if p.requires_grad]
            # A sum, because torch.autograd.grad with gradients of the outputs imports sympy, which takes a second.
            total = sum(((o.double() * _weights(o)).sum() for o in outputs), start=torch.zeros((), device=device))
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if total.requires_grad:  # a sampler's are not differentiable
                found = torch.autograd.grad(total, wanted, allow_unused=True)
        except Unfit:
            raise
        except Exception as error:
            if adapter.where is None:
                raise Unfit(
                    f"another class called {adapter.name}: it fails on inputs that fit the repository's"
                ) from error
            what = "the original" if PLAN not in vars(instance) else "linfast's code"
            raise Unfit(f"{what} raised {type(error).__name__} on a random input: {error}") from error
    return [o.detach() for o in outputs] + [torch.zeros(()) if g is None else g for g in found]


def _weights(output: Tensor) -> Tensor:
    """Fixed numbers of the output's shape, no two of them equal."""
    return torch.arange(output.numel(), device=output.device, dtype=torch.float64).sin().view(output.shape)


def _relative(actual: Tensor, expected: Tensor, least: float) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(error / size.clamp_min(least)) if size > 0 else float(error)


def _tensors(instance: Any) -> Sequence[Tensor]:
    return [t for module in modules_of(instance).values() for t in (*module.parameters(), *module.buffers())]


def bare_copy(instance: Any, dtype: torch.dtype, emptied: Collection[int]) -> Any:
    """A copy of the original class, without hooks, in this dtype, that shares nothing with the instance.

    A compiled module is copied as before compilation. Modules whose ids are in ``emptied`` are copied without
    parameters, buffers and submodules, and must not run.

    Raises:
        Unfit: an attribute cannot be copied.
    """
    memo: dict[int, Any] = {}
    attributes: list[tuple[Any, dict[str, Any]]] = []
    found = [instance]
    for each in found:  # grows below: all modules and tensors are in ``memo`` before any attribute is copied
        inside = uncompiled(each)
        if id(inside) not in memo:
            memo[id(inside)], own = _begun(inside, dtype, id(inside) in emptied)
            attributes.append((memo[id(inside)], own))
            for value in tree_leaves(list(own.values())):
                if isinstance(value, nn.Module):
                    found.append(value)
                elif isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = _cast(value, dtype)
        memo[id(each)] = memo[id(inside)]
    for copied, own in attributes:
        vars(copied).update({name: _deep_copy(name, value, type(copied), memo) for name, value in own.items()})
    return memo[id(instance)]


def _begun(instance: Any, dtype: torch.dtype, emptied: bool) -> tuple[Any, dict[str, Any]]:
    """The copy, and the attributes of the instance that are still to be copied to it."""
    if isinstance(instance, torch.jit.ScriptModule):  # its attributes are not in its __dict__
        with torch.no_grad():  # else its copy's parameters have a graph
            script = _deep_copy("the code", instance, type(instance), {}).to(dtype)
        for parameter, of in zip(script.parameters(), instance.parameters(), strict=True):
            parameter.requires_grad_(of.requires_grad)
        return script, {}
    copied: Any = object.__new__(original_class(instance))
    is_module = isinstance(instance, nn.Module)
    state = nn.Module.__getstate__(instance) if is_module else vars(instance)  # without its compiled call
    own = {key: value for key, value in state.items() if key != PLAN} | (without_hooks() if is_module else {})
    if emptied:
        vars(copied).update(own, _modules={}, _parameters={}, _buffers={})
        return copied, {}
    return copied, own


def _deep_copy(name: str, value: Any, of: type, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise Unfit(f"{name} of its {of.__name__} cannot be copied for the check: {error}") from error


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in this dtype, so that writes to it, such as an initialisation, do not reach the original."""
    cast = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return nn.Parameter(cast, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cast
