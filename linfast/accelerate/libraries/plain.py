"""register_adapter: affine couplings of a class of your own.

forward(x, *context) splits x along dim 1, computes params from the kept half and moves the other;
inverse undoes it. Both return y, or (y, log_det [B]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

from torch import nn

from ...checks import check_choice, check_flag, check_function, check_kind
from ...ops.affine_coupling import HALVES, LAYOUTS, ORDERS
from ...scale_maps import ScaleMap
from ..adapter import Unfit, add
from ..coupling import coupling_adapter, two_methods
from ..sides import Side, Split, Tail

__all__ = ["register_adapter"]


def register_adapter(
    cls: type[nn.Module],
    *,
    conditioner: str,
    scale_map: ScaleMap | Callable[[Any], ScaleMap],
    order: str = "shift_first",
    layout: str = "halves",
    moves: str = "first",
    log_det: bool = False,
    inverse: str = "inverse",
    features: str | None = None,
) -> None:
    """Describe a class of affine couplings to ``accelerate``: exactly this class, not its subclasses.

    The description is checked: an instance is swapped only if both directions and their gradients
    agree with its own code on a random input.

    Args:
        cls: forward(x, *context) and the inverse take x [B, C, ...], split it into ceil(C / 2) and
            floor(C / 2) channels, and pass the context on to the conditioner.
        conditioner: name of the module attribute that maps the kept half to params [B, 2 C_moved, ...].
        scale_map: from raw, half of params, to s; a function of the instance where instances differ.
        order: y = (m + t) e^s of the moved half m is "shift_first", y = m e^s + t is "scale_first".
        layout: of params: "halves" [t | raw] or "interleaved".
        moves: which half moves, "first" or "second".
        log_det: whether both directions return (y, log_det [B]); else they return y.
        inverse: name of the inverse method.
        features: name of the attribute that holds C; None where an instance takes any C.

    Raises:
        TypeError: cls is not a subclass of nn.Module, or an option is of another type.
        ValueError: an option has an unknown value, or a name is not that of an attribute or method.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of nn.Module; got {cls!r}")
    for option, value, allowed in (("order", order, ORDERS), ("layout", layout, LAYOUTS), ("moves", moves, HALVES)):
        check_choice(option, value, allowed)
    if not isinstance(scale_map, ScaleMap):
        check_function("scale_map", scale_map)
    check_flag("log_det", log_det)
    check_kind("inverse", inverse, str)
    check_kind("conditioner", conditioner, str)
    check_kind("features", features, (str, NoneType))
    for option, name in (("conditioner", conditioner), ("features", features)):
        if name is not None and not name.isidentifier():
            raise ValueError(f"{option} must name an attribute of a {cls.__name__}; got {name!r}")
    if inverse == "forward" or not callable(getattr(cls, inverse, None)):
        raise ValueError(f"inverse must name a method of {cls.__name__}; got {inverse!r}")

    def find(module: Any) -> tuple[str, ScaleMap]:
        if not isinstance(getattr(module, conditioner, None), nn.Module):
            raise Unfit(f"its {conditioner} is not a module")
        found = scale_map if isinstance(scale_map, ScaleMap) else scale_map(module)
        return f"affine coupling, {found.kind}", found

    def members(module: Any, found: ScaleMap, context: Sequence[Any]) -> list[Side]:
        net, tail = getattr(module, conditioner), Tail(layout, found, order=order)
        return [Side(Split("halves", moves), tail, lambda kept: net(kept, *context), () if context else (net,))]

    add(
        coupling_adapter(
            library=cls.__module__.partition(".")[0],
            where=cls,
            name=cls.__qualname__,
            find=find,
            members=members,
            methods=two_methods(members, "any", log_det, inverse),
            nets=lambda module: (getattr(module, conditioner),),
            shapes=lambda module: ((3, 5 if features is None else getattr(module, features)),),
        )
    )
