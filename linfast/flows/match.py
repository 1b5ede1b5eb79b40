"""Decides which code runs a flow's layers, once per kind of input while the flow is frozen.

    kernels run, and the layers are a stack with a tile   one launch, or one per linear layer             OneLaunch
    kernels run, otherwise   consecutive channel-linear layers folded, with a coupling before them if any     Folded
    plain torch              affine couplings with MLP conditioners in one loop                            Couplings
    anything else            the layer itself                                                                 Single

Only unmodified layers are replaced: a layer with a hook, a parametrization or sharded weights, a layer of a
subclass, and an ActNorm that waits for its first batch run as they are. In plain torch folding gains nothing (an
image flow 4 x 32 x 32 at batch 16 and a vector flow of 64 features at batch 1024 took 0.90 to 1.07 times the time
of running layer by layer), and layers without a matrix product cost less than a folded map. In plain torch the
recognised couplings are remembered, frozen or not, until an object from which they were read is replaced
(``remembered.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..dispatch import are_plain, call_key, has_global_hook, is_plain, records_gradients, uses_triton, why_reference
from ..freeze import derived, kept, kept_values
from ..kernels.stack_configs import mode_on, target_of, tiles_for
from ..kernels.stack_spec import NO_MAPS
from ..nets import MLP
from ..ops.activations import ACTIVATIONS
from ..ops.affine_coupling import HALVES
from ..ops.coupling_stack import stack_spec
from ..ops.plain_couplings import PlainCoupling
from ..ops.stack_weights import PackedStack, pack_stack
from ..precision import half_dtype, resolve_precision
from ..residual_net import ResidualMLP, shared_context
from ..rows import by_rows, rows_at_once
from ..scale_maps import ScaleMap
from .autoregressive import MaskedAutoregressive
from .couplings import AffineCoupling
from .remembered import recall, remember
from .segments import Couplings, Folded, OneLaunch, Segment, Single
from .splines import SplineCoupling
from .stack import PRODUCTS, is_linear, recognise, stack_of
from .undo import Context, Outputs


@dataclass(eq=False)
class Launch:
    """What runs a flow's layers, or their inverse, on inputs of one kind.

    Where kernels run, the products of a context with the weights of all ResidualMLPs are one product.

    Args:
        layers: the flow's layers.
        segments: the segments, in the order in which they run.
        why: the reason why it is not one launch; None where it is.
    """

    layers: nn.ModuleList
    segments: Sequence[Segment]
    why: str | None

    def __call__(
        self, x: Tensor, context: Context, inverse: bool, log_det: bool, run: Segment | None = None
    ) -> Outputs:
        """(y, log|det| or None); in plain torch a long batch is cut into parts that fit the cache.

        Args:
            run: called in place of the segments; it must compute the same.
        """
        run = self._run if run is None else run
        rows = None if self.why is None else rows_at_once(x, lambda: self.widths(inverse))
        if rows is None:
            return run(x, context, inverse, log_det)
        contexts = _contexts(context, x.shape[0], rows)
        return by_rows(lambda part: run(part, next(contexts), inverse, log_det), x, rows)

    def _run(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        given = context.get("context")
        if given is None or torch.compiler.is_compiling() or not uses_triton(x) or not _in_common(x, context):
            return self._run_segments(x, context, inverse, log_det)
        # A layer or network with its own forward may call it again later, as a checkpoint does in the backward.
        plain = [layer for layer in self.layers if is_plain(layer, (type(layer),))]
        nets: list[Any] = [layer._modules.get("conditioner") for layer in plain]
        with shared_context(self.layers, [net for net in nets if is_plain(net, (ResidualMLP,))], given):
            return self._run_segments(x, context, inverse, log_det)

    def _run_segments(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        total: Tensor | None = None
        for segment in self.segments:
            x, part = segment(x, context, inverse, log_det)
            total = part if total is None or part is None else total + part
        return x, total

    def widths(self, inverse: bool) -> list[int | None]:
        """The number of values per row of each layer; None for a layer that is given the whole batch.

        Its rows may depend on each other, or it is the inverse of a masked autoregressive transform: a walk of many
        small products, which takes 1.7 to 5 times as long in parts that fit the cache.
        """
        found: list[int | None] = []
        for segment in self.segments:
            if isinstance(segment, Couplings):
                found += [segment.features, *[w.shape[0] for c in segment.couplings for w in c.weights]]
            else:
                found += _widths(segment.layer, inverse) if isinstance(segment, Single) else [None]
        return found


def _widths(layer: Any, inverse: bool) -> Sequence[int | None]:
    """``Launch.widths`` of one layer; without the parameters of splines, as their op cuts its own rows."""
    if is_plain(layer, (MaskedAutoregressive,)) and not inverse:
        return cast(MaskedAutoregressive, layer).widths
    if is_plain(layer, (SplineCoupling,)) and are_plain((layer.conditioner,), (MLP,)):
        linears = list(layer.conditioner.layers)
        if are_plain(linears, (nn.Linear,)):
            return [layer.features, *[linear.out_features for linear in linears[:-1]]]
    return [] if is_linear(layer) else [None]


def _contexts(context: Context, batch: int, rows: int) -> Iterator[Context]:
    """The context of each part of a batch: its tensors [batch, ...] are cut as x is."""
    cut = {key: value.split(rows) for key, value in context.items()
           if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch}  # fmt: skip
    for i in range(-(-batch // rows)):
        yield {**context, **{key: parts[i] for key, parts in cut.items()}}


def match(layers: nn.ModuleList, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Launch:
    """The launch of these layers, or their inverse, on x; cached per kind of input while they are frozen."""
    values = kept_values(layers)
    grad = torch.is_grad_enabled(), x.requires_grad
    key = None if values is None else call_key(x, context, inverse, log_det, *grad)
    if values is None or key is None:
        return _decide(layers, x, context, inverse, log_det, False)
    return kept(values, layers, key, lambda: _decide(layers, x, context, inverse, log_det, True))


def _decide(
    layers: nn.ModuleList, x: Tensor, context: Context, inverse: bool, log_det: bool, frozen: bool
) -> Launch:
    """``match`` without its cache; ``frozen``: whether the weights are frozen."""
    in_order: list[Any] = list(reversed(layers) if inverse else layers)
    if has_global_hook():
        return Launch(layers, [Single(layer) for layer in in_order], "a global module hook is set")
    if not uses_triton(x):
        segments = _looped(layers, x, context)
        return Launch(layers, segments[::-1] if inverse else segments, why_reference(x))
    launch = _one_launch(layers, x, context, inverse, log_det, frozen)
    if isinstance(launch, str):
        return Launch(layers, _folded(layers, in_order), launch)
    return Launch(layers, [launch], None)


def _one_launch(
    layers: nn.ModuleList, x: Tensor, context: Context, inverse: bool, log_det: bool, frozen: bool
) -> OneLaunch | str:
    """All layers in one op, or the reason why they do not run in one."""
    if x.ndim != 2:
        # No shape in the reason: Dynamo of torch 2.11 cannot trace the formatting of a tuple.
        return f"x has {x.ndim} dimensions: not a batch of vectors"
    stack = stack_of(layers, x, context)
    if isinstance(stack, str):
        return stack
    precision = mode_for(x)
    sizes = stack.sizes
    gradients = records_gradients(x, *layers.parameters())
    tiles = tiles_for(*sizes, precision, target_of(x), stack.maps, gradients)
    if tiles is None:
        maps = "" if stack.maps == NO_MAPS else " with maps between couplings"
        where = f"{maps} with gradients" if gradients else maps
        return f"D = {sizes[0]}, H = {sizes[1]} in {precision!r}{where} fit no tile on {target_of(x)}"
    g, half = stack.weights(inverse, log_det), half_dtype(x)

    def pack() -> PackedStack:
        return pack_stack(g.layers, x.shape[1], inverse=inverse, precision=precision, dtype=half, head=g.head)

    key = "packed", inverse, precision, half, *context.items()  # a time is folded into the weights
    packed = derived(layers, key, pack) if frozen else pack()
    return OneLaunch(g, tiles, packed, stack_spec(g, packed.layout, inverse, log_det, precision))


def mode_for(x: Tensor) -> str:
    """The precision mode of products on x, from torch's settings and the device of x."""
    return mode_on(target_of(x), resolve_precision(x))


