"""A chain's couplings together: in one launch on a GPU, in one loop of plain torch on a CPU.

    member       an affine coupling with MLP conditioners, a permutation, another affine map (an ActNorm, an LU
                 linear map), or anything else, which runs as the library has it
    one loop     ops.plain_couplings over each run of couplings. A mask that is not the two halves is a
                 permutation of the features. Neighbouring permutations are one index, and none is needed where
                 the halves change places
    one launch   ops.coupling_stack over all members: fused_launch.py

Parameters are read as they are at each call. What was recognised holds while every attribute of the members and of
the modules inside them is the same object, and every mask has the same values: ``Fused.renewed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain as chained
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import autocast_dtype, uses_triton
from ..ops.activations import ACTIVATIONS
from ..ops.plain_couplings import PlainCoupling, run_couplings
from ..rows import by_rows, rows_at_once
from .adapter import Options, Unfit, adapter_for
from .coupling_launch import narrowed
from .coupling_side import Side
from .fused_launch import Affine, Coupling, Launch, Member, launch_of
from .identity import HOOKS, changed_method, has_global_hook, is_hooked, is_patched, original_class
from .mlp import MLP, find_mlp

__all__ = ["Fused", "Maps"]

Outputs = tuple[Tensor, Tensor | None]
Flat = Callable[[Any], Iterable[tuple[str, nn.Module]]]
Run = Callable[[Any, Tensor, Mapping[str, Any], bool], Outputs]

_NO_CONTEXT: Mapping[str, Any] = {"context": None}


@dataclass(frozen=True)
class Maps:
    """The permutations and affine maps of a library.

    Args:
        known: whether a module is of one of its classes, as the library made it.
        of: by class name, what such a module is of vectors: a permutation as a list p, y = x[:, p], or a map; None
            where it runs as it is.
    """

    known: Callable[[nn.Module], bool]
    of: Mapping[str, Callable[[Any], list[int] | Affine | None]]


_FEWEST = 2  # couplings
# Modules without settings: how many attributes they have, and their parameters and modules, say all of them.
_PLAIN = (nn.Identity, nn.Linear, nn.ModuleList, nn.ReLU, nn.Sequential, nn.SiLU, nn.Sigmoid, nn.Tanh)


@dataclass(frozen=True, eq=False)
class _Loop:
    """Couplings in a loop."""

    couplings: list[Callable[[], PlainCoupling]]
    first: int

    def __call__(self, x: Tensor, inverse: bool) -> Outputs:
        return run_couplings(x, [build() for build in self.couplings], None, inverse, True, self.first)


@dataclass(frozen=True, eq=False)
class _Index:
    """y = x[:, index]."""

    index: list[int]
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, x: Tensor, inverse: bool) -> Outputs:
        if x.device not in self._on:
            with torch.inference_mode(False):  # which they outlive
                index = torch.tensor(self.index, device=x.device)
                self._on[x.device] = index, index.argsort()
        return x.index_select(1, self._on[x.device][inverse]), None


@dataclass(frozen=True, eq=False)
class _Own:
    """A member as the library has it."""

    module: nn.Module
    run: Run

    def __call__(self, x: Tensor, inverse: bool) -> Outputs:
        return self.run(self.module, x, _NO_CONTEXT, inverse)


class Fused:
    """The members of one chain as they were recognised, and what runs them.

    Args:
        chain: the instance.
        flat: names all its members in order.
        run: runs one of them as the library does.
        maps: of its library.
        options: what ``accelerate`` was asked for.
    """

    def __init__(self, chain: nn.Module, flat: Flat, run: Run, maps: Maps, options: Options) -> None:
        self.flat, self._run, self._maps, self._options = flat, run, maps, options
        self._evidence = _Evidence(chain)
        members: list[Member] = []
        for _, module in flat(chain):
            found = _recognise(module, maps, options)
            members += [module] if found is None else found
            if found is not None:
                self._evidence.add(module)
        self._evidence.close()
        couplings = [member for member in members if isinstance(member, Coupling)]
        sizes = {len(coupling.kept) + len(coupling.moved) for coupling in couplings}
        self.count = len(couplings)
        if self.count < _FEWEST or len(sizes) > 1:
            raise Unfit("fewer than two couplings of it are MLP couplings of one width")
        (self.features,) = sizes
        (self.dtype, *others) = {t.dtype for c in couplings for m in c.mlps for w in m.layers for t in w[:1]}
        if others:
            raise Unfit("its couplings have weights of several dtypes")
        self._steps = _loops(members, self.features, run)
        row_apart = all(not isinstance(step, _Own) or maps.known(step.module) for step in self._steps)
        widths = [self.features, *[size for c in couplings for m in c.mlps for size in m.sizes]]
        self._widths: list[int | None] = [max(widths) if row_apart else None]
        self._launch: Launch | None = launch_of(members, self.features)

    def describe(self, like: Tensor) -> str:
        """For the report."""
        launch = self._launch is not None and self._launch.has_tile(like, self._options.precision)
        if like.is_cuda:
            return f"{self.count} couplings in one " + ("launch" if launch else "loop")
        return f"{self.count} couplings in one loop" + (" (on a GPU: in one launch)" if launch else "")

    @property
    def takes_precision(self) -> bool:
        return self._launch is not None

    def renewed(self, chain: nn.Module) -> Fused | None:
        """This where it holds, else the chain as it is now; None where nothing of it runs together."""
        if self._evidence.holds(chain):
            return self
        try:
            with torch.inference_mode(False):  # which it outlives
                return Fused(chain, self.flat, self._run, self._maps, self._options)
        except (Unfit, RuntimeError):  # RuntimeError: there are no values to read
            return None

    def takes(self, x: Any) -> bool:
        """Whether this runs x."""
        if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if x.ndim != 2 or x.shape[1] != self.features or x.dtype != self.dtype or has_global_hook():
            return False
        if uses_triton(x):
            return self._launch is not None and self._launch.has_tile(x, self._options.precision)
        return autocast_dtype(x.device.type) is None

    def __call__(self, chain: nn.Module, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """(y, log_det [B])."""
        if uses_triton(x):
            assert self._launch is not None
            return self._launch(chain, x, inverse, self._options.precision)
        rows = rows_at_once(x, lambda: self._widths)
        if rows is None:
            return self._loop(x, inverse)
        return by_rows(lambda part: self._loop(part, inverse), x, rows)

    def _loop(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for step in reversed(self._steps) if inverse else self._steps:
            x, part = step(x, inverse)
            if part is not None:
                total = part if total is None else total + part
        assert total is not None
        return x, total


class _Evidence:
    """What a recognition rests on."""

    def __init__(self, chain: nn.Module) -> None:
        self._functions: dict[tuple[type, str], Any] = {}
        self._masks: list[tuple[Tensor, int, Tensor]] = []
        lists = (m for m in chain._modules.values() if isinstance(m, (nn.ModuleList, nn.Sequential)))
        self._watched: list[dict[Any, Any]] = [chain._modules, *[module._modules for module in lists]]
        self._counted: list[dict[Any, Any]] = []
        self._values: list[Any] = []
        self._sizes: list[int] = []

    def add(self, module: nn.Module) -> None:
        """A recognised member."""
        adapter, kind = adapter_for(module), original_class(module)
        names = ("forward", "inverse") if adapter is None else (*adapter.methods, *adapter.assumes)
        self._functions |= {(kind, name): getattr(kind, name) for name in names}
        for inside in module.modules():
            own: dict[str, Any] = vars(inside)
            cls: Any = original_class(inside)
            self._functions[cls, "forward"] = cls.forward
            dicts = own["_parameters"], own["_buffers"], own["_modules"]
            self._watched += [each for each in (*((own,) if cls not in _PLAIN else ()), *dicts) if each]
            self._counted += [own, *dicts, *[own[name] for name in HOOKS]]
        if adapter is None:
            masks: Iterable[Tensor] = module.buffers()
        else:
            masks = adapter.masks(module) if adapter.masks else ()
        self._masks += [(mask, _writes(mask), mask.detach().clone()) for mask in masks]

    def close(self) -> None:
        """No member is added from here on."""
        self._counted = [*self._watched, *self._counted]
        self._values, self._sizes = list(self._now()), list(map(len, self._counted))

    def _now(self) -> Iterable[Any]:
        return chained.from_iterable(map(dict.values, self._watched))

    def holds(self, chain: nn.Module) -> bool:
        """Whether it is all as it was."""
        if self._watched[0] is not chain._modules or is_patched(chain):
            return False
        if list(map(len, self._counted)) != self._sizes or not all(map(is_, self._now(), self._values)):
            return False
        if any(getattr(cls, name) is not function for (cls, name), function in self._functions.items()):
            return False
        return all(
            _writes(t) == writes and (not t.is_cpu or torch.equal(t, value)) for t, writes, value in self._masks
        )


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _recognise(module: nn.Module, maps: Maps, options: Options) -> list[Member] | None:
    """The couplings or the one map that this member is; None where it runs as it is."""
    adapter = adapter_for(module)
    if is_hooked(module) or has_global_hook():
        return None
    try:
        if adapter is None:
            make = maps.of.get(original_class(module).__qualname__) if maps.known(module) else None
            found = None if make is None or any(map(is_hooked, module.modules())) else make(module)
            return None if found is None else [found]
        if not adapter.is_coupling or any(map(is_hooked, adapter.inner(module))):
            return None
        if changed_method(module, (*adapter.methods, *adapter.assumes)) is not None:
            return None
        layout = adapter.plan(module, options).layout
    except Unfit:
        return None
    sides = adapter.sides(module, layout)
    couplings: list[Member] = [coupling for coupling in map(_coupling, sides) if coupling is not None]
    return couplings if couplings and len(couplings) == len(sides) else None


def _coupling(side: Side) -> Coupling | None:
    mlps = tuple(mlp for mlp in map(find_mlp, side.nets) if mlp is not None)
    if not mlps or len(mlps) < len(side.nets) or len({(m.activation, m.constants, m.sizes) for m in mlps}) > 1:
        return None
    if any(type(t) not in (Tensor, nn.Parameter) for m in mlps for w in m.layers for t in w if t is not None):
        return None
    n_in, n_out = mlps[0].sizes[0], mlps[0].sizes[-1]
    double = 1 if side.tail.layout in ("pair", "shift") else 2
    features = n_in if side.full else n_in + n_out // double
    kept, moved = (part[0].tolist() for part in side.split.take(torch.arange(features)[None]))
    fits = (n_in, n_out) == (features, features) if side.full else (n_in, n_out) == (len(kept), double * len(moved))
    fits = fits and side.split.features in (None, features) and bool(moved) and bool(kept)
    return Coupling(side, mlps, kept, moved) if fits else None


def _loops(members: Sequence[Member], features: int, run: Run) -> list[Any]:
    """The members as the loop's steps: x as it stands is x[:, order] as the library has it."""
    order = identity = list(range(features))
    steps: list[Any] = []

    def arrange(wanted: list[int]) -> None:
        nonlocal order
        if wanted != order:
            steps.append(_Index([order.index(feature) for feature in wanted]))
            order = wanted

    for member in members:
        if isinstance(member, list):
            order = [member.index(feature) for feature in order]
        elif isinstance(member, Coupling):
            if order != member.moved + member.kept:
                arrange(member.kept + member.moved)
            moves = int(order != member.moved + member.kept)
            first = len(member.kept if moves else member.moved)
            if not steps or not isinstance(steps[-1], _Loop) or steps[-1].first != first:
                steps.append(_Loop([], first))
            steps[-1].couplings.append(_plain(member, moves))
        else:
            arrange(identity)
            steps.append(_Own(member.module if isinstance(member, Affine) else member, run))
    arrange(identity)
    return steps


