"""explain reports which code runs a model on an input: the op, tile and precision of each part, and why.

It asks the functions that choose the code of every call (linfast.match, linfast.flows.match). It launches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

from torch import Tensor, nn

from .checks import check_kind, check_tensor
from .dispatch import why_reference
from .flows.actnorm import ActNorm
from .flows.autoregressive import MaskedAutoregressive
from .flows.bijection import Bijection
from .flows.couplings import AffineCoupling
from .flows.flow import Flow
from .flows.match import match
from .flows.mix import Householder, Mix
from .flows.segments import Couplings, Folded, OneLaunch, Single
from .flows.splines import SplineCoupling
from .kernels.stack_configs import LayersConfig, StackConfig, multiprocessors, target_of
from .linearizer import Linearizer
from .match import LinearizerLaunch, match_linearizer, unwrap
from .nets import MLP
from .operators.base import LatentOperator
from .tables import aligned

_OPERATOR_OPS = {"LowRank": "low_rank", "TimeLowRank": "low_rank", "DepthwiseConv": "depthwise_conv"}


@dataclass(frozen=True)
class Choice:
    """How one part runs.

    Args:
        part: its name in the model.
        runs: the op, or torch.
        tile: rows and warps per program; empty where no tile table of linfast fixes them.
        precision: the mode of its products (linfast.precision); empty where it has none.
        why: the reason for this choice.
    """

    part: str
    runs: str
    tile: str = ""
    precision: str = ""
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """The choices in the order in which the parts run; str() gives a table."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return aligned([[field.name for field in fields(Choice)], *map(astuple, self.choices)])


def plan(model: nn.Module, x: Tensor, t: float | Tensor | None = None, **context: Any) -> Plan:
    """How ``model(x, t=t, **context)`` runs, for a Linearizer or a Bijection.

    Raises:
        TypeError: model is neither, or x is not a tensor.
        ValueError: x has another shape than the model takes; t is missing where A depends on time.
    """
    check_tensor("x", x)
    check_kind("model", model, (Linearizer, Bijection))
    g = model.g_x if isinstance(model, Linearizer) else model
    if isinstance(g, Bijection):
        n_dims = 0 if g.shape is None else 1 + len(g.shape)
        if x.ndim < 2 or x.ndim != (n_dims or x.ndim) or x.shape[1] != (g.features or x.shape[1]):
            raise ValueError(f"x must be [B, {g.features or 'C'}, ...] as the model takes it; got {tuple(x.shape)}")
    if isinstance(model, Linearizer):
        return Plan(tuple(_linearizer(model, x, t, context)))
    return Plan(tuple(_bijection("g", model, x, context if t is None else {**context, "t": t}, False)))


def explain(model: nn.Module, x: Tensor, t: float | Tensor | None = None, **context: Any) -> Plan:
    """Print and return ``plan(model, x, t, **context)``, the op, tile and precision of each part, and why.

    Examples:
        >>> choices = lf.explain(lf.coupling_flow(features=8), torch.randn(5, 8)).choices
        part  runs   tile  precision  why
        g     torch                   Flow: x is on cpu
    """
    result = plan(model, x, t, **context)
    print(result)
    return result


def _linearizer(f: Linearizer, x: Tensor, t: float | Tensor | None, context: Mapping[str, Any]) -> Iterator[Choice]:
    launch = match_linearizer(f, x, t, context)
    if isinstance(launch, LinearizerLaunch):
        yield _one_launch("f", launch, x)
        return
    if why_reference(x) is None:
        yield Choice("f", "part by part", why=f"not one launch: {launch}")
    yield from _bijection("g_x", f.g_x, x, context, False)
    yield _layer("A", f.A, x)
    yield from _bijection("g_y", f.g_y, x, context, True)


