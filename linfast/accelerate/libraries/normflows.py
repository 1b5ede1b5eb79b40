"""normflows: AffineCouplingBlock, also inside GlowBlock; MaskedAffineFlow; NormalizingFlow.

    AffineCouplingBlock, latent to data: split, coupling and merge, which run as one here
        y = m e^s + t            exp
        y = m / sigmoid(s+2) + t  sigmoid, the default of GlowBlock
        y = m sigmoid(s+2) + t    sigmoid_inv
        params computed from the kept half, t and s interleaved; z -> (z, log_det [B])
    MaskedAffineFlow, a RealNVP or, without s, a NICE layer, latent to data
        y = b z + (1 - b) (z e^s + t),  s and t two nets of b z, both with all features
        a value of s or t that is not finite becomes NaN

Values that b sets to zero or that 1 - b drops are not computed here: an MLP runs without its first layer's columns
of zeros and its last layer's unused rows. The kernels compute e^s, not NaN, where s is infinite.
With memory="invert", reverse_kld and reverse_alpha_div still store activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...flows.undo import Context, Outputs
from ...ops.stack_weights import AffineMap
from ...scale_maps import ScaleMap
from ..adapter import Draw, Unfit
from ..chain import chain_adapter, per_sample, run_chain
from ..coupling import coupling_adapter, two_methods
from ..identity import changed_method, defined_as
from ..made_transforms import affine_of, made_adapter, spline_adapter
from ..maps import Maps, listed
from ..members import narrowed
from ..mlp import find_mlp
from ..sides import ADDITIVE, Affine, Index, Side, Split, Tail, index_of, split_of
from ..splines import spline_coupling
from ..unknown import Layers

_TAILS = {
    "exp": Tail("interleaved", ScaleMap("exp"), lambda s: s),
    "sigmoid": Tail("interleaved", ScaleMap("sigmoid"), lambda s: -F.logsigmoid(s + 2), undoes=True),
    "sigmoid_inv": Tail("interleaved", ScaleMap("sigmoid"), lambda s: F.logsigmoid(s + 2)),
}
_MOVES = {"channel": "second", "channel_inv": "first"}


def _find(block: Any) -> tuple[str, None]:
    split, coupling, merge = block.flows
    if not (
        defined_as(split, "normflows.flows.reshape", "Split")
        and defined_as(coupling, "normflows.flows.affine.coupling", "AffineCoupling")
        and defined_as(merge, "normflows.flows.reshape", "Merge")
    ):
        raise Unfit("its flows are not split, affine coupling, merge")
    for module in block.flows:
        changed = changed_method(module, ("forward", "inverse"))
        if changed is not None:
            raise Unfit(f"the {changed} of its {type(module).__name__} was replaced: not the library's own")
    if split.mode not in _MOVES or merge.mode != split.mode:
        raise Unfit(f"split mode {split.mode!r}: only {', '.join(_MOVES)}")
    if coupling.scale and coupling.scale_map not in _TAILS:
        raise Unfit(f"scale map {coupling.scale_map!r}")
    return (f"affine coupling, {coupling.scale_map}" if coupling.scale else "additive coupling"), None


def _sides(block: Any, layout: None, context: Sequence[Any]) -> list[Side]:
    net, coupling = block.flows[1].param_map, block.flows[1]
    tail = _TAILS[coupling.scale_map] if coupling.scale else ADDITIVE
    return [Side(Split("halves", _MOVES[block.flows[0].mode]), tail, net, (net,))]


_BLOCK = coupling_adapter(
    library="normflows",
    where="normflows.flows.affine.coupling",
    name="AffineCouplingBlock",
    find=_find,
    members=_sides,
    methods=two_methods(_sides),
    nets=lambda block: (block.flows[1].param_map,),
    shapes=lambda block: ((3, 6), (2, 6, 4, 3), (3, 5), (2, 5, 4, 3)),
    inner=lambda block: tuple(block.flows),
)


# MaskedAffineFlow

_MASKED = Tail("pair", ScaleMap("exp"), lambda s: s)


def _find_masked(flow: Any) -> tuple[str, Split]:
    if flow.b.ndim != 2:
        raise Unfit(f"its mask is {list(flow.b.shape[1:])}: only vectors")
    if set(flow.b[0].tolist()) != {0.0, 1.0}:
        raise Unfit("its mask is not zeros and ones, of each at least one")
    if not isinstance(flow.t, nn.Module):
        raise Unfit("it has no translation")
    split = split_of(flow.b[0] == 1)
    what = "affine coupling, exp" if isinstance(flow.s, nn.Module) else "additive coupling"
    return f"{what}, mask {split.kind}", split


def _sides_masked(flow: Any, split: Split, context: Sequence[Any]) -> list[Side]:
    nets = (flow.t, flow.s) if isinstance(flow.s, nn.Module) else (flow.t,)
    mlps = [find_mlp(net) for net in nets]

    def run(kept: Tensor) -> Any:
        shift, raw = (_run_narrowed(narrowed(mlp, split), mlp.parts[1:-1], kept) for mlp in mlps if mlp is not None)
        return shift, raw

    return [Side(split, _MASKED if len(nets) == 2 else ADDITIVE, None if None in mlps else run, nets, full=True)]


def _run_narrowed(layers: Sequence[Any], parts: Sequence[Callable[[Tensor], Tensor]], kept: Tensor) -> Tensor:
    """An MLP with narrowed first and last ``layers``; ``parts`` are its modules between these two."""
    (weight, bias), *rest = layers
    out = F.linear(kept, weight, bias)
    for part in parts:
        out = part(out)
    out = F.linear(out, *rest[-1]) if rest else out
    return torch.nan_to_num(out, torch.nan, torch.nan, torch.nan)


_MASKED_FLOW = coupling_adapter(
    library="normflows",
    where="normflows.flows.affine.coupling",
    name="MaskedAffineFlow",
    find=_find_masked,
    members=_sides_masked,
    methods=two_methods(_sides_masked),
    nets=lambda flow: tuple(flow._modules[name] for name in ("t", "s") if name in flow._modules),
    shapes=lambda flow: ((3, flow.b.shape[1]),),
    masks=lambda flow: (flow.b,),
)


# The coupling that CoupledRationalQuadraticSpline and CircularCoupledRationalQuadraticSpline run

_NEURAL_SPLINE = "normflows.flows.neural_spline.coupling"
_SPLINE_COUPLING = spline_coupling(
    "normflows",
    _NEURAL_SPLINE,
    "PiecewiseRationalQuadraticCoupling",
    (_NEURAL_SPLINE, "PiecewiseRationalQuadraticCDF"),
    tails=(None, "linear", "circular"),
)

# NormalizingFlow

_flat = listed("flows", ("normflows.flows.affine.glow", "GlowBlock"))


def _permutation(flow: Any) -> Index | None:
    if flow.mode == "swap":
        half = flow.num_channels // 2
        return Index([*range(half, flow.num_channels), *range(half)])
    return index_of(flow.perm, flow.inv_perm) if flow.mode == "shuffle" else None


def _constant(flow: Any) -> Affine | None:
    if flow.s.ndim != 2 or not bool(getattr(flow, "data_dep_init_done", True)):
        return None
    return Affine(lambda inverse: AffineMap(flow.s[0].exp(), flow.t[0], None, flow.s.sum()))


def _lu_permute(flow: Any) -> Affine:
    """Its forward is z -> P^-1 (L U)^-1 (z - b)."""

    def make(inverse: bool) -> AffineMap:
        back = flow.permutation._inverse_permutation
        lower, upper = flow.linear._create_lower_upper()  # its weight_inverse calls a function that torch removed
        eye = torch.eye(len(back), dtype=lower.dtype, device=lower.device)
        solved = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        weight = torch.linalg.solve_triangular(upper, solved, upper=True).index_select(0, back)
        undo = flow.linear.weight().index_select(1, back) if inverse else None
        return AffineMap(weight, -(weight @ flow.linear.bias), undo, -flow.linear.logabsdet())

    return Affine(make, flow)


_MAPS = Maps(
    ("normflows",),
    ("forward", "inverse"),
    {"ActNorm": _constant, "AffineConstFlow": _constant, "LULinearPermute": _lu_permute, "Permute": _permutation},
    others=("Invertible1x1Conv", "InvertibleAffine", "Squeeze"),
    initialises=lambda flow: not getattr(flow, "data_dep_init_done", True),
)


def _run_part(flow: Any, x: Tensor, context: Context, inverse: bool) -> Outputs:
    y, log_det = (flow.inverse if inverse else flow)(x)
    return y, per_sample(log_det, x)


_CHAIN: dict[str, tuple[bool, Callable[[Any, Tensor, Tensor], Any]]] = {
    "forward": (False, lambda chain, y, log_det: y),
    "forward_and_log_det": (False, lambda chain, y, log_det: (y, _default(log_det))),
    "inverse": (True, lambda chain, z, log_det: z),
    "inverse_and_log_det": (True, lambda chain, z, log_det: (z, _default(log_det))),
    "log_prob": (True, lambda chain, z, log_det: log_det.to(z.dtype) + chain.q0.log_prob(z)),
    "forward_kld": (True, lambda chain, z, log_det: -_default(_default(log_det) + chain.q0.log_prob(z)).mean()),
}
"""By method: whether it runs the flows' inverses, and (chain, y, log_det) -> its result."""


