"""accelerate and restore: walking a model, swapping what is recognised, and reporting."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..checks import check_choice
from ..precision import PRECISIONS
from .adapter import Adapter, Options, Unfit, adapter_for, parent_adapter
from .chain import fused_of
from .identity import (
    changed_method,
    has_global_hook,
    is_hooked,
    is_patched,
    is_sharded,
    original_class,
    other_arguments,
)
from .mlp import find_mlp
from .report import Report, Row
from .swap import Swapped, swap, swap_back
from .verify import check_values, difference, kind_of

__all__ = ["DEFECTS", "accelerate", "restore"]

DEFECTS = ("actnorm_reinit", "rk_collapse")
"""Known defects of the originals, fixed unless ``keep_defects`` names them.

actnorm_reinit  The reference's ActNorm remembers in a plain bool that it was initialised: one
                that is loaded from a state_dict throws the loaded values away at its first batch.
rk_collapse     The reference builds the Runge-Kutta sampling matrix with k3 = k2 and without
                composing the stages: its one step is not its many steps.
"""


def accelerate(
    model: Any,
    precision: str | None = None,
    memory: str = "store",
    keep_defects: Collection[str] = (),
    **removed: Any,
) -> Report:
    """Make the modules of known libraries in ``model`` run on linfast's ops, in place.

    The model stays the same object with the same parameters, state_dict keys, hooks and classes
    for isinstance, and pickles as what it was (a deep copy stays accelerated, ``copy.copy`` gives
    the original class). Each module is swapped only after its outputs, inverse and gradients on a
    small random input agree with the original's; a class that is derived from a known one, a
    patched method, a hook on a module that would be passed by, a lazy module, one on the meta device:
    it is left alone, and the report says why. Accelerating again starts from the original.

    Masks and permutations that are written to or replaced later are followed; on a GPU not what is written
    through ``.data``, which torch does not count: accelerate again. Layers that have some (zuko, nflows,
    glasflow, normflows MaskedAffineFlow, FrEIA AllInOneBlock) run their library's own code under torch.compile,
    torch.export and torch.jit.trace, and where an ensemble under torch.vmap has a mask per model.

    Args:
        model: an nn.Module, or an object of a known class that holds one, such as the
            reference repository's FlowMatcher.
        precision: of the fused kernels' products: "exact", "high", "tf32" or "fast" (linfast.precision);
            None follows torch's settings. The report says what it reaches: products that are torch's
            follow torch's own settings.
        memory: "store": the backward keeps what it needs. "invert": a chain of invertible steps (the
            reference's g, nflows' CompositeTransform, normflows' NormalizingFlow, FrEIA's SequenceINN)
            keeps its input and output, and its activations are chained in the backward
            (linfast.flows.reversible). A chain with a step that is not known to be invertible stores, also
            where the step was put in later, which is said once. A conditioner that reads a tensor from
            outside its arguments that needs a gradient is an error at the call (RuntimeError).
        keep_defects: which of ``DEFECTS`` to leave as they are.

    Raises:
        TypeError: a model of another kind, or an argument that does not exist.
        ValueError: an option that does not exist or cannot be had here.
    """
    _check(model, precision, memory, keep_defects, removed)
    restore(model)
    options = Options(frozenset(keep_defects), memory, precision)
    rows: list[Row] = []
    passed_by: set[int] = set()
    chained: set[int] = set()
    checked: dict[Hashable, float] = {}
    try:
        for path, instance in _objects(model):
            if id(instance) in passed_by or (id(instance) in chained and _is_chain(instance)):
                continue
            row = _try_to_swap(path, instance, options, checked)
            if row is None:
                continue
            if row.swapped and _is_chain(instance):
                chained |= {id(module) for module in instance.modules()}
            elif row.swapped:
                passed_by |= {id(module) for module in instance._linfast_adapter.inner(instance)}
            if row.swapped and memory == "invert" and id(instance) not in chained:
                row = _with_note(row, _why_stored(instance))
            rows.append(row)
        for _, instance in _objects(model):
            if isinstance(instance, Swapped) and _is_chain(instance):
                fused_of(instance)  # whose members have been swapped since
    except BaseException:
        restore(model)
        raise
    return Report(tuple(rows), precision)


def restore(model: Any) -> None:
    """Undo ``accelerate``: every module runs its library's own code again, on the values it has now.

    Raises:
        ValueError: a swapped module was given another class since, as by a parametrization.
    """
    _check_model(model)
    for _, instance in list(_objects(model)):
        if isinstance(instance, Swapped):
            if "_linfast_original" not in vars(type(instance)):
                raise ValueError(f"{type(instance).__name__} was derived from after accelerate; undo that first")
            swap_back(instance)


_MEMORY = ("store", "invert")
_REMOVED = (
    "accelerate() takes no {}: compile an accelerated model with torch.compile(model), "
    "and capture its calls with torch.cuda.graph (docs/accelerate.md shows both)"
)


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module) and adapter_for(model) is None:
        raise TypeError(f"model must be an nn.Module or an object of a known class; got {name}")
    if not hasattr(model, "__dict__"):
        raise TypeError(f"model must keep its attributes in a __dict__; {name} has __slots__ alone")


def _check(
    model: Any, precision: str | None, memory: str, keep_defects: Collection[str], removed: Mapping[str, Any]
) -> None:
    if removed:
        raise TypeError(_REMOVED.format(", ".join(removed)))
    _check_model(model)
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    check_choice("memory", memory, _MEMORY)
    if not isinstance(keep_defects, (list, tuple, set, frozenset)) or any(d not in DEFECTS for d in keep_defects):
        raise ValueError(f"keep_defects must be a collection of {', '.join(DEFECTS)}; got {keep_defects!r}")


def _objects(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, object) of the model, if it is no module, and of every module in it."""
    if isinstance(model, nn.Module):
        yield from model.named_modules()
        return
    yield "", model
    for name, value in vars(model).items():
        if isinstance(value, nn.Module):
            yield from value.named_modules(prefix=name)


