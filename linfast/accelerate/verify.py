"""Comparing what would run with the original, on bare copies and random inputs, before anything is swapped."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Hashable, Sequence
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
from .fused import Fused
from .identity import PLAN, original_class, uncompiled, without_hooks
from .launch import lone_launch
from .swap import swap

__all__ = ["check_values", "code_of", "difference", "kind_of"]

Probe = Callable[[Any, Draw], Sequence[Tensor]]

_SEED = 20260101
# Relative L2 of the outputs and gradients of one layer: some hundred roundings.
_TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of a layer whose products are in such a mode, whatever the original's are in.
_OF_MODES = {"exact": 2e-5, "high": 2e-4, "tf32": 1e-2, "fast": 1e-1}
_CHAIN = 10  # a chain is many layers, and its rebuilt inputs are as far off again


def check_values(instance: Any) -> None:
    """Raise Unfit where there is nothing to compare: of all tensors one without a shape, or without values."""
    tensors = _tensors(instance)
    if any(is_lazy(t) for t in tensors):
        raise Unfit("it has lazy modules, which its first call makes: call it once, then accelerate")
    if not all(map(has_values, tensors)):
        raise Unfit("it is on the meta device or fake: without values there is nothing to compare")


@torch.inference_mode(False)
@full_precision()
def difference(instance: Any, adapter: Adapter, plan: Plan) -> float:
    """Largest relative L2 difference, in float64 and in the instance's own dtype on its own device.

    Neither the instance nor torch's random state is touched: copies without hooks are run, which
    share no buffer with it. Both compute float32 in full precision, the original in plain torch.

    Raises:
        Unfit: it is larger than allowed, or one of the two raised.
    """
    like = next((t for t in _tensors(instance) if t.is_floating_point()), None)
    device = torch.device("cpu") if like is None else like.device
    own = torch.float32 if like is None else like.dtype
    if isinstance(plan.layout, Fused):
        return _difference_whole(instance, adapter, plan, like, device, plan.layout.features)
    hollow = {id(uncompiled(module)) for of in (adapter.conditioners, adapter.hollow) for module in of(instance)}
    worst = 0.0
    # What a copied class does in the other mode is not known beforehand: it may drop out, say.
    modes = (None,) if isinstance(adapter.where, str) else (True, False)
    dtypes = dict.fromkeys((torch.float64, own) if adapter.float64 else (own,))
    for dtype, training in itertools.product(dtypes, modes):
        allowed = max(adapter.tolerance, _TOLERANCES.get(dtype, 0.0) * (_CHAIN if adapter.chain else 1))
        error = _difference(instance, adapter, plan, dtype, device, adapter.probe, hollow, training)
        if not error <= allowed:
            raise Unfit(f"it {_how_far(error)} in {str(dtype)[6:]} on a random input")
        worst = max(error, worst) if dtype == own else worst
    features = None
    if adapter.is_coupling and like is not None and uses_triton(like):
        launch = lone_launch(adapter.members(instance, plan.layout), like, plan.options.precision)
        features = None if launch is None else launch.features
    return max(worst, _difference_whole(instance, adapter, plan, like, device, features))


def _difference_whole(
    instance: Any, adapter: Adapter, plan: Plan, like: Tensor | None, device: torch.device, features: int | None
) -> float:
    """The same of a layer in one launch, or of a chain together, with its own conditioners.

    0 where it does not run so here, which is where there are no features.
    """
    if like is None or features is None:
        return 0.0
    error = _difference(
        instance, adapter, plan, like.dtype, device, lambda copy, draw: adapter.vectors(copy, draw, features), ()
    )
    mode = resolve_precision(like, plan.options.precision)
    allowed = max(_TOLERANCES.get(like.dtype, 0.0), _OF_MODES[mode]) * (_CHAIN if adapter.chain else 1)
    if not error <= allowed:
        what = "its couplings together" if adapter.chain else "the layer in one launch"
        raise Unfit(f"{what} {_how_far(error)} on a random input")
    return error


def kind_of(instance: Any, adapter: Adapter, plan: Plan) -> Hashable:
    """Equal for two instances that run the same code on tensors of the same shapes: one check serves both."""
    own = id(instance) if not isinstance(instance, nn.Module) else None
    return adapter, code_of(instance), plan.runs, plan.options, own


def code_of(instance: Any) -> Hashable:
    """What decides which code an instance runs, and on tensors of which shapes; its own may move, and its mode."""
    modules = dict(instance.named_modules()) if isinstance(instance, nn.Module) else {}
    parts = tuple((path, original_class(m), _settings(m)) for path, m in modules.items())
    return parts, tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in _tensors(instance))


def _settings(module: nn.Module) -> Hashable:
    """What its own attributes hold, but for tensors, modules and torch's bookkeeping; others by identity."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, value if isinstance(value, plain) else id(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, plain) or callable(value)
    )


