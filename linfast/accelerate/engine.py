"""accelerate and restore: walking a model, swapping what is recognised, and reporting."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..checks import check_choice
from ..dispatch import has_global_hook
from ..precision import PRECISIONS
from .adapter import Adapter, Options, Unfit, adapter_for, parent_adapter
from .chain import fused_of
from .identity import (
    changed_method,
    is_hooked,
    is_patched,
    is_sharded,
    modules_of,
    original_class,
    other_arguments,
)
from .mlp import find_mlp
from .report import Report, Row
from .swap import Swapped, swap, swap_back
from .verify import check_values, difference, kind_of

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
    if removed:
        raise TypeError(
            f"accelerate() takes no {', '.join(removed)}: compile an accelerated model with torch.compile(model), "
            "and capture its calls with torch.cuda.graph (docs/accelerate.md shows both)"
        )
    _check_model(model)
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    check_choice("memory", memory, ("store", "invert"))
    if not isinstance(keep_defects, (list, tuple, set, frozenset)) or any(d not in DEFECTS for d in keep_defects):
        raise ValueError(f"keep_defects must be a collection of {', '.join(DEFECTS)}; got {keep_defects!r}")
    restore(model)
    try:
        rows = _swap_all(model, Options(frozenset(keep_defects), memory, precision))
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


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module) and adapter_for(model) is None:
        raise TypeError(f"model must be an nn.Module or an object of a known class; got {name}")
    if not hasattr(model, "__dict__"):
        raise TypeError(f"model must keep its attributes in a __dict__; {name} has __slots__ alone")


def _objects(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, object) of the model, if it is no module, and of every module in it."""
    if not isinstance(model, nn.Module):
        yield "", model
    for path, module in modules_of(model).items():
        yield from module.named_modules(prefix=path)


def _swap_all(model: Any, options: Options) -> list[Row]:
    rows: list[Row] = []
    passed_by: set[int] = set()
    chained: set[int] = set()
    checked: dict[Hashable, float] = {}  # the errors seen, by kind
    for path, instance in _objects(model):
        adapter = adapter_for(instance)
        if id(instance) in passed_by or (adapter and adapter.chain and id(instance) in chained):
            continue
        if adapter is None:
            row = _derived(path, instance, options)
        else:
            row = _try_to_swap(path, instance, adapter, options, checked)
        if adapter and row and row.swapped:
            if adapter.chain:
                chained |= {id(module) for module in instance.modules()}
            else:
                passed_by |= {id(module) for module in adapter.inner(instance)}
            if options.memory == "invert" and id(instance) not in chained and adapter.conditioners(instance):
                why = f"stored: {adapter.stored}" if adapter.stored else ""
                row = replace(row, note="; ".join(filter(None, (row.note, why))))
        if row:
            rows.append(row)
    for _, instance in _objects(model):
        if isinstance(instance, Swapped) and instance._linfast_adapter.chain:
            fused_of(instance)  # whose members have been swapped since
    return rows


def _derived(path: str, instance: Any, options: Options) -> Row | None:
    """Of a module of no known class, and None where no class that it derives from is known."""
    parent = parent_adapter(instance)
    if parent is None or (parent.chain and options.memory == "store"):
        return None
    note = f"derived from {parent.title}: its maths may differ; see lf.register_adapter"
    return Row(path, type(instance).__name__, None, note)


def _try_to_swap(
    path: str, instance: Any, adapter: Adapter, options: Options, checked: dict[Hashable, float]
) -> Row | None:
    """Swap it if it fits; None where the options give no reason to."""
    if not adapter.wanted(options):
        return None
    what, plan = "", None
    try:
        check_values(instance)
        mlps = filter(None, map(find_mlp, adapter.conditioners(instance)))
        what = " and ".join(dict.fromkeys(map(str, mlps)))
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