def _default(log_det: Tensor) -> Tensor:
    """In torch's default dtype, in which these methods of the library sum log-determinants."""
    return log_det.to(torch.get_default_dtype())


def _chain_method(method: str) -> Callable[..., Any]:
    """The method by ``run_chain``, or by the library's own code where that returns None."""
    inverse, result = _CHAIN[method]

    def run(chain: Any, x: Tensor) -> Any:
        outputs = run_chain(chain, x, {}, inverse)
        return getattr(chain._linfast_original, method)(chain, x) if outputs is None else result(chain, *outputs)

    return run


_METHODS = {name: _chain_method(name) for name in _CHAIN}


def _sample(chain: Any, num_samples: int = 1) -> tuple[Tensor, Tensor]:
    z, log_q = chain.q0(num_samples)
    z, log_det = _METHODS["forward_and_log_det"](chain, z)
    return z, log_q - log_det


def _results(chain: Any, draw: Draw, shape: Sequence[int], methods: Iterable[str]) -> list[Tensor]:
    outputs: list[Tensor] = []
    for method in methods:
        result = getattr(chain, method)(draw(*shape))
        outputs += result if isinstance(result, tuple) else (result,)
    return outputs


_FLOW = chain_adapter(
    "normflows",
    "normflows.core",
    "NormalizingFlow",
    _flat,
    _run_part,
    _MAPS,
    vectors=lambda chain, draw, features: _results(
        chain, draw, (4, features), ("forward_and_log_det", "inverse_and_log_det")
    ),
    methods=_METHODS | {"sample": _sample},
    probe=lambda chain, draw: [*_results(chain, draw, chain.q0(2)[0].shape, _CHAIN), *chain.sample(2)],
    tolerance=1e-6,  # the original sums float64 log-determinants in float32
)

