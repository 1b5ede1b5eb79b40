"""The couplings of a chain together: in one launch on a GPU, in one loop of plain torch on a CPU.

    member       an affine coupling with MLP conditioners, a permutation, another affine map (an ActNorm, an LU
                 linear map), or any other module, which runs by the library's own code
    one loop     ops.plain_couplings over all couplings of the same halves and what is between them. A mask other
                 than the two halves becomes a permutation of the features. Neighbouring permutations become one
                 index; swapping the halves needs none
    one launch   ops.coupling_stack over all members: launch.py

Parameters are read at each call. The members are recognised again where a module, parameter, setting or method was
replaced (flows/remembered.py) or a mask has other values: ``Together.renewed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import autocast_dtype, has_global_hook, uses_triton
from ..flows.remembered import Evidence
from ..flows.undo import Outputs
from ..rows import by_rows, rows_at_once
from .adapter import ORIGINAL, Options, Plan, Unfit, adapter_for, untrained
from .identity import PLAN, changed_method, is_hooked, is_patched, original_class
from .launch import Launch, launch_of
from .loop import NO_CONTEXT, Run, loops_of
from .maps import Flat, Maps
from .members import Coupling, Member, members_of
from .sides import Index
from .spline_curves import CURVE_METHODS

Recognise = Callable[[nn.Module, Maps], tuple[Sequence[Any], Iterable[Tensor]] | None]
"""(a module as members, the tensors whose values they were read from), or None: its library's own code runs."""

_FEWEST = 2  # couplings
_CALLED = "forward", "inverse"  # the methods of a nested chain that its own chain would call


