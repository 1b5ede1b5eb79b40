"""accelerate and restore: walk over a model, swap the recognised modules and report."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..checks import check_choice
from ..dispatch import has_global_hook
from ..flows.bijection import Bijection
from ..linearizer import Linearizer
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
from .residual import find_residual
from .swap import Swapped, swap, swap_back
from .unknown import unknown_layers
from .verify import check_values, difference, kind_of

DEFECTS = ("actnorm_reinit", "rk_collapse")
"""Known defects of the research repository's classes, fixed unless ``keep_defects`` names them.

actnorm_reinit  ActNorm stores in a plain bool whether it was initialised, which a state_dict does not
                contain. After loading one, it overwrites the loaded values at its first batch.
rk_collapse     FlowMatcher builds the Runge-Kutta sampling matrix with k3 = k2 and without
                composing the stages, so that its one step differs from its many steps.
"""


def accelerate(
    model: Any,
    precision: str | None = None,
    memory: str = "store",
    keep_defects: Collection[str] = (),
    **removed: Any,
) -> Report:
    """Make the modules of known libraries in ``model`` run on linfast's ops, in place.

    The model stays the same object, with the same parameters, state_dict keys and hooks, and isinstance
    still holds. It pickles as its original classes; a deep copy stays accelerated, ``copy.copy`` gives the
    original class. A module is swapped only if its outputs, inverse and gradients on a small random input
    agree with the original's. Subclasses of known classes are left alone, as are modules with a patched
    method, a hook on a submodule whose call would be bypassed, lazy parameters or tensors on the meta
    device. The returned report gives the reason, and it counts the layers of these libraries for which linfast
    has no formula, such as planar flows. A second call starts from the originals.

    Of a masked autoregressive transform only the inverse is replaced; docs/accelerate.md says where.

    Later changes of masks and permutations take effect; on a GPU, after a write through ``.data``, which
    torch does not count, call accelerate again. Layers with masks or permutations (zuko, nflows, glasflow,
    normflows' masked flows, FrEIA AllInOneBlock) run their library's own code under torch.compile,
    torch.export and torch.jit.trace, and under torch.vmap over an ensemble with one mask per model.

    Args:
        model: an nn.Module, or an object of a known class that holds modules, such as the research
            repository's FlowMatcher.
        precision: of the fused kernels' matrix products: "exact", "high", "tf32" or "fast" (linfast.precision).
            None follows torch's settings, as torch's products always do. The report counts the modules affected.
        memory: "store": autograd stores activations. "invert": a chain of invertible layers (the
            repository's g, nflows' CompositeTransform, normflows' NormalizingFlow, FrEIA's SequenceINN)
            stores its input and output, and rebuilds its activations in the backward
            (linfast.flows.reversible). A chain with a layer that is not known to be invertible stores
            its activations; if the layer was added later, a warning says so once. A call raises RuntimeError
            if a conditioner reads, from outside its arguments, a tensor that requires a gradient.
        keep_defects: which of ``DEFECTS`` to leave as they are.

    Raises:
        TypeError: ``model`` is neither of the two, or an argument is unknown.
        ValueError: an option has an unknown value, or ``restore`` raises it.
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
        unknown = unknown_layers(o for _, o in _objects(model) if isinstance(o, nn.Module))
    except BaseException:
        restore(model)
        raise
    own = any(isinstance(o, (Bijection, Linearizer)) for _, o in _objects(model))
    return Report(tuple(rows), precision, unknown, own)


def restore(model: Any) -> None:
    """Undo ``accelerate``: every module runs its library's own code again, with its current parameters.

    Raises:
        TypeError: ``model`` is neither an nn.Module nor an object of a known class.
        ValueError: the class of a swapped module was changed since, for instance by a parametrization.
    """
    _check_model(model)
    for _, instance in list(_objects(model)):
        if isinstance(instance, Swapped):
            if "_linfast_original" not in vars(type(instance)):
                raise ValueError(f"{type(instance).__name__} was subclassed after accelerate; undo that first")
            swap_back(instance)


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module) and adapter_for(model) is None:
        inside = [part for part, value in getattr(model, "__dict__", {}).items() if isinstance(value, nn.Module)]
        hint = f": pass its {' or its '.join(inside)}" if inside else ""
        raise TypeError(f"model must be an nn.Module or an object of a known class; got {name}{hint}")
    if not hasattr(model, "__dict__"):
        raise TypeError(f"model must keep its attributes in a __dict__; {name} has __slots__ alone")