def _bijection(part: str, g: nn.Module, x: Tensor, context: Mapping[str, Any], inverse: bool) -> Iterator[Choice]:
    g, context = unwrap(g, context)
    masked = isinstance(g, Flow) and any(isinstance(layer, MaskedAutoregressive) for layer in g.bijections)
    if not isinstance(g, Flow) or (why_reference(x) is not None and not masked):
        yield _layer(part, g, x, inverse)
        return
    launch = match(g.bijections, x, context, inverse, False)
    if launch.why is not None:
        yield Choice(part, "layer by layer", why=f"not one launch: {launch.why}")
    names = {id(layer): f"{part}.{i}" for i, layer in enumerate(g.bijections)}
    for segment in launch.segments:
        if isinstance(segment, OneLaunch):
            yield _one_launch(part, segment, x)
        elif isinstance(segment, Single):
            yield _layer(names[id(segment.layer)], segment.layer, x, inverse)
        elif isinstance(segment, Couplings):
            yield Choice(
                " + ".join(names[id(layer)] for layer in segment.layers), "torch", why="couplings in one loop"
            )
        elif isinstance(segment, Folded):
            yield _folded(segment, names)


def _one_launch(part: str, launch: OneLaunch | LinearizerLaunch, x: Tensor) -> Choice:
    if isinstance(launch, OneLaunch):
        op, g, spec, what = "coupling_stack", launch.stack, launch.spec, f"{len(launch.stack.layers)} couplings"
    else:
        op, g, spec, what = "linearizer_stack", launch.g_x, launch.spec_x, "g_x, A and the inverse of g_y"
    hidden = max(weight.shape[0] for layer in g.layers for weight in layer.weights[:-1] or layer.weights)
    sizes, target = f"D = {x.shape[1]}, H = {hidden}", target_of(x)
    if isinstance(launch.tiles, LayersConfig):
        tile: StackConfig | LayersConfig = launch.tiles
        why = f"{what}, one launch per linear layer: {sizes} are too large for a single one on {target}"
    else:
        tile = launch.tiles.config_of(x.shape[0], multiprocessors(x))
        why = f"{what} in one launch: {sizes} fit on {target}"
    return Choice(part, op, f"{tile.rows} rows, {tile.num_warps} warps", spec.precision, why)


def _folded(segment: Folded, names: Mapping[int, str]) -> Choice:
    layers = segment.row if segment.coupling is None else (segment.coupling, *segment.row)
    op = "channel_mix" if segment.coupling is None else f"{_conditioner(segment.coupling)}, coupling_mix"
    return Choice(" + ".join(names[id(layer)] for layer in layers), op, why="folded into one map")


def _layer(part: str, layer: nn.Module, x: Tensor, inverse: bool = False) -> Choice:
    kind, reason = type(layer).__name__, why_reference(x)
    why, runs = kind, "torch"
    if isinstance(layer, MaskedAutoregressive):
        steps = f"{max(layer.conditioner.masks.degrees[0])} steps that together use" if inverse else "one pass uses"
        why += f": {'' if reason is None else f'{reason}; '}{steps} every weight once"
        if reason is None:
            runs = "masked_autoregressive" if layer.spline is None else "torch products, rq_spline"
            why += "" if layer.spline is None else "; no kernel joins a masked network and splines"
    elif reason is not None:
        why += f": {reason}"
    elif kind in _OPERATOR_OPS:
        runs = _OPERATOR_OPS[kind]
    elif isinstance(layer, LatentOperator):
        why += ": torch has the best product for it"
    elif isinstance(layer, (AffineCoupling, SplineCoupling)):
        runs = f"{_conditioner(layer)}, {'affine_coupling' if isinstance(layer, AffineCoupling) else 'rq_spline'}"
    elif isinstance(layer, (Mix, Householder)) and x.ndim > 2:
        runs = "channel_mix"
    elif isinstance(layer, ActNorm) and layer.waits_for_data():
        why += ": waits for its first batch"
    return Choice(part, runs, why=why)


def _conditioner(coupling: AffineCoupling | SplineCoupling) -> str:
    return "torch products" if isinstance(coupling.conditioner, MLP) else type(coupling.conditioner).__name__
