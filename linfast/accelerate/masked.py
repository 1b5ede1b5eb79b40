"""Masked autoregressive transforms of other libraries: their inverse by one walk over the degrees.

    library   D evaluations of the network, each of which multiplies its weights by its masks
    here      the weights packed in one gather, then each weight used once (linfast.ops.masked_autoregressive)

Only the inverse is replaced: forward is one evaluation of the network, in the library's own code (zuko's splines:
``libraries/zuko_spline.py``). Where no gradient is required, any elementwise transform is inverted by the
library's own formula on the features of one degree. Where a gradient is required, or on a GPU, the transform must
be affine with a known scale map; otherwise the original runs. It also runs in training mode where the network has
dropout or batch norm, under torch.compile, torch.func and autocast, and on inputs that are no batch of vectors.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import autocast_dtype, has_global_hook, is_transformed, records_gradients, uses_triton
from ..flows.remembered import Evidence
from ..ops.autoregressive_masks import AutoregressiveMasks
from ..ops.masked_autoregressive import MASKED_ACTIVATIONS, Extras, masked_autoregressive
from ..ops.masked_plain import Elementwise, invert_affine, invert_elementwise
from ..ops.masked_walk import Network
from ..rows import is_short
from ..scale_maps import ScaleMap
from .adapter import Plan, Unfit
from .identity import PLAN
from .mlp import name_of_activation

Weights = tuple[Sequence[Tensor], Sequence[Tensor | None]]
Norms = Sequence[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Affine:
    """y = x scale + shift.

    Args:
        scale, log_scale: the library's formulas, raw -> scale and its logarithm; without ``log_scale`` a walk
            returns 0 as the log-determinant.
        scale_map: the same map by name, or None where linfast has none.
    """

    scale: Elementwise
    log_scale: Elementwise | None
    scale_map: ScaleMap | None


InvertFeatures = Callable[[Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]
"""(y [B, n], parameters [B, n, P], the features' indices) -> (x [B, n], log|dx / dy| [B, n] or its sum [B, 1])."""


Short = Mapping[int, tuple[int, int]]
"""Degrees -> (rows without a gradient, rows with one): the original runs with fewer per thread of a CPU."""


class Unchanged(Evidence):
    """Evidence that an instance, and all modules inside it, are as they were when the instance was recognised.

    Args:
        instance: its own hooks do not count, as they do not run around its inverse.
        functions: (class, name of a method) pairs; each method must stay the same function.
        masks: tensors whose values must stay the same.
    """

    def __init__(self, instance: nn.Module, functions: Iterable[tuple[type, str]], masks: Iterable[Tensor]) -> None:
        super().__init__([instance], instance.children(), functions, masks)
        self._instance, self._attributes = weakref.ref(instance), _attributes(instance)  # the instance holds this

    def of(self, instance: nn.Module) -> bool:
        """Whether this instance is the one that was recognised, and is unchanged."""
        return self._instance() is instance and self.holds()

    def holds(self) -> bool:
        instance = self._instance()
        now = [] if instance is None else _attributes(instance)
        return len(now) == len(self._attributes) and all(map(is_, now, self._attributes)) and super().holds()


_BOOKKEEPING = frozenset(vars(nn.Module())) | {PLAN}


def _attributes(instance: nn.Module) -> list[Any]:
    return [value for name, value in vars(instance).items() if name not in _BOOKKEEPING]


@dataclass(frozen=True, eq=False)
class MaskedInverse:
    """The recognised network and elementwise transform of one instance.

    Args:
        what: describes both, for the report.
        masks: of the network.
        weights: returns the current weights and biases.
        activation: of the network, a function of a tensor.
        transform: affine, or how features are inverted.
        extras: (context, B) -> (term, gate) of each hidden layer, [B, H_l], or [1, H_l] where all rows are equal.
            None where the original is to run.
        evidence: that the modules are as they were when they were recognised.
        norms: returns (scale, shift) [H_l] of each hidden layer's value before its activation, or None for none.
        ready: False where the original is to run: in training mode, with dropout or batch norm.
        assumed: functions that only the check before the swap shows to be elementwise.
        short: the batches for which the original is at least as fast.
    """

    what: str
    masks: AutoregressiveMasks
    weights: Callable[[], Weights]
    activation: Callable[[Tensor], Tensor]
    transform: Affine | InvertFeatures
    extras: Callable[[Any, int], Extras | None]
    evidence: Unchanged
    norms: Callable[[], Norms] | None = None
    ready: bool = True
    assumed: tuple[Any, ...] = ()
    short: Short = field(default_factory=dict)

    @functools.cached_property
    def degrees(self) -> int:
        """The number of steps of a walk."""
        return max(self.masks.degrees[0])

    @property
    def has_gradient(self) -> bool:
        """Whether the op runs where a gradient is required, and on a GPU."""
        known = isinstance(self.transform, Affine) and self.transform.scale_map is not None
        known = known and self.norms is None and name_of_activation(self.activation) in MASKED_ACTIVATIONS
        values = self.masks.features * sum(out * into for out, into in self.masks.shapes)
        return known and values <= _MOST_COMPARED

    def is_short(self, y: Tensor) -> bool:
        """Whether y has so few rows that the original is at least as fast."""
        values, graph = self.short.get(self.degrees, (0, 0))
        if not is_short(y, max(values, graph)):
            return False
        needed = torch.is_grad_enabled() and (y.requires_grad or any(w.requires_grad for w in self.weights()[0]))
        return is_short(y, graph if needed else values)

    def __call__(self, y: Tensor, context: Any, precision: str | None = None) -> tuple[Tensor, Tensor] | None:
        """(x [B, D], log|dx / dy| [B]) of y [B, D]; None where the original is to run."""
        if not self.ready or y.shape[1] != self.masks.features:
            return None
        read = weights, biases = self.weights()
        if y.device != weights[0].device or not self._fits(y.dtype, read):
            return None
        extras = self.extras(context, y.shape[0])
        if extras is None:
            return None
        norms = None if self.norms is None else self.norms()
        graph = torch.is_grad_enabled()
        if graph and self.assumed:  # a function may hold tensors that require a gradient
            return None
        tensors = (y, *weights, *biases, *itertools.chain(*extras, *filter(None, norms or ())))
        if uses_triton(y, *weights) or (graph and records_gradients(*tensors)):
            return self._by_op(y, read, extras, precision) if self.has_gradient else None
        with torch.no_grad() if graph else nullcontext():
            return self._by_walk(y, read, extras, norms)

    def _fits(self, dtype: torch.dtype, read: Weights) -> bool:
        """Whether the weights and biases have the masks' shapes and this dtype."""
        weights, biases = read
        shapes, given = [*self.masks.shapes], [bias for bias in biases if bias is not None]
        if [weight.shape for weight in weights] != shapes:
            return False
        lengths = [shape[:1] for bias, shape in zip(biases, shapes, strict=True) if bias is not None]
        return [bias.shape for bias in given] == lengths and {t.dtype for t in (*weights, *given)} == {dtype}

    def _by_op(self, y: Tensor, read: Weights, extras: Extras, precision: str | None) -> tuple[Tensor, Tensor]:
        assert isinstance(self.transform, Affine)
        whole = [[None if each is None else each.expand(y.shape[0], -1) for each in pair] for pair in extras]
        graph = torch.is_grad_enabled()  # whose tensors must survive that a caller writes to y or x
        y = y.clone() if graph else y
        x, log_det = masked_autoregressive(
            y, self.masks, *read, activation=str(name_of_activation(self.activation)),
            scale_map=self.transform.scale_map, inverse=True, log_det=True,
            extras=[(term, gate) for term, gate in whole], precision=precision,
        )  # fmt: skip
        assert log_det is not None
        return x.clone() if graph else x, log_det.to(y.dtype)

    def _by_walk(self, y: Tensor, read: Weights, extras: Extras, norms: Norms | None) -> tuple[Tensor, Tensor]:
        columns, kinds = self.masks.pack_extras(extras)
        packed, spec = self.masks.pack(*read), self.masks.spec(kinds)
        pairs = spec.split_extras(None if columns is None else columns.t())
        found = None if norms is None else self.masks.sort_norms(norms)
        net = Network(spec, spec.matrices(packed), spec.biases(packed), pairs, self.activation, found)
        if isinstance(self.transform, Affine):
            return invert_affine(net, y, self.transform.scale, self.transform.log_scale, True)
        return invert_elementwise(net, y, self.transform)


_MOST_COMPARED = 2**24
"""Values in the weights of D evaluations of the network (128 MiB in float64), which are all in the original's graph
in the check before the swap. With more, no gradient is compared, and the original runs where one is required."""

Find = Callable[[Any], MaskedInverse]
"""instance -> what it is; raises Unfit with the reason."""


def masked_inverse(instance: nn.Module, find: Find, y: Any, context: Any) -> tuple[Tensor, Tensor] | None:
    """(x [B, D], log|dx / dy| [B]) of a swapped instance; None where the original is to run.

    Its ``Plan.layout`` is a MaskedInverse, which is found again where the instance was changed.
    """
    if type(y) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    own = vars(instance)
    plan = own.get(PLAN)
    if plan is None or "_is_replica" in own:  # of nn.DataParallel
        return None
    found: MaskedInverse = plan.layout
    if found.is_short(y):  # first, because it is to cost little
        return None
    if y.ndim != 2 or autocast_dtype(y.device.type) is not None or has_global_hook() or is_transformed():
        return None
    if not found.evidence.of(instance):
        try:
            with torch.inference_mode(False):  # its tensors are used outside too
                found = _find_again(instance, find, found)
        except _NOT_FOUND:
            return None
        own[PLAN] = replace(plan, layout=found)
    return found(y, context, plan.options.precision)


_NOT_FOUND = (Unfit, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What recognising a changed instance raises: its parts are other than before, or have no values to read."""


def _find_again(instance: nn.Module, find: Find, before: MaskedInverse) -> MaskedInverse:
    """Raises Unfit also where a function has changed that the check has not shown to be elementwise."""
    found = find(instance)
    if len(found.assumed) > len(before.assumed) or not all(map(_is_alike, found.assumed, before.assumed)):
        raise Unfit("it has a function that was not compared with linfast's code")
    return found


def _is_alike(function: Any, before: Any) -> bool:
    """Whether both are the same function, or modules of one class with equal settings, such as copies."""
    if function is before or type(function) is not type(before) or not isinstance(function, nn.Module):
        return function is before
    return not [*function.modules()][1:] and repr(_attributes(function)) == repr(_attributes(before))


def plan_masked(instance: nn.Module, find: Find) -> Plan:
    """The plan of an instance; raises Unfit."""
    before = vars(instance).get(PLAN)
    found = find(instance) if before is None else _find_again(instance, find, before.layout)
    degrees = found.degrees
    note = "" if found.has_gradient else "where a gradient is required, its own code runs"
    runs = f"inverse in one walk over {degrees} degree{'s' * (degrees > 1)}, {found.what}"
    masks = found.masks.masks(torch.device("cpu"), torch.bool)
    kind = tuple(bytes(mask.flatten().tolist()) for mask in masks)
    return Plan(runs, note, layout=found, takes_precision=found.has_gradient, kind=kind)


def find_masks(masks: Sequence[Tensor], **what: Any) -> AutoregressiveMasks:
    """The AutoregressiveMasks; raises Unfit where they are not autoregressive or not zeros and ones."""
    for mask in masks:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise Unfit("its masks have other values than 0 and 1")
    try:
        return AutoregressiveMasks(masks, **what)
    except ValueError as error:
        raise Unfit(f"its {error}") from error


def in_words(kind: str, masks: AutoregressiveMasks, activation: Any) -> str:
    """The description of a network of this kind."""
    sizes = "-".join(map(str, (masks.features, *(out for out, _ in masks.shapes))))
    name = name_of_activation(activation) or getattr(activation, "__name__", type(activation).__name__)
    return f"{kind} {sizes} {name}{', residual' * any(masks.adds)}"


def redraw(module: nn.Module) -> None:
    """Give every layer of a copy random values of useful size: new networks are often near zero.

    They are drawn from torch's random state, which the check has seeded.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
            with torch.no_grad():
                for tensor in own:
                    if tensor.is_floating_point():
                        tensor.uniform_(0.5, 1.5)