def _try_to_swap(path: str, instance: Any, options: Options, checked: dict[Hashable, float]) -> Row | None:
    """Swap it if it fits; None for a module of no known class. ``checked``: the errors seen, by kind."""
    adapter = adapter_for(instance)
    if adapter is None:
        parent = parent_adapter(instance)
        if parent is None or (parent.chain and options.memory == "store"):
            return None
        name = type(instance).__name__
        return Row(path, name, None, f"derived from {parent.title}: its maths may differ; see lf.register_adapter")
    if not adapter.wanted(options):
        return None
    what, plan = "", None
    try:
        check_values(instance)
        what = _describe(instance, adapter)
        _check_unchanged(instance, adapter)
        plan = adapter.plan_for(instance, options)
        kind = kind_of(instance, adapter, plan)
        if kind not in checked:
            checked[kind] = difference(instance, adapter, plan)
    except Unfit as reason:
        if plan is None and adapter.chain and options.memory == "store":  # its members run one by one
            return None
        return Row(path, adapter.title, None, str(reason), what)
    except MemoryError:
        raise
    except Exception as error:  # of code that is not ours: the rest of the model is accelerated all the same
        why = f"it is not built as {adapter.title} is: {type(error).__name__}: {error}"
        return Row(path, adapter.title, None, why, what)
    swap(instance, adapter, plan)
    return Row(path, adapter.title, plan.runs, plan.note, what, checked[kind], plan.takes_precision)


def _is_chain(instance: Any) -> bool:
    adapter = adapter_for(instance)
    return adapter is not None and adapter.chain


def _why_stored(instance: Any) -> str:
    adapter: Adapter = instance._linfast_adapter
    return f"stored: {adapter.stored}" if adapter.stored and adapter.conditioners(instance) else ""


def _with_note(row: Row, note: str) -> Row:
    return replace(row, note="; ".join(part for part in (row.note, note) if part))


def _check_unchanged(instance: Any, adapter: Adapter) -> None:
    """Raise Unfit where this is no longer what its library made."""
    changed = changed_method(instance, (*adapter.methods, *adapter.assumes))
    cls = original_class(instance)
    if changed is not None:
        what = "was replaced: not the library's own" if hasattr(cls, changed) else "is missing"
        raise Unfit(f"its {changed} {what}")
    for name, method in adapter.methods.items():
        if other_arguments(getattr(cls, name), method):
            raise Unfit(f"its {name} takes other arguments than {adapter.title}'s, or has other defaults")
    if is_patched(instance):
        raise Unfit("a method was put on it: not the library's own")
    if not isinstance(instance, nn.Module):
        return
    if not adapter.chain and has_global_hook():
        raise Unfit("a global module hook is registered, which would be passed by: remove it first")
    inner = tuple(adapter.inner(instance))
    if any(is_hooked(module) for module in inner):
        raise Unfit("a module inside has a hook or a parametrization, which would be passed by")
    if any(is_sharded(module) for module in (instance, *inner)):
        raise Unfit("its parameters are sharded or of another tensor class")


def _describe(instance: Any, adapter: Adapter) -> str:
    """What its conditioners are, where they are MLPs."""
    found = [find_mlp(module) for module in adapter.conditioners(instance)]
    return " and ".join(dict.fromkeys(str(mlp) for mlp in found if mlp is not None))
