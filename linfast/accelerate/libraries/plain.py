"""register_adapter: affine couplings of a class of your own, one or several in a module.

A coupling computes a shift t and a raw value r from the features that it keeps, and moves the others by
y = (m + t) e^s or y = m e^s + t, with s = scale_map(r). What the description leaves open is found by ``watch.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from types import NoneType
from typing import Any

from torch import nn

from ...checks import check_choice, check_flag, check_function, check_kind
from ...ops.affine_coupling import HALVES, ORDERS
from ...scale_maps import ScaleMap
from ..adapter import add
from ..formula import Parameter
from ..networks import LAYOUTS, Description
from ..registered import Registered

__all__ = ["register_adapter"]

_FORWARDS = ("forward", "encode")
_INVERSES = ("inverse", "decode", "reverse", "undo")


def register_adapter(
    cls: type[nn.Module],
    *,
    conditioner: str | Collection[str],
    scale_map: ScaleMap | Callable[[Any], ScaleMap],
    order: str | None = None,
    layout: str | None = None,
    moves: str | None = None,
    log_det: bool | None = None,
    forward: str | None = None,
    inverse: str | None = None,
    features: str | None = None,
) -> None:
    """Describe a class of affine couplings to ``accelerate``: exactly this class, not its subclasses.

    An instance may hold one coupling or several that follow one another. ``accelerate`` replaces its networks, on a
    copy, by random functions and watches which features they get; what is None here, it finds by comparison with
    the class's own code. An instance is swapped only if both directions and their gradients agree with its own code
    on random inputs. docs/register_adapter.md shows classes of several shapes.

    Args:
        cls: its forward and inverse take x [B, C, ...] and return y of the same shape, or (y, log_det [B]).
            Further arguments are a context, which is passed on to the networks, or a flag, a bool that turns the
            direction round. Calls with other arguments run the original.
        conditioner: name of the module attribute that maps the kept features to params [B, 2 C_moved, ...] or to a
            tuple or dict of two tensors [B, C_moved, ...]; or the names of two networks, one that gives the
            shift and one that gives the raw value; or of several couplings' networks. A name may be a path,
            "nets.0". A ModuleList or a ModuleDict stands for the modules in it. A second network that is not named
            is looked for among the other attributes.
        scale_map: from raw, one half of params, to s; a function of the instance where instances differ.
        order: y = (m + t) e^s of the moved half m is "shift_first", y = m e^s + t is "scale_first".
        layout: of params: "halves" [t | raw], "raw_first" [raw | t] or "interleaved". Of two outputs, or of two
            networks in the order in which they are called: "halves" (t, raw) or "raw_first" (raw, t).
        moves: which half the first coupling moves, "first" or "second"; of alternating features the even ones are
            "first".
        log_det: whether the forward returns (y, log_det [B]); else it returns y.
        forward: name of the method that computes y; by default forward or encode, or both.
        inverse: name of the inverse method, or of the argument of the forward that makes it the inverse; by default
            those of inverse, decode, reverse and undo that the class has, or the forward's flag.
        features: name of the attribute that holds C; None where the networks' own sizes give it, or where an
            instance takes any C.

    Raises:
        TypeError: cls is not a subclass of nn.Module, or an option is of another type.
        ValueError: an option has an unknown value, or a name is not that of an attribute or method.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of nn.Module; got {cls!r}")
    for option, value, allowed in (("order", order, ORDERS), ("layout", layout, LAYOUTS), ("moves", moves, HALVES)):
        if value is not None:
            check_choice(option, value, allowed)
    if not isinstance(scale_map, ScaleMap):
        check_function("scale_map", scale_map)
    if log_det is not None:
        check_flag("log_det", log_det)
    for option, value in (("forward", forward), ("inverse", inverse), ("features", features)):
        check_kind(option, value, (str, NoneType))
    names = _names(cls, conditioner)
    if features is not None and not features.isidentifier():
        raise ValueError(f"features must name an attribute of a {cls.__name__}; got {features!r}")
    methods = _methods(cls, forward, inverse)
    add(Registered(cls, Description(names, order, layout, moves, log_det, features, methods), scale_map).adapter())


def _names(cls: type, conditioner: Any) -> tuple[tuple[str, ...], ...]:
    """The paths of the conditioner's networks."""
    check_kind("conditioner", conditioner, (str, list, tuple, dict))
    given = [conditioner] if isinstance(conditioner, str) else [
        *(conditioner.values() if isinstance(conditioner, Mapping) else conditioner)
    ]  # fmt: skip
    paths = [tuple(name.split(".")) if isinstance(name, str) else () for name in given]
    if not paths or not all(path and path[0].isidentifier() and all(path) for path in paths):
        raise ValueError(f"conditioner must name an attribute of a {cls.__name__}; got {conditioner!r}")
    return tuple(paths)


def _methods(cls: type, forward: str | None, inverse: str | None) -> dict[str, tuple[bool, tuple[Parameter, ...]]]:
    """By name: whether it is to be an inverse, and its arguments after x. Forwards come first."""

    def those(names: Iterable[str]) -> list[str]:
        own = (name for name in names if getattr(cls, name, None) is not getattr(nn.Module, name, None))
        functions = [(name, getattr(cls, name, None)) for name in own]
        return [name for name, f in functions if inspect.isfunction(f) and f.__name__ == name]

    forwards = those(_FORWARDS if forward is None else (forward,))
    if not forwards:
        raise ValueError(f"forward must name a method of {cls.__name__}; got {forward!r}")
    flags = [p.name for name in forwards for p in _parameters(cls, name) if isinstance(p.default, bool)]
    inverses = [name for name in those(_INVERSES if inverse is None else (inverse,)) if name not in forwards]
    if not inverses and not (flags if inverse in (None, *forwards) else inverse in flags):
        raise ValueError(f"inverse must name a method of {cls.__name__} or a flag of its forward; got {inverse!r}")
    named = [(name, False) for name in forwards] + [(name, True) for name in inverses]
    return {name: (undoes, _parameters(cls, name)) for name, undoes in named}


def _parameters(cls: type, name: str) -> tuple[Parameter, ...]:
    every = [*inspect.signature(getattr(cls, name)).parameters.values()][2:]
    named = [p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(Parameter(p.name, None if p.default is p.empty else p.default) for p in named)