# Masked autoregressive flows

_SIGMOID = ScaleMap("sigmoid", floor=1e-3)
_AUTOREGRESSIVE = (
    made_adapter(
        "normflows",
        "normflows.flows.affine.autoregressive",
        "MaskedAffineAutoregressive",
        "normflows.nets.made",
        lambda flow: ("affine, sigmoid", affine_of(_SIGMOID), ()),
        ("_output_dim_multiplier", "_elementwise_inverse", "_unconstrained_scale_and_shift"),
    ),
    spline_adapter(
        "normflows",
        "normflows.flows.neural_spline.autoregressive",
        "MaskedPiecewiseRationalQuadraticAutoregressive",
        "normflows.nets.made",
        "RationalQuadratic",
    ),
)

ADAPTERS = (_BLOCK, _MASKED_FLOW, _SPLINE_COUPLING, *_AUTOREGRESSIVE, _FLOW)

_KINDS = "Coupled", "CircularCoupled", "Autoregressive", "CircularAutoregressive"
_SPLINES = tuple(f"{kind}RationalQuadraticSpline" for kind in _KINDS)  # they run a module that has an adapter
_OTHERS = "CCAffineConst", "Composite", "GlowBlock", "Reverse", "_LULinear", *_SPLINES
LAYERS = Layers("normflows", "normflows.flows.base", "Flow", (*_MAPS.names, *_OTHERS))