def _difference(
    instance: Any,
    adapter: Adapter,
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    probe: Probe,
    hollow: Collection[int],
    training: bool | None = None,
) -> float:
    original, copied = (bare_copy(instance, dtype, hollow) for _ in range(2))
    if training is not None and isinstance(instance, nn.Module):
        original.train(training), copied.train(training)
    with plain_torch():
        before = _run(original, adapter, probe, dtype, device)
    swap(copied, adapter, adapter.plan_for(copied, plan.options))
    after = _run(copied, adapter, probe, dtype, device)
    if len(before) != len(after):
        raise Unfit(f"it returns {len(after)} tensors, the original {len(before)}")
    return max((_relative(a, b) for a, b in zip(after, before, strict=True)), default=0.0)


def _run(instance: Any, adapter: Adapter, probe: Probe, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The probe's outputs and the gradients of a random sum of them."""
    inputs: list[Tensor] = []
    generator = torch.Generator().manual_seed(_SEED)

    def draw(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        inputs.append(value.requires_grad_())
        return value

    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        all_lengths(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", DriftWarning)  # what strays here had better be stored
        torch.manual_seed(_SEED)
        try:
            outputs = list(probe(instance, draw))
            total = sum(
                ((o.double() * _weights(o)).sum() for o in outputs),
                start=torch.zeros((), dtype=torch.float64, device=device),
            )
            wanted = inputs + [p for p in _tensors(instance) if p.requires_grad]
            differentiable = total.requires_grad  # a sampler is not
            gradients = torch.autograd.grad(total, wanted, allow_unused=True) if differentiable else ()
        except Unfit:
            raise
        except Exception as error:
            if adapter.where is None:
                raise Unfit(
                    f"another class called {adapter.name}: it fails on what fits the repository's"
                ) from error
            what = "the original" if PLAN not in vars(instance) else "what would replace it"
            raise Unfit(f"{what} raised {type(error).__name__} on a random input: {error}") from error
    return [o.detach() for o in outputs] + [torch.zeros(()) if g is None else g for g in gradients]


def _weights(output: Tensor) -> Tensor:
    """Fixed numbers of the output's shape, no two alike."""
    return torch.arange(output.numel(), device=output.device, dtype=torch.float64).sin().view(output.shape)


def _how_far(error: float) -> str:
    if error == math.inf:
        return "has other shapes or dtypes than the original, or infinite values,"
    return f"differs from the original by {error:.1e}"


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(error / size) if size > 0 else float(error)


def _tensors(instance: Any) -> Sequence[Tensor]:
    modules = (
        [instance]
        if isinstance(instance, nn.Module)
        else [v for v in vars(instance).values() if isinstance(v, nn.Module)]
    )
    return [t for m in modules for t in itertools.chain(m.parameters(), m.buffers())]


def bare_copy(instance: Any, dtype: torch.dtype, hollow: Collection[int] = ()) -> Any:
    """A copy of the original class, without hooks, its tensors in this dtype, that shares nothing with it.

    What was compiled is copied as it was before.

    Args:
        hollow: ids of modules that are copied without parameters, buffers and modules, and are not run.

    Raises:
        Unfit: it has an attribute that cannot be copied.
    """
    memo: dict[int, Any] = {}
    attributes: list[tuple[Any, dict[str, Any]]] = []
    _begin(instance, dtype, hollow, memo, attributes)
    for copied, own in attributes:
        vars(copied).update({name: _deep_copy(name, value, type(copied), memo) for name, value in own.items()})
    return memo[id(instance)]


def _deep_copy(name: str, value: Any, of: type, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise Unfit(f"{name} of its {of.__name__} cannot be copied for the check: {error}") from error


def _begin(
    instance: Any,
    dtype: torch.dtype,
    hollow: Collection[int],
    memo: dict[int, Any],
    attributes: list[tuple[Any, dict[str, Any]]],
) -> None:
    """The copies of modules and of tensors, into ``memo``; and what their attributes are to be copies of."""
    if id(instance) in memo:
        return
    if isinstance(instance, torch.jit.ScriptModule):  # whose attributes are not its dictionary's
        with torch.no_grad():  # else its copy's parameters have a graph
            script = _deep_copy("the code", instance, type(instance), {}).to(dtype)
        memo[id(instance)] = script
        for parameter, of in zip(script.parameters(), instance.parameters(), strict=True):
            parameter.requires_grad_(of.requires_grad)
        return
    inside = uncompiled(instance)
    if inside is not instance:
        _begin(inside, dtype, hollow, memo, attributes)
        memo[id(instance)] = memo[id(inside)]
        return
    copied: Any = object.__new__(original_class(instance))
    memo[id(instance)] = copied
    state = nn.Module.__getstate__(instance) if isinstance(instance, nn.Module) else vars(instance)
    own = {key: value for key, value in state.items() if key != PLAN}  # without what it was compiled to
    if isinstance(instance, nn.Module):
        own |= without_hooks()
    if id(instance) in hollow:
        vars(copied).update(own, _modules={}, _parameters={}, _buffers={})
        return
    attributes.append((copied, own))
    for value in tree_leaves(list(own.values())):
        if isinstance(value, nn.Module):
            _begin(value, dtype, hollow, memo, attributes)
        elif isinstance(value, Tensor) and id(value) not in memo:
            cast = _cast(value, dtype)
            memo[id(value)] = nn.Parameter(cast, value.requires_grad) if isinstance(value, nn.Parameter) else cast


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy: what is done to it in place, such as an initialisation, is not done to the original."""
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