# Plain torch.


def _looped(layers: nn.ModuleList, x: Tensor, context: Context) -> list[Segment]:
    """Consecutive affine couplings in one loop, and every other layer on its own."""
    takes, given = _in_common(x, context), context.get("context")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    lasts = takes and context.get("t") is None and not traced  # a time is folded into new weights
    key = (x.dtype, x.device, given.shape[1:] if lasts and given is not None else None)
    found = recall(layers, key) if lasts else None
    if found is not None:
        return found
    segments = _recognised(layers, x, context, takes)
    couplings = [segment for segment in segments if isinstance(segment, Couplings)]
    if lasts and couplings and all(_is_own(c) for run in couplings for c in run.couplings):
        remember(layers, [layer for run in couplings for layer in run.layers], key, segments)
    return segments


def _is_own(coupling: PlainCoupling) -> bool:
    """Whether its tensors are parameters: tensors that torch.func puts in their place must not outlive a call."""
    return all(type(t) is nn.Parameter for t in (*coupling.weights, *coupling.biases) if t is not None)


def _recognised(layers: Iterable[Any], x: Tensor, context: Context, takes: bool) -> list[Segment]:
    """``_looped``, read from the layers; ``takes``: whether the loop supports the inputs of the conditioners."""
    segments: list[Segment] = []
    scale_map: ScaleMap | None = None
    log_scale: Any = None
    for layer in layers:
        known = recognise(layer, x, context) if takes else "the loop does not support the inputs"
        if isinstance(known, str) or known.weights[0].dtype != x.dtype:
            segments.append(Single(layer))
            continue
        run = segments[-1] if segments else None
        if not isinstance(run, Couplings) or run.features != layer.features:
            run = Couplings([], [], layer.features, x.dtype)
            segments.append(run)
        if layer.scale_map is not scale_map:
            scale_map, log_scale = layer.scale_map, layer.scale_map.log_scale_function
        options = layer.order == "scale_first", layer.layout == "interleaved", HALVES.index(layer.moves)
        activation = ACTIVATIONS[known.activation]
        run.layers.append(layer)
        run.couplings.append(PlainCoupling(known.weights, known.biases, activation, log_scale, *options))
    return segments