class Together:
    """The recognised members of one chain, which a call runs together.

    Args:
        chain: the instance.
        flat: chain -> (name, module) of its members in order.
        run: runs a member by the library's own code; None where all members must be couplings.
        maps: the library's invertible classes.
        options: the options of ``accelerate``.
    """

    features: int
    first: nn.Module  # a coupling
    like: Tensor  # its first weight, whose dtype may change
    compared_in: torch.dtype | None = None  # by the check; None: in the weights' dtype
    _alone = False

    def __init__(self, chain: nn.Module, flat: Flat, run: Run | None, maps: Maps, options: Options) -> None:
        self._arguments, self._options = (flat, run, maps, options), options

    def _find(self, chain: nn.Module, recognise: Recognise) -> tuple[list[Any], list[nn.Module]]:
        """(the members in order, the modules that were recognised); what was not recognised stays a module.

        This holds until ``renewed`` finds a change of the recognised modules or of their masks' values.
        """
        flat, _, maps, _ = self._arguments
        members: list[Any] = []
        recognised: list[nn.Module] = []
        masks: list[Tensor] = []
        for _, module in flat(chain):
            found = recognise(module, maps)
            members += [module] if found is None else found[0]
            recognised += [] if found is None else [module]
            masks += [] if found is None else found[1]
        nested = [*_nested(chain, [module for _, module in flat(chain)])]
        for module in nested:
            if is_hooked(module) or changed_method(module, _CALLED) is not None:
                raise Unfit(f"its nested {type(module).__name__} has a hook or a replaced method")
        lists = [held for each in (chain, *nested) for held in _lists(each)]
        functions = [(original_class(module), name) for module in nested for name in _CALLED]
        for module in recognised:
            adapter = adapter_for(module)
            names = maps.methods if adapter is None else (*adapter.methods, *adapter.assumes)
            inner = {original_class(inside) for inside in module.modules()}
            of_classes = [(original_class(module), names), *((cls, CURVE_METHODS) for cls in inner)]
            functions += [(cls, name) for cls, own in of_classes for name in own if hasattr(cls, name)]
        self._children = chain._modules
        self._evidence = Evidence([chain, *lists], recognised, functions, masks, (PLAN,), nested)
        self._alone = recognised == [chain]  # the evidence then holds all of its attributes
        return members, recognised

    def plan(self, chain: nn.Module) -> Plan:
        """The chain's plan. It reports which code runs on this device and on a GPU."""
        raise NotImplementedError

    def renewed(self, chain: nn.Module) -> Together | None:
        """This object where the chain is unchanged, else a new one; None where its members cannot run together."""
        same = self._children is chain._modules and self._evidence.holds()
        if same and (self._alone or not is_patched(chain)):
            return self
        try:
            with torch.inference_mode(False):  # its tensors are used outside too
                return type(self)(chain, *self._arguments)
        except (Unfit, RuntimeError):  # RuntimeError: there are no values to read
            return None

    def takes(self, x: Any, context: Mapping[str, Any] = NO_CONTEXT) -> bool:
        """Whether this can run x; if not, the library's own code does."""
        if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if x.ndim != 2 or x.shape[1] != self.features or has_global_hook():
            return False
        return x.dtype == self.like.dtype or x.dtype == like_of(self.first).dtype  # where its weight was replaced

    def __call__(
        self, chain: nn.Module, x: Tensor, inverse: bool, context: Mapping[str, Any] = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        """(y, log_det [B]) of x [B, D], or of the inverse."""
        raise NotImplementedError

    def value(self, chain: nn.Module, x: Tensor, inverse: bool) -> Tensor:
        """y alone."""
        return self(chain, x, inverse)[0]


class Fused(Together):
    """Affine couplings with MLPs. Raises Unfit where fewer than two are known."""

    def __init__(self, chain: nn.Module, flat: Flat, run: Run | None, maps: Maps, options: Options) -> None:
        super().__init__(chain, flat, run, maps, options)
        members, recognised = self._find(chain, recognise)
        self.couplings = couplings = [member for member in members if isinstance(member, Coupling)]
        sizes = {coupling.features for coupling in couplings}
        if len(couplings) < _FEWEST or len(sizes) > 1:
            raise Unfit("fewer than two couplings of it are MLP couplings of one width")
        (self.features,) = sizes
        self.first = next(module for module in recognised if adapter_for(module) is not None)
        self.like = like_of(self.first)
        if len({t.dtype for c in couplings for m in c.mlps for w in m.layers for t in w[:1]}) > 1:
            raise Unfit("its couplings have weights of several dtypes")
        if run is None and not all(isinstance(member, (Coupling, Index)) for member in members):
            raise Unfit("not all of its members are MLP couplings")
        self._loops = loops_of(members, self.features, run)
        self._own = [member for member in members if isinstance(member, nn.Module)]
        widths = [self.features, *[size for c in couplings for m in c.mlps for size in m.sizes]]
        self._most = max(widths)
        self.launch: Launch | None = launch_of(members)

    def plan(self, chain: nn.Module) -> Plan:
        like = next(p for p in chain.parameters() if p.is_floating_point())
        launch = None if self.launch is None else self.launch.in_words(like, self._options.precision)
        runs = f"{len(self.couplings)} couplings in "
        if uses_triton(like):
            runs = runs + launch if launch else ORIGINAL
        else:
            runs += "one loop" + ("" if like.is_cuda else f" (on a GPU: {f'in {launch}' if launch else ORIGINAL})")
        return Plan(runs, fused=self, takes_precision=launch is not None, vectors=self.features)

    @property
    def permutations(self) -> int:
        """How many permutations the loop needs."""
        return sum(loop.permutations for loop in self._loops)

    def takes(self, x: Any, context: Mapping[str, Any] = NO_CONTEXT) -> bool:
        if not super().takes(x) or any(value is not None for value in context.values()):
            return False
        if uses_triton(x):
            precision, gradients = self._options.precision, torch.is_grad_enabled()
            return self.launch is not None and self.launch.tiles(x, precision, gradients) is not None
        return autocast_dtype(x.device.type) is None

    def __call__(
        self, chain: nn.Module, x: Tensor, inverse: bool, context: Mapping[str, Any] = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        y, log_det = self._run(chain, x, inverse, True)
        assert log_det is not None
        return y, log_det

    def value(self, chain: nn.Module, x: Tensor, inverse: bool) -> Tensor:
        return self._run(chain, x, inverse, False)[0]

    def _run(self, chain: nn.Module, x: Tensor, inverse: bool, log_det: bool) -> Outputs:
        if uses_triton(x):
            assert self.launch is not None
            return self.launch(chain, x, inverse, self._options.precision)
        rows = rows_at_once(x, lambda: [self._most if self._arguments[2].rows_apart(self._own) else None])
        scales: list[Tensor] = []
        loops = [loop.made(inverse, scales, log_det) for loop in self._loops]  # once for all parts of a long batch

        def run(x: Tensor) -> Outputs:
            log_dets: list[Tensor] = []
            for loop in reversed(loops) if inverse else loops:
                x, part = loop(x)
                log_dets += [] if part is None else [part]
            return x, sum(log_dets[1:], start=log_dets[0]) if log_det else None

        y, total = run(x) if rows is None else by_rows(run, x, rows)
        if scales and total is not None:
            of_scales = torch.cat(scales).abs().log().sum()
            total = total - of_scales if inverse else total + of_scales
        return y, total


def like_of(coupling: nn.Module) -> Tensor:
    return next(coupling.parameters())


def _lists(chain: nn.Module) -> list[nn.Module]:
    return [m for m in chain._modules.values() if isinstance(m, (nn.ModuleList, nn.Sequential))]


def _nested(chain: nn.Module, members: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The chains inside the chain that are not members themselves, but whose members are."""
    if any(chain is member for member in members):
        return
    for each in (child for held in _lists(chain) for child in held.children()):
        if not any(each is member for member in members):
            yield each
            yield from _nested(each, members)


def recognise(module: nn.Module, maps: Maps) -> tuple[list[Member], Iterable[Tensor]] | None:
    """The module as couplings or maps: see ``Recognise``."""
    adapter = adapter_for(module)
    masks: Iterable[Tensor]
    if is_hooked(module) or has_global_hook():
        return None
    try:
        if adapter is None:
            make = maps.of.get(original_class(module).__qualname__) if maps.known(module) else None
            found = None if make is None or any(map(is_hooked, module.modules())) else make(module)
            masks = [*module.buffers(), *(p for p in module.parameters() if not p.is_floating_point())]
            return None if found is None else ([found], masks)
        if not adapter.is_coupling or any(map(is_hooked, adapter.inner(module))):
            return None
        if changed_method(module, (*adapter.methods, *adapter.assumes)) is not None:
            return None
        layout = adapter.layout(module)
    except Unfit:
        return None
    members = members_of(adapter.members(module, layout))
    if members is None:
        return None
    return members, adapter.masks_of(module, layout) if adapter.masks else untrained(module)
