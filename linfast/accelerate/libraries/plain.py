"""register_adapter: affine couplings of a class of your own.

forward(x, *context) splits x along dim 1, has params from the kept half and moves the other;
inverse undoes it. Both give y, or (y, log_det [B]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_function, check_kind
from ...ops.affine_coupling import HALVES, LAYOUTS, ORDERS, split_sizes
from ...scale_maps import ScaleMap
from ..adapter import Adapter, Draw, Options, Plan, Stub, Unfit, add
from ..coupling import couple, coupling_plan
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
    """Teach ``accelerate`` a coupling class: exactly this class, not what derives from it.

    What is said here is checked: an instance is swapped only if both directions and their
    gradients agree with its own on a random input.

    Args:
        cls: forward(x, *context) and the inverse take x [B, C, ...], C split in ceil(C / 2) and
            floor(C / 2) channels, and pass the context on to the conditioner.
        conditioner: name of the attribute that maps the kept half to params [B, 2 C_moved, ...].
        scale_map: of params' raw half; a function of the instance where instances differ.
        order: "shift_first" (m + t) e^s or "scale_first" m e^s + t.
        layout: of params: "halves" [shift | raw] or "interleaved".
        moves: which half moves, "first" or "second".
        log_det: whether both directions return (y, log_det) and not y.
        inverse: name of the inverse method.
        features: name of the attribute that holds C; None where any C will do.

    Raises:
        TypeError: cls is not a class of modules.
        ValueError: an unknown option.
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

    def plan(module: Any, options: Options) -> Plan:
        if not isinstance(getattr(module, conditioner, None), nn.Module):
            raise Unfit(f"its {conditioner} is not a module")
        found = scale_map if isinstance(scale_map, ScaleMap) else scale_map(module)
        return coupling_plan(f"affine coupling, {found.kind}", module, [side(module, found, ())], options, found)

    def side(module: Any, found: ScaleMap, context: Sequence[Any]) -> Side:
        net = getattr(module, conditioner)
        tail = Tail(layout, found, order=order)
        nets = () if context else (net,)
        return Side(Split("halves", moves), tail, lambda kept: net(kept, *context), nets)

    def run(module: Any, x: Tensor, context: Sequence[Any], method: str) -> Any:
        def original(x: Tensor) -> tuple[Tensor, Any]:
            given = getattr(module._linfast_original, method)(module, x, *context)
            return given if log_det else (given, None)

        sides = [side(module, module._linfast_plan.layout, context)]
        outputs = couple(module, sides, x, method == inverse, original)
        return outputs if log_det else outputs[0]

    def probe(module: Any, draw: Draw) -> Sequence[Tensor]:
        channels = 5 if features is None else getattr(module, features)
        kept, moved = split_sizes(channels)[:: -1 if moves == "first" else 1]
        module._modules[conditioner] = Stub(kept, 2 * moved, draw)
        return both_ways(module, draw(3, channels), draw(3, channels))

    def both_ways(module: Any, x: Tensor, y: Tensor) -> Sequence[Tensor]:
        outputs = module.forward(x), getattr(module, inverse)(y)
        return [t for given in outputs for t in (given if isinstance(given, tuple) else (given,))]

    add(
        Adapter(
            library=cls.__module__.partition(".")[0],
            where=cls,
            name=cls.__qualname__,
            methods={
                "forward": lambda module, x, *context: run(module, x, context, "forward"),
                inverse: lambda module, y, *context: run(module, y, context, inverse),
            },
            plan=plan,
            probe=probe,
            conditioners=lambda module: (getattr(module, conditioner),),
            members=lambda module, found: (side(module, found, ()),),
            vectors=lambda module, draw, features: both_ways(module, draw(3, features), draw(3, features)),
        )
    )
