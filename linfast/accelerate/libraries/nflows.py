"""nflows and its fork in glasflow: affine and additive coupling transforms.

    forward, data to noise   y = m scale + t of the features m whose mask is > 0
    scale = sigmoid(s + 2) + 1e-3 (nflows), or scale_activation(s) (glasflow)
    params [t | s] computed from the kept features; (x, context) -> (y, log_det [B])

An alternating mask, the default of both libraries, is two strided slices here, not a gather and a scatter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...flows.undo import Context, Outputs
from ...ops.stack_weights import AffineMap
from ...scale_maps import ScaleMap
from ..adapter import Adapter, Draw, Unfit
from ..chain import chain_adapter, nets_of, per_sample, put_stubs, run_chain
from ..coupling import coupling_adapter, two_methods
from ..made_transforms import affine_of, made_adapter, spline_adapter
from ..maps import Maps, listed
from ..masked import Affine as Masked
from ..sides import ADDITIVE, Affine, Index, Side, Split, Tail, Triangular, known_map, split_of_indices
from ..splines import context_size, spline_coupling
from ..unknown import Layers

_FLOOR = 1e-3


def _sigmoid(raw: Tensor) -> Tensor:
    return torch.sigmoid(raw + 2) + _FLOOR


_KNOWN = {
    ScaleMap("sigmoid", floor=_FLOOR): _sigmoid,
    ScaleMap("softplus", bound=3.0, floor=_FLOOR): lambda raw: (F.softplus(raw) + _FLOOR).clamp(0, 3),
}


def _find(transform: Any) -> tuple[str, tuple[Split, Tail]]:
    if transform.unconditional_transform is not None:
        raise Unfit("it has an unconditional transform for the kept features")
    split = split_of_indices(transform.features, transform.identity_features, transform.transform_features)
    if transform._transform_dim_multiplier() == 1:
        return f"additive coupling, mask {split.kind}", (split, ADDITIVE)
    activation = getattr(transform, "scale_activation", _sigmoid)  # an attribute of glasflow's instances
    scale_map = known_map("scale_activation", activation, _KNOWN)
    kind = "own scale_activation" if scale_map is None else scale_map.kind
    tail = Tail("halves", scale_map, lambda raw: activation(raw).log())
    return f"affine coupling, {kind}, mask {split.kind}", (split, tail)


def _sides(transform: Any, layout: tuple[Split, Tail], context: Sequence[Any]) -> list[Side]:
    net, given = transform.transform_net, context or (None,)
    # The library gives the net contiguous features.
    return [Side(*layout, lambda kept: net(kept.contiguous(), *given), () if context else (net,), (net,))]


_ASSUMES = (
    "_transform_dim_multiplier",
    "_scale_and_shift",
    "_coupling_transform_forward",
    "_coupling_transform_inverse",
)


def coupling_of(library: str, where: str, name: str) -> Adapter:
    return coupling_adapter(
        library=library,
        where=where,
        name=name,
        find=_find,
        members=_sides,
        methods=two_methods(_sides, context="one"),
        nets=lambda transform: (transform.transform_net,),
        shapes=lambda transform: ((3, transform.features), (2, transform.features, 2, 3)),
        masks=lambda transform: (transform.identity_features, transform.transform_features),
        settings=("scale_activation", "unconditional_transform"),
        assumes=_ASSUMES,
    )


def spline_coupling_of(library: str, package: str) -> Adapter:
    return spline_coupling(
        library,
        f"{package}.transforms.coupling",
        "PiecewiseRationalQuadraticCouplingTransform",
        (f"{package}.transforms.nonlinearities", "PiecewiseRationalQuadraticCDF"),
    )


# CompositeTransform

_COMPOSITES = {"nflows": "nflows.transforms.base", "glasflow": "glasflow.nflows.transforms.base"}


_flat = listed("_transforms", *((where, "CompositeTransform") for where in _COMPOSITES.values()))


def _permutation(transform: Any) -> Index | None:
    return Index(transform._permutation.tolist()) if transform._dim == 1 else None


def _actnorm(transform: Any) -> Affine | None:
    if transform.training and not transform.initialized:
        return None
    return Affine(lambda inverse: AffineMap(transform.scale, transform.shift, None, transform.log_scale.sum()))


def _lu(transform: Any) -> Affine:
    def make(inverse: bool) -> AffineMap:
        undo = transform.weight_inverse() if inverse else None
        return AffineMap(transform.weight(), transform.bias, undo, transform.logabsdet())

    cached = transform.using_cache and not transform.training
    return Affine(make, transform) if cached else Triangular(make, transform)


_MAPS = Maps(
    tuple(_COMPOSITES),
    (
        "forward",
        "inverse",
        "forward_no_cache",
        "inverse_no_cache",
        "_create_lower_upper",
        "upper_diag",
        "logabsdet",
    ),
    dict.fromkeys(("Permutation", "RandomPermutation", "ReversePermutation"), _permutation)
    | {"ActNorm": _actnorm, "LULinear": _lu},
    others=(
        "HouseholderSequence",
        "IdentityTransform",
        "NaiveLinear",
        "OneByOneConvolution",
        "PointwiseAffineTransform",
        "QRLinear",
        "SVDLinear",
    ),
    initialises=lambda module: module.training and not getattr(module, "initialized", True),
)


def _run_part(transform: Any, x: Tensor, context: Context, inverse: bool) -> Outputs:
    y, log_det = (transform.inverse if inverse else transform)(x, context["context"])
    return y, per_sample(log_det, x, x.dtype)


def _chain_method(method: str) -> Callable[..., Any]:
    def run(chain: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Any]:
        outputs = run_chain(chain, inputs, {"context": context}, method == "inverse")
        if outputs is None:
            return getattr(chain._linfast_original, method)(chain, inputs, context)
        return outputs[0], outputs[1].to(inputs.dtype)

    return run


def _both_ways(chain: Any, draw: Draw, *shape: int, context: Tensor | None = None) -> Sequence[Tensor]:
    return [*chain.forward(draw(*shape), context), *chain.inverse(draw(*shape), context=context)]


def _on_vectors(chain: Any, draw: Draw, features: int) -> Sequence[Tensor]:
    size = max([0, *(context_size(module) for _, module in _flat(chain) if hasattr(module, "transform_net"))])
    return _both_ways(chain, draw, 4, features, context=draw(4, size) if size else None)


def _probe_chain(chain: Any, draw: Draw) -> Sequence[Tensor]:
    members: list[Any] = [module for _, module in _flat(chain)]
    put_stubs(members, draw)
    features = next(module.features for module in members if hasattr(module, "transform_net"))
    images = any(type(module).__name__ == "OneByOneConvolution" for module in members)
    return _both_ways(chain, draw, 4, features, *((2, 3) if images else ()), context=draw(2))


def composite_of(library: str) -> Adapter:
    return chain_adapter(
        library,
        _COMPOSITES[library],
        "CompositeTransform",
        _flat,
        _run_part,
        _MAPS,
        vectors=_on_vectors,
        methods={method: _chain_method(method) for method in ("forward", "inverse")},
        probe=_probe_chain,
        emptied=lambda chain: nets_of(module for _, module in _flat(chain)),
    )


# Masked autoregressive transforms


def _affine(transform: Any) -> tuple[str, Masked, tuple[Any, ...]]:
    """nflows: softplus(r) + epsilon. glasflow: scale_activation(r), by default the same."""
    floor, own = transform._epsilon, getattr(transform, "scale_activation", None)
    plain = ScaleMap("softplus", bound=math.inf, floor=floor)
    if own is None:
        return "affine, softplus", affine_of(plain), ()
    found = known_map("scale_activation", own, {plain: lambda raw: F.softplus(raw) + floor} | _KNOWN)
    if found is not None:
        return f"affine, {found.kind}", affine_of(found), ()
    return "affine, own scale_activation", Masked(own, lambda raw: own(raw).log(), None), (own,)


def masked_of(library: str, package: str) -> tuple[Adapter, ...]:
    """The adapters of nflows' masked autoregressive transforms, or of the fork's in another package."""
    where, made = f"{package}.transforms.autoregressive", f"{package}.transforms.made"
    affine = made_adapter(
        library,
        where,
        "MaskedAffineAutoregressiveTransform",
        made,
        _affine,
        ("_output_dim_multiplier", "_elementwise_inverse", "_unconstrained_scale_and_shift"),
    )
    splines = (
        spline_adapter(library, where, f"MaskedPiecewise{kind}AutoregressiveTransform", made, kind)
        for kind in ("Linear", "Quadratic", "Cubic", "RationalQuadratic")
    )
    return (affine, *splines)


ADAPTERS = (
    *masked_of("nflows", "nflows"),
    coupling_of("nflows", "nflows.transforms.coupling", "AffineCouplingTransform"),
    coupling_of("nflows", "nflows.transforms.coupling", "AdditiveCouplingTransform"),
    spline_coupling_of("nflows", "nflows"),
    composite_of("nflows"),
)


def layers_of(library: str) -> Layers:
    others = "BatchNorm", "InverseTransform", "MultiscaleCompositeTransform", "Sigmoid"
    return Layers(library, _COMPOSITES[library], "Transform", (*_MAPS.names, *others))


LAYERS = layers_of("nflows")