def _objects(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, object) of the model, where it is not a module itself, and of every module in it."""
    if not isinstance(model, nn.Module):
        yield "", model
    for path, module in modules_of(model).items():
        yield from module.named_modules(prefix=path)


def _swap_all(model: Any, options: Options) -> list[Row]:
    rows: list[Row] = []
    passed_by: set[int] = set()
    chained: set[int] = set()
    checked: dict[Hashable, float] = {}  # the checks' errors, by ``kind_of``
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
        if isinstance(instance, Swapped):
            fused_of(instance)  # renews it: its members have been swapped since
    return rows


def _derived(path: str, instance: Any, options: Options) -> Row | None:
    """The row of an instance of an unknown class that derives from a known one; else None."""
    parent = parent_adapter(instance)
    if parent is None or (parent.chain and options.memory == "store"):
        return None
    note = f"derived from {parent.title}: its maths may differ; see lf.register_adapter"
    return Row(path, type(instance).__name__, None, note)


def _try_to_swap(
    path: str, instance: Any, adapter: Adapter, options: Options, checked: dict[Hashable, float]
) -> Row | None:
    """Swap the instance if it fits and passes the check. None where the report needs no row."""
    if not adapter.wanted(options):
        return None
    what, plan = "", None
    try:
        check_values(instance)
        _check_unchanged(instance, adapter)
        known = [find_mlp(net) or find_residual(net) for net in adapter.conditioners(instance)]
        what = " and ".join(dict.fromkeys(str(net) for net in known if net is not None))
        plan = adapter.plan_for(instance, options)
        kind = kind_of(instance, adapter, plan)
        if kind not in checked:
            checked[kind] = difference(instance, adapter, plan)
    except Unfit as reason:
        if plan is None and adapter.chain and options.memory == "store":  # its members are swapped one by one
            return None
        return Row(path, adapter.title, None, str(reason), what)
    except MemoryError:
        raise
    except Exception as error:  # from code that is not ours; the rest of the model is still accelerated
        why = f"it is not built as {adapter.title} is: {type(error).__name__}: {error}"
        return Row(path, adapter.title, None, why, what)
    swap(instance, adapter, plan)
    return Row(path, adapter.title, plan.runs, plan.note, what, checked[kind], plan.takes_precision)


def _check_unchanged(instance: Any, adapter: Adapter) -> None:
    """Raise Unfit where a method or hook was changed, or the parameters are of another tensor class."""
    changed = changed_method(instance, (*adapter.methods, *adapter.assumes))
    cls = original_class(instance)
    if changed is not None:
        what = "was replaced: not the library's own" if hasattr(cls, changed) else "is missing"
        raise Unfit(f"its {changed} {what}")
    for name, method in adapter.methods.items():
        if other_arguments(getattr(cls, name), method):
            raise Unfit(f"its {name} takes other arguments than {adapter.title}'s, or has other defaults")
    if is_patched(instance):
        raise Unfit("an attribute of the instance shadows a method: not the library's own")
    if not isinstance(instance, nn.Module):
        return
    if not adapter.chain and has_global_hook():
        raise Unfit("a global module hook is registered, which would be bypassed: remove it first")
    inner = tuple(adapter.inner(instance))
    if any(is_hooked(module) for module in inner):
        raise Unfit("a module inside has a hook or a parametrization, which would be bypassed")
    if any(is_sharded(module) for module in (instance, *inner)):
        raise Unfit("its parameters are sharded or of another tensor class")
