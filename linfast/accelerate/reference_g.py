"""The research repository's g, layer by layer; its conditioners are in ``reference_unet``.

    ActNorm   (x + bias) e^log_scale
    1x1       y = W x over channels
    block     ActNorm, then y1 = (x1 + t) e^s with (t, s) = F(x2), y2 likewise of G(y1), then y = W (y1 | y2)
    chain     where the channel count is odd, a 2 x 2 squeeze; the blocks; where squeezed, the unsqueeze
    g         mode "gx" runs the chain at time 1, "gy" at time 0

With memory="invert" the backward rebuilds the activations of a chain, or of a block outside any chain. ActNorm, the
two couplings and the 1x1 are one step each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..compat.from_reference import TIMES, holds_values
from ..dispatch import inverse_or_nan
from ..flows.undo import Outputs
from ..freeze import derived
from ..ops.affine_coupling import affine_coupling
from ..ops.channel_mix import channel_mix
from ..scale_maps import ScaleMap
from .adapter import Draw, Options, Plan, Stub, Unfit
from .chain import Part, parts_to_invert, run_inverting
from .identity import changed_method, has, original_class
from .reference_unet import constant_plan, constant_time, reference_adapter


def _both_ways(module: Any, draw: Draw, *shape: int, timed: bool = False) -> list[Tensor]:
    """The outputs of the module's two methods on random inputs; with a random time per sample where ``timed``."""
    return [run(draw(*shape), *([draw(shape[0])] if timed else [])) for run in (module.forward, module.inverse)]


def _two_methods(run: Callable[[Any, Tensor, Any, bool], Tensor]) -> dict[str, Callable[..., Tensor]]:
    return {"forward": lambda g, x, t: run(g, x, t, False), "inverse": lambda g, y, t: run(g, y, t, True)}


# ActNorm


def _plan_actnorm(norm: Any, options: Options) -> Plan:
    loaded = norm.initialized is False and holds_values(norm)
    if "actnorm_reinit" in options.keep_defects:
        note = "kept: it throws loaded values away at its first batch"
    else:
        note = "fixed: it had loaded values and would have thrown them away at its first batch" if loaded else ""
    return Plan("one multiply-add", note)


def _is_initialised(norm: Any) -> bool:
    """The norm's flag. Loading a state_dict does not set it, so it is set here where the norm holds values."""
    if norm.initialized is False and "actnorm_reinit" not in norm._linfast_plan.options.keep_defects:
        norm.initialized = holds_values(norm)
    return bool(norm.initialized)


def _actnorm(norm: Any, x: Tensor) -> Tensor:
    if not _is_initialised(norm):
        norm._init(x)
    scale = norm.log_scale.exp()
    return torch.addcmul(norm.bias * scale, x, scale)


def _actnorm_inverse(norm: Any, y: Tensor) -> Tensor:
    if not _is_initialised(norm):
        return y
    return torch.addcmul(-norm.bias, y, (-norm.log_scale).exp())


def _probe_actnorm(norm: Any, draw: Draw) -> Sequence[Tensor]:
    if norm.initialized is False:
        norm.initialized = holds_values(norm)  # the defect is not compared
    return _both_ways(norm, draw, 3, norm.bias.shape[1], 2, 3)


# Invertible 1x1


def _mix_inverse(mix: Any, y: Tensor) -> Tensor:
    return channel_mix(y, derived(mix, "inverse", lambda: inverse_or_nan(mix.W).to(mix.W.dtype)))


# Block


def _plan_block(block: Any, options: Options | None = None) -> Plan:
    for coupling in (block.F, block.G):
        name = type(coupling).__name__
        if name != "AffineCoupling" or not has(coupling, ("cond", "clamp")):
            raise Unfit(f"its couplings are {name}, not the repository's AffineCoupling")
        changed = changed_method(coupling, ("forward", "inverse", "_shift_log_scale"))
        if changed is not None:
            raise Unfit(f"the {changed} of its AffineCoupling was replaced")
    return Plan("two affine couplings, clamp")


def _run_block(block: Any, x: Tensor, t: Any, inverse: bool) -> Tensor:
    parts = parts_to_invert(block, x, _block_parts)
    if parts is not None:
        return run_inverting(block, parts, x, {"t": t}, inverse)[0]
    parts = _block_parts(block)
    for part in reversed(parts) if inverse else parts:
        x, _ = part.run(part.module, x, {"t": t}, inverse)
    return x


def _block_parts(block: Any, where: str = "") -> list[Part]:
    parts = [] if block.actnorm is None else [Part(f"{where}actnorm", block.actnorm, _run_layer)]
    for name, moves in (("F", "first"), ("G", "second")):
        coupling = getattr(block, name)
        parts.append(Part(where + name, coupling, partial(_run_coupling, moves), (coupling.cond,)))
    return [*parts, Part(f"{where}mix", block.mix, _run_layer)]


def _run_layer(layer: Any, x: Tensor, context: Mapping[str, Any], inverse: bool) -> Outputs:
    return (layer.inverse(x) if inverse else layer(x)), None


