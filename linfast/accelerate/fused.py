"""The couplings of a chain together: in one launch on a GPU, in one loop of plain torch on a CPU.

    member       an affine coupling with MLP conditioners, a permutation, another affine map (an ActNorm, an LU
                 linear map), or any other module, which runs by the library's own code
    one loop     ops.plain_couplings over all couplings that follow one another. A mask other than the two halves
                 becomes a permutation of the features. Neighbouring permutations become one index; swapping the
                 halves needs none
    one launch   ops.coupling_stack over all members: launch.py

Parameters are read at each call. The members are recognised again where a module, parameter, setting or method was
replaced (flows/remembered.py) or a mask has other values: ``Fused.renewed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import autocast_dtype, has_global_hook, uses_triton
from ..flows.remembered import Evidence
from ..flows.undo import Outputs
from ..ops.activations import ACTIVATIONS
from ..ops.plain_couplings import PlainCoupling, run_couplings
from ..rows import by_rows, rows_at_once
from .adapter import Options, Plan, Unfit, adapter_for, untrained
from .identity import PLAN, changed_method, defined_as, is_hooked, is_patched, original_class
from .launch import Coupling, Launch, Member, arranged, launch_of, members_of, narrowed
from .sides import Affine, Index

Flat = Callable[[Any], Iterator[tuple[str, nn.Module]]]
Run = Callable[[Any, Tensor, Mapping[str, Any], bool], Outputs]

_NO_CONTEXT: Mapping[str, Any] = {"context": None}


@dataclass(frozen=True)
class Maps:
    """The invertible classes of one or several libraries, other than couplings.

    Args:
        library: names of the packages that define the classes.
        methods: names of the methods that must be unmodified.
        of: {class name: module -> its permutation or affine map of vectors, or None to run the library's own code}.
        others: names of the classes that always run by the library's own code.
    """

    library: tuple[str, ...]
    methods: tuple[str, ...]
    of: Mapping[str, Callable[[Any], Index | Affine | None]]
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.of, *self.others)

    def known(self, module: nn.Module) -> bool:
        """Whether the module is of one of these classes, with unmodified methods."""
        cls = original_class(module)
        found = cls.__qualname__ in self.names and cls.__module__.partition(".")[0] in self.library
        return found and changed_method(module, self.methods) is None


def listed(attribute: str, *nested: tuple[str, str]) -> Flat:
    """A Flat: the members in a chain's list ``attribute``, and those of chains of the ``nested`` classes in it."""

    def flat(chain: Any, where: str = "") -> Iterator[tuple[str, nn.Module]]:
        for i, member in enumerate(getattr(chain, attribute)):
            name = f"{where}{attribute}[{i}]"
            if nested and any(defined_as(member, *cls) for cls in nested):
                yield from flat(member, f"{name}.")
            else:
                yield name, member

    return flat


_FEWEST = 2  # couplings


@dataclass(frozen=True, eq=False)
class _Loop:
    """Couplings that follow one another, run by ops.plain_couplings. ``first`` is the length of the first half."""

    couplings: list[Callable[[], PlainCoupling]]
    first: int

    def __call__(self, x: Tensor, inverse: bool, log_det: bool) -> Outputs:
        return run_couplings(x, [build() for build in self.couplings], None, inverse, log_det, self.first)


def _own(module: nn.Module | None, run: Any) -> Callable[[Tensor, bool], Outputs]:
    """A step of the loop that runs a member by the library's own code."""
    return lambda x, inverse: run(module, x, _NO_CONTEXT, inverse)


class Fused:
    """The recognised members of one chain; a call runs them together. Raises Unfit where that is not possible.

    Args:
        chain: the instance.
        flat: chain -> (name, module) of its members in order.
        run: runs a member by the library's own code; None where all members must be couplings.
        maps: the library's invertible classes.
        options: the options of ``accelerate``.
    """

    def __init__(self, chain: nn.Module, flat: Flat, run: Run | None, maps: Maps, options: Options) -> None:
        self._arguments, self._options = (flat, run, maps, options), options
        members: list[Member] = []
        recognised: list[nn.Module] = []
        for _, module in flat(chain):
            found = _recognise(module, maps)
            members += [module] if found is None else found
            recognised += [] if found is None else [module]
        self._children, self._evidence = chain._modules, _evidence(chain, recognised)
        self._alone = recognised == [chain]  # the evidence then holds all of its attributes
        self.couplings = couplings = [member for member in members if isinstance(member, Coupling)]
        sizes = {coupling.features for coupling in couplings}
        if len(couplings) < _FEWEST or len(sizes) > 1:
            raise Unfit("fewer than two couplings of it are MLP couplings of one width")
        (self.features,) = sizes
        (self.dtype, *others) = {t.dtype for c in couplings for m in c.mlps for w in m.layers for t in w[:1]}
        if others:
            raise Unfit("its couplings have weights of several dtypes")
        if run is None and not all(isinstance(member, (Coupling, Index)) for member in members):
            raise Unfit("not all of its members are MLP couplings")
        self._steps = _loops(members, self.features, run)
        row_apart = all(maps.known(member) for member in members if isinstance(member, nn.Module))
        widths = [self.features, *[size for c in couplings for m in c.mlps for size in m.sizes]]
        self._widths: list[int | None] = [max(widths) if row_apart else None]
        self.launch: Launch | None = launch_of(members)

    def plan(self, chain: nn.Module) -> Plan:
        """The chain's plan. It reports which code runs on this device and on a GPU."""
        like = next(p for p in chain.parameters() if p.is_floating_point())
        launch = self.launch is not None and self.launch.has_tile(like, self._options.precision)
        runs = f"{len(self.couplings)} couplings in one " + ("launch" if like.is_cuda and launch else "loop")
        if launch and not like.is_cuda:
            runs += " (on a GPU: in one launch)"
        return Plan(runs, fused=self, takes_precision=launch)

    @property
    def permutations(self) -> int:
        """How many permutations the loop needs."""
        return sum(isinstance(step, Index) for step in self._steps)

    def renewed(self, chain: nn.Module) -> Fused | None:
        """This object where the chain is unchanged, else a new one; None where its members cannot run together."""
        if self._children is chain._modules and self._evidence.holds() and (self._alone or not is_patched(chain)):
            return self
        try:
            with torch.inference_mode(False):  # its tensors are used outside too
                return Fused(chain, *self._arguments)
        except (Unfit, RuntimeError):  # RuntimeError: there are no values to read
            return None

    def takes(self, x: Any) -> bool:
        """Whether this can run x; if not, the library's own code does."""
        if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if x.ndim != 2 or x.shape[1] != self.features or x.dtype != self.dtype or has_global_hook():
            return False
        if uses_triton(x):
            return self.launch is not None and self.launch.has_tile(x, self._options.precision)
        return autocast_dtype(x.device.type) is None

    def __call__(self, chain: nn.Module, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """(y, log_det [B]) of x [B, D], or of the inverse."""
        y, log_det = self._run(chain, x, inverse, True)
        assert log_det is not None
        return y, log_det

    def value(self, chain: nn.Module, x: Tensor, inverse: bool) -> Tensor:
        """y alone."""
        return self._run(chain, x, inverse, False)[0]

    def _run(self, chain: nn.Module, x: Tensor, inverse: bool, log_det: bool) -> Outputs:
        if uses_triton(x):
            assert self.launch is not None
            return self.launch(chain, x, inverse, self._options.precision)
        rows = rows_at_once(x, lambda: self._widths)
        if rows is None:
            return self._loop(x, inverse, log_det)
        return by_rows(lambda part: self._loop(part, inverse, log_det), x, rows)

    def _loop(self, x: Tensor, inverse: bool, log_det: bool) -> Outputs:
        total: Tensor | None = None
        for step in reversed(self._steps) if inverse else self._steps:
            x, part = step(x, inverse, log_det) if isinstance(step, _Loop) else step(x, inverse)
            if part is not None:
                total = part if total is None else total + part
        return x, total


def _evidence(chain: nn.Module, recognised: Iterable[nn.Module]) -> Evidence:
    """All that the recognition of these members depends on: modules, classes' methods and the masks' values."""
    lists = [m for m in chain._modules.values() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    functions: list[tuple[type, str]] = []
    masks: list[Tensor] = []
    for module in recognised:
        adapter, cls = adapter_for(module), original_class(module)
        names = ("forward", "inverse") if adapter is None else (*adapter.methods, *adapter.assumes)
        functions += [(cls, name) for name in names if hasattr(cls, name)]
        functions += [(original_class(inside), "forward") for inside in module.modules()]
        if adapter is None:
            masks += [*module.buffers(), *(p for p in module.parameters() if not p.is_floating_point())]
        else:
            masks += adapter.masks(module) if adapter.masks else untrained(module)
    return Evidence([chain, *lists], recognised, functions, masks, (PLAN,))


def _recognise(module: nn.Module, maps: Maps) -> list[Member] | None:
    """The member as couplings or as one map; None where it runs by the library's own code."""
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
        layout = adapter.layout(module)
    except Unfit:
        return None
    return members_of(adapter.members(module, layout))


def _loops(members: Sequence[Member], features: int, run: Run | None) -> list[Any]:
    """The loop's steps: permutations, maps, couplings that follow one another, and other members."""
    steps: list[Any] = []
    for member, moves in arranged(members, features, lambda c, order: int(order != c.moved + c.kept)):
        if isinstance(member, Coupling):
            first = len(member.kept if moves else member.moved)
            if not steps or not isinstance(steps[-1], _Loop) or steps[-1].first != first:
                steps.append(_Loop([], first))
            steps[-1].couplings.append(_plain(member, moves))
        elif isinstance(member, Index) or (isinstance(member, Affine) and member.module is None):
            steps.append(member)
        else:
            steps.append(_own(member.module if isinstance(member, Affine) else member, run))
    return steps


def _plain(coupling: Coupling, moves: int) -> Callable[[], PlainCoupling]:
    """A function that returns the coupling with its current parameters, as ops.plain_couplings takes it."""
    side, tail, mlp = coupling.side, coupling.side.tail, coupling.mlps[0]
    activation = mlp.parts[1] if len(mlp.parts) > 1 else torch.relu
    if not mlp.constants:
        activation = ACTIVATIONS.get(mlp.activation, activation)

    def build() -> PlainCoupling:
        nets = [narrowed(mlp, side.split) if side.full else mlp.layers for mlp in coupling.mlps]
        (weights, biases), *others = [([w for w, _ in net], [b for _, b in net]) for net in nets]
        raw_net = [(weights, biases), *others][-1] if tail.layout == "pair" else None
        return PlainCoupling(
            weights, biases, activation, tail.log_scale, tail.order == "scale_first", tail.layout == "interleaved",
            moves, tail.layout == "raw_first", raw_net, side.factor,
        )  # fmt: skip

    if side.full:  # its columns are selected at each call
        return build
    built = build()
    return lambda: built