def _plain(coupling: Coupling, moves: int) -> Callable[[], PlainCoupling]:
    """What gives it as the loop takes it, with the parameters as they are."""
    side, tail, mlp = coupling.side, coupling.side.tail, coupling.mlps[0]
    activation = mlp.parts[1] if len(mlp.parts) > 1 else torch.relu
    if not mlp.constants:
        activation = ACTIVATIONS.get(mlp.activation, activation)

    kept, moved = _run_of(coupling.kept), _run_of(coupling.moved)

    def layers(mlp: MLP) -> Sequence[tuple[Tensor, Tensor | None]]:
        if not side.full:
            return mlp.layers
        if kept is None or moved is None or len(mlp.layers) == 1:
            return narrowed(mlp, side)
        (first, bias), *rest, (last, last_bias) = mlp.layers
        return [(first[:, kept], bias), *rest, (last[moved], None if last_bias is None else last_bias[moved])]

    def build() -> PlainCoupling:
        nets = [layers(mlp) for mlp in coupling.mlps]
        (weights, biases), *second = [([w for w, _ in net], [b for _, b in net]) for net in nets]
        return PlainCoupling(
            weights, biases, activation, tail.log_scale, tail.order == "scale_first", tail.layout == "interleaved",
            moves, tail.layout == "raw_first", second[0] if second else None, side.factor,
        )  # fmt: skip

    if side.full:  # whose columns are chosen at each call
        return build
    built = build()
    return lambda: built


def _run_of(features: list[int]) -> slice | None:
    """The slice that these features are; None where they are none."""
    found = range(features[0], features[-1] + 1, features[1] - features[0] if len(features) > 1 else 1)
    return slice(found.start, found.stop, found.step) if found.step > 0 and features == list(found) else None