def _in_common(x: Tensor, context: Context) -> bool:
    """Whether the conditioners' inputs are x, a time for all samples, and a context [B or 1, C] like x."""
    given, t = context.get("context"), context.get("t")
    if x.ndim != 2 or not context.keys() <= {"t", "context"} or (isinstance(t, Tensor) and t.ndim > 0):
        return False
    if given is None:
        return True
    alike = isinstance(given, Tensor) and (given.dtype, given.device) == (x.dtype, x.device)
    return alike and given.ndim == 2 and given.shape[0] in (1, x.shape[0])


# Kernels, layer by layer.


def _folded(owner: nn.ModuleList, layers: list[Any]) -> list[Segment]:
    """Consecutive channel-linear layers folded, with the coupling before them if there is one."""
    segments: list[Segment] = []
    while layers:
        coupling = layers[0] if is_plain(layers[0], (AffineCoupling,)) else None
        start = end = 1 if coupling else 0
        while end < len(layers) and is_linear(layers[end]):
            end += 1
        row = tuple(layers[start:end])
        if any(isinstance(layer, PRODUCTS) for layer in row) and (coupling or len(row) > 1):
            segments.append(Folded(owner, coupling, row))
        else:
            segments.append(Single(layers[0]))
            end = 1
        layers = layers[end:]
    return segments
