"""Flow: bijections one after another, z = g_n(... g_2(g_1(x))), with their log-determinants added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, overload

from torch import Tensor, nn

from ..checks import check_choice, check_count, check_counts, check_kind
from ..dispatch import uses_triton
from .autoregressive import MaskedAutoregressive
from .bijection import Bijection, constant_log_det, find_part, run
from .drift import DriftGuard
from .match import match
from .reversible import MEMORY_MODES, Step, inverts, reversible
from .undo import Context, Outputs


class Flow(Bijection):
    """z = g_n(... g_1(x)), from data x to noise z; log|det| is the sum over the parts.

    ``len(flow)``, ``flow[i]``, ``flow[i:j]`` (a Flow) and iteration give its bijections.

    Args:
        bijections: g_1 to g_n, applied in this order. An empty list is the identity.
        features: channels of x; by default those of the first layer that states them.
        shape: sample shape of x where it is fixed, such as (C, H, W).
        memory: what is stored for the backward. "store": every activation. "invert": only x and z; activations
            are rebuilt by inverting, which takes time, and memory does not grow with depth (for exceptions see
            ``linfast.flows.reversible``). "auto": "invert" where storing would take more than a GiB, in a flow with
            masked autoregressive layers, which are slower to invert, more than 8 GiB. Where a layer
            reads a tensor from outside (from a closure or a global) that needs a gradient, "auto" stores its
            activations and warns once, and "invert" raises RuntimeError. "auto" also stores those of a layer that
            caches tensors computed from its parameters. Where activations are rebuilt, z must not be
            written to before the backward (RuntimeError).

    Context keywords (``t=``, ``context=``) go to every layer; layers without a
    conditioner ignore them.

    Raises:
        TypeError: an element of ``bijections`` is not a Bijection.
        ValueError: neighbours whose feature counts differ; an unknown ``memory``.
    """

    __getattr__ = find_part

    def __init__(
        self,
        bijections: Iterable[Bijection],
        features: int | None = None,
        shape: Sequence[int] | None = None,
        memory: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("memory", memory, MEMORY_MODES)
        self.memory = memory
        check_kind("bijections", bijections, Iterable)
        if isinstance(bijections, Tensor):
            raise TypeError("bijections must be Bijections; got a tensor")
        bijections = tuple(bijections)
        features = None if features is None else check_count("features", features)
        self.features, self._features_out = _chain(bijections, features)
        self.bijections = nn.ModuleList(bijections)
        self.shape = None if shape is None else check_counts("shape", shape)
        self._stored = _stored(self.bijections)
        self._guard = DriftGuard()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stored = _stored(self.bijections)  # earlier versions kept fewer numbers

    @property
    def features_out(self) -> int | None:
        return self._features_out

    def __len__(self) -> int:
        """The number of bijections."""
        return len(self.bijections)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.bijections)  # type: ignore[arg-type]

    @overload
    def __getitem__(self, index: int) -> Bijection: ...

    @overload
    def __getitem__(self, index: slice) -> Flow: ...

    def __getitem__(self, index: int | slice) -> Bijection | Flow:
        """The bijection at ``index``; for a slice, a Flow of these very bijections."""
        if not isinstance(index, slice):
            return self.bijections[index]  # type: ignore[return-value]
        chosen: list[Any] = list(self.bijections)[index]
        features = chosen[0].features if chosen else self.features
        same = not chosen or chosen[0] is self.bijections[0] or (self.shape is not None and len(self.shape) == 1)
        part = Flow(chosen, features, self.shape if same and features == self.features else None, self.memory)
        part.training = self.training
        return part

    def __bool__(self) -> bool:
        return True  # as any module, and although an empty flow has length 0

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        if not len(self.bijections):
            return x, constant_log_det(x) if log_det else None
        launch = match(self.bijections, x, context, inverse, log_det)
        walks = self._stored[1] < self._stored[0]
        stored = self._stored[1 if inverse else 2 * uses_triton(x)]
        rebuilds = launch.why is not None and inverts(self.memory, x, stored, walks)
        return launch(x, context, inverse, log_det, self._reversibly if rebuilds else None)

    def _reversibly(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        steps = [_step(f"bijections[{i}]", b, inverse, log_det) for i, b in enumerate(self.bijections)]  # type: ignore[arg-type]
        return reversible(steps[::-1] if inverse else steps, x, context, self._guard, self.memory)


def _chain(bijections: Iterable[Bijection], features: int | None) -> tuple[int | None, int | None]:
    """Features in and out of the chain; ValueError where two neighbours disagree."""
    first = current = features
    for i, bijection in enumerate(bijections):
        check_kind(f"bijections[{i}]", bijection, Bijection)
        if None not in (current, bijection.features) and current != bijection.features:
            raise ValueError(
                f"bijections[{i}] ({type(bijection).__name__}) takes {bijection.features} features "
                f"and is given {current}"
            )
        first = bijection.features if first is None else first
        current = current if bijection.features_out is None else bijection.features_out
    return first, current


def stored_tensors(
    bijections: Iterable[nn.Module], runs_as_op: Callable[[MaskedAutoregressive], bool] = lambda _: False
) -> float:
    """About how many tensors of the input's size autograd keeps for these bijections.

    Each layer keeps 4 of its own width, and 2 of the output width of each of its weights. ``runs_as_op``: whether a
    masked autoregressive layer runs as an op that keeps its input and output alone, as inverses and kernels do.
    """
    total = 0.0
    for bijection in bijections:
        is_op = isinstance(bijection, MaskedAutoregressive) and runs_as_op(bijection)
        own = () if is_op else bijection.parameters()
        widths = sum(parameter.shape[0] for parameter in own if parameter.ndim > 1)
        total += 4 + 2 * widths / (getattr(bijection, "features", None) or 1)
    return total


def _stored(bijections: Iterable[nn.Module]) -> tuple[float, float, float]:
    """``stored_tensors`` of the forward, of the inverse, and of the forward in kernels."""
    return (
        stored_tensors(bijections),
        stored_tensors(bijections, lambda _: True),
        stored_tensors(bijections, lambda layer: layer.spline is None),
    )


def _step(place: str, bijection: Bijection, inverse: bool, log_det: bool) -> Step:
    # A layer's own _undo may not run its hooks: a layer with hooks is undone by its public methods.
    hooked = bijection._forward_hooks or bijection._forward_pre_hooks or bijection._backward_hooks
    undo_layer = partial(Bijection._undo, bijection) if hooked else bijection._undo
    forward = partial(run, bijection, inverse=inverse, log_det=log_det)
    undo = partial(undo_layer, inverse=inverse, log_det=log_det)
    return Step(f"{place} ({type(bijection).__name__})", bijection, forward, undo)
