"""The networks that an instance of a registered class may have, and its number of features.

What the user's description leaves open is read from calls of the networks by themselves. A ``Recorder`` then takes
the place of each network, and shows with what the instance calls it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Stub, Unfit
from .formula import Parameter, Path, at, shaped
from .verify import bare_copy

LAYOUTS = ("halves", "raw_first", "interleaved")
_UNKNOWN_FEATURES = (5, 6)  # tried where neither the class nor its networks say how many there are
_POSITIONS = (4, 16)  # per dimension after the channels
_SIZES = (8.0, 1.5, 1.5)  # of a recorder's outputs, by row
_LARGE = (60.0, -60.0)  # of one recorder's outputs, in two rows of its own


@dataclass(frozen=True)
class Description:
    """What the user says of a class; None is found out.

    Args:
        nets: names of the attributes that hold the networks.
        order, layout, moves, log_det, features: see ``register_adapter``.
        methods: by name, whether it is to compute the inverse, and its arguments after x; forwards come first.
    """

    nets: tuple[Path, ...]
    order: str | None
    layout: str | None
    moves: str | None
    log_det: bool | None
    features: str | None
    methods: Mapping[str, tuple[bool, tuple[Parameter, ...]]]


@dataclass(frozen=True)
class Net:
    """What one network does when it is called alone.

    Args:
        path: in the instance.
        inputs, outputs: channels; of a pair, outputs of each.
        keys: of its two outputs, as ``Formula.output``; None for one tensor.
        positions: the dimensions after the channels.
    """

    path: Path
    inputs: int | None = None
    outputs: int | None = None
    keys: tuple[Any, Any] | None = None
    positions: tuple[int, ...] = ()


def candidates(instance: nn.Module, given: Description) -> Iterator[tuple[list[Net], int]]:
    """(networks, number of features) to try, the most likely first. Raises Unfit where there are none."""
    paths = [path for name in given.nets for path in _listed(instance, name)]
    nets = [_alone(instance, path) for path in paths]
    if not nets:
        raise Unfit("its conditioner is a list without networks")
    first = nets[0]
    for features in _features(instance, given, first, alone=True):
        yield nets, features
    if len(given.nets) > 1 or first.outputs is None or first.keys is not None:
        return
    for name in instance._modules:  # the class may have a second network per coupling that was not named
        others = [] if (name,) in given.nets else _listed(instance, (name,), must=False)
        if len(others) == len(nets):
            found = [_alone(instance, path) for path in others]
            if [(n.inputs, n.outputs) for n in found] == [(n.inputs, n.outputs) for n in nets]:
                for features in _features(instance, given, first, alone=False):
                    yield [*nets, *found], features


def _listed(instance: nn.Module, path: Path, must: bool = True) -> list[Path]:
    """Paths of the networks at this path: itself, or those in the ModuleList or ModuleDict there."""
    found: Any = instance
    for name in path:
        found = found._modules.get(name) if isinstance(found, nn.Module) else None
    if not isinstance(found, nn.Module):
        if must:
            raise Unfit(f"its {'.'.join(path)} is not a module")
        return []
    if not isinstance(found, (nn.ModuleList, nn.ModuleDict)):
        return [path]
    return [inside for name in found._modules for inside in _listed(instance, (*path, name), must)]


def _alone(instance: nn.Module, path: Path) -> Net:
    """The network's channels and outputs, from a call of a copy of it by itself, if that is possible."""
    net = at(instance, path)
    weight = next((p for p in net.parameters() if p.ndim > 1), None)
    if weight is None:
        return Net(path)
    alone = bare_copy(net, weight.dtype, ()).eval()
    for size in _POSITIONS if weight.ndim > 2 else (1,):
        positions = (size,) * (weight.ndim - 2)
        x = torch.randn(2, weight.shape[1], *positions, dtype=weight.dtype, device=weight.device)
        try:
            y = alone(x)
        except Exception:  # it may need a context
            continue
        keys = None if isinstance(y, Tensor) else (0, 1) if isinstance(y, (tuple, list)) else tuple(y)
        parts = [y] if keys is None else [y[key] for key in keys]
        if not 0 < len(parts) <= 2 or not all(_is_batch(part, parts[0], positions) for part in parts):
            raise Unfit(f"its {'.'.join(path)} returns neither a tensor [B, C, ...] nor two of one shape")
        return Net(path, x.shape[1], parts[0].shape[1], keys, positions)
    return Net(path, positions=(_POSITIONS[0],) * (weight.ndim - 2))


def _is_batch(part: Any, like: Tensor, positions: tuple[int, ...]) -> bool:
    return isinstance(part, Tensor) and part.ndim > 1 and part.shape == (2, like.shape[1], *positions)


def _features(instance: nn.Module, given: Description, net: Net, alone: bool) -> list[int]:
    """Numbers of features to try. ``alone``: whether the network may give the shift and the raw value at once."""
    if given.features is not None:
        return [getattr(instance, given.features)]
    if net.inputs is None or net.outputs is None:
        return [*_UNKNOWN_FEATURES]
    at_once = [net.inputs + net.outputs // 2] if alone and net.keys is None and net.outputs % 2 == 0 else []
    return [*at_once, net.inputs + net.outputs, net.inputs]


@dataclass(frozen=True)
class Seen:
    """One call of a network: its index, input, context and output [first | second]."""

    net: int
    kept: Tensor
    context: tuple[Any, ...]
    output: Tensor


class Recorder(nn.Module):
    """Replaces a network by a ``Stub`` with as many outputs, and records its calls."""

    def __init__(self, index: int, net: Net, features: int, log: list[Seen], sizes: Sequence[float]) -> None:
        super().__init__()
        self.index, self.net, self.features, self.log, self.sizes = index, net, features, log, sizes
        self.stub: Stub | None = None

    def forward(self, kept: Tensor, *context: Any, **named: Any) -> Any:
        if self.net.inputs not in (None, kept.shape[1]):
            raise ValueError(f"{'.'.join(self.net.path)} takes {self.net.inputs} features, not {kept.shape[1]}")
        both = 2 if self.net.keys is not None else 1
        out = 2 * (self.features - kept.shape[1]) if self.net.outputs is None else both * self.net.outputs
        if self.stub is None:
            draw: Callable[..., Tensor] = lambda *shape: torch.randn(*shape).to(kept)  # noqa: E731
            sizes = torch.tensor(self.sizes).to(kept).view(-1, *[1] * (kept.ndim - 1))
            self.stub = Stub(kept.shape[1], out, draw, sizes)  # type: ignore[arg-type]
        y = self.stub(kept, *context, **named)
        self.log.append(Seen(self.index, kept.clone(), (*context, *named.items()), y.clone()))
        return shaped(y, self.net.keys)


def sizes_of(index: int, count: int) -> list[float]:
    """Sizes of the outputs of one of ``count`` networks' recorders, by row."""
    large = [_LARGE if i == index else _SIZES[-1:] * 2 for i in range(count)]
    return [*_SIZES, *itertools.chain(*large), _SIZES[-1]]