def _run_coupling(moves: str, coupling: Any, x: Tensor, context: Mapping[str, Any], inverse: bool) -> Outputs:
    first, second = x.chunk(2, 1)
    params = coupling.cond(second if moves == "first" else first, context["t"])
    clamp = ScaleMap("clamp", coupling.clamp)
    return affine_coupling(x, params, clamp, moves=moves, inverse=inverse)[0], None


def _stub_conditioners(block: Any, draw: Draw, size: float = 1.5) -> int:
    """Replace a copy's conditioners by stubs. Returns the block's number of channels."""
    half = len(block.mix.W) // 2
    for coupling in (block.F, block.G):
        coupling._modules["cond"] = Stub(half, 2 * half, draw, size)
    return 2 * half


# The chain of blocks


def _plan_chain(chain: Any, options: Options) -> Plan:
    _chain_parts(chain)  # raises Unfit where one cannot be rebuilt
    return Plan(f"{len(chain.blocks)} blocks, rebuilt in the backward")


def _chain_parts(chain: Any) -> list[Part]:
    if chain.use_squeeze and changed_method(chain.squeeze, ("forward", "inverse")) is not None:
        raise Unfit("stored: its squeeze was replaced")
    for block in chain.blocks:
        if original_class(block).__qualname__ != "InvUnetBlock" or changed_method(block, ("forward", "inverse")):
            raise Unfit(f"stored: its {type(block).__name__} is not the repository's InvUnetBlock")
        _plan_block(block)  # raises Unfit
    return [part for i, block in enumerate(chain.blocks) for part in _block_parts(block, f"blocks[{i}].")]


def _run_chain(chain: Any, x: Tensor, t: Any, inverse: bool) -> Tensor:
    parts = parts_to_invert(chain, x, _chain_parts)
    if parts is None:
        return getattr(chain._linfast_original, "inverse" if inverse else "forward")(chain, x, t)
    x = chain.squeeze(x) if chain.use_squeeze else x
    y, _ = run_inverting(chain, parts, x, {"t": t}, inverse)
    return chain.squeeze.inverse(y) if chain.use_squeeze else y


def _probe_chain(chain: Any, draw: Draw) -> Sequence[Tensor]:
    size = 1 / len(chain.blocks)  # with large scales a deep chain's inverse is inaccurate
    channels, *_ = (_stub_conditioners(block, draw, size) for block in chain.blocks)
    return _both_ways(chain, draw, 2, channels // 4 if chain.use_squeeze else channels, 4, 6, timed=True)


# g


def _time(x: Tensor, mode: str) -> Tensor:
    if mode not in TIMES:
        raise NotImplementedError(f"No such mode exists: {mode}")
    return constant_time(TIMES[mode], x)


class _Invertible(Stub):
    def inverse(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t) + t.mean()


def _probe_g(g: Any, draw: Draw) -> Sequence[Tensor]:
    g._modules["g"] = _Invertible(2, 2, draw)
    return [run(draw(3, 2, 2, 3), mode=mode) for run in (g.forward, g.inverse) for mode in TIMES]


ADAPTERS = (
    reference_adapter(
        name="ActNorm2d",
        attributes=("bias", "log_scale", "initialized", "_init"),
        methods={"forward": _actnorm, "inverse": _actnorm_inverse},
        plan=_plan_actnorm,
        probe=_probe_actnorm,
    ),
    reference_adapter(
        name="Inv1x1Conv",
        attributes=("W",),
        methods={"forward": lambda mix, x: channel_mix(x, mix.W), "inverse": _mix_inverse},
        plan=constant_plan("channel mix"),
        probe=lambda mix, draw: _both_ways(mix, draw, 3, len(mix.W), 2, 3),
    ),
    reference_adapter(
        name="InvUnetBlock",
        attributes=("F", "G", "mix", "actnorm"),
        methods=_two_methods(_run_block),
        plan=_plan_block,
        probe=lambda block, draw: _both_ways(block, draw, 3, _stub_conditioners(block, draw), 2, 3, timed=True),
        inner=lambda block: (block.F, block.G),
        conditioners=lambda block: (block.F.cond, block.G.cond),
        stored="",
    ),
    reference_adapter(
        name="InvUnet",
        attributes=("blocks", "squeeze", "use_squeeze"),
        chain=True,
        methods=_two_methods(_run_chain),
        plan=_plan_chain,
        probe=_probe_chain,
        inner=lambda chain: (*chain.blocks, *(m for block in chain.blocks for m in (block.F, block.G))),
        emptied=lambda chain: tuple(m.cond for block in chain.blocks for m in (block.F, block.G)),
    ),
    reference_adapter(
        name="InverseUnet",
        attributes=("g", "dim"),
        methods={
            "forward": lambda g, x, **kwargs: g.g(x, _time(x, kwargs["mode"])),
            "inverse": lambda g, x, **kwargs: g.g.inverse(x, _time(x, kwargs["mode"])),
        },
        plan=constant_plan("one time for the batch"),
        probe=_probe_g,
        emptied=lambda g: (g.g,),
    ),
)
