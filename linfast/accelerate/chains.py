"""Chains of libraries, which run their flows one after another, for memory="invert".

    nflows, glasflow   CompositeTransform      x -> (y, log_det), forward and inverse
    normflows          NormalizingFlow         forward, inverse, with log_det, log_prob, forward_kld, sample
    FrEIA              SequenceINN             x -> (y, log_det), rev=

Containers inside are looked into. A flow of any other class than those named here, or that has an adapter, is
not known to be invertible, and its chain stores. normflows' reverse_kld and reverse_alpha_div store too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.undo import Outputs
from .adapter import Adapter, Draw, Options, Plan, Stub, Unfit, adapter_for
from .identity import changed_method, defined_as
from .invert import Part, check_parts, is_known, parts_to_invert, per_sample, run_inverting

__all__ = ["ADAPTERS"]

Context = Mapping[str, Any]
Named = Iterator[tuple[str, nn.Module]]


def _plan(parts_of: Callable[[Any], list[Part]], chain: Any, options: Options) -> Plan:
    parts = parts_of(chain)
    check_parts(parts)
    return Plan(f"{len(parts)} steps, rebuilt in the backward")


def _part(name: str, module: nn.Module, known: bool, run: Callable[..., Outputs], nets: Iterable[Any] = ()) -> Part:
    """A step, or Unfit; ``nets``: conditioners of a coupling that has no adapter."""
    adapter = adapter_for(module)
    conditioners = tuple(nets) if adapter is None else tuple(adapter.conditioners(module))
    changed = None if adapter is None else changed_method(module, (*adapter.methods, *adapter.assumes))
    if changed is not None or not (known or conditioners):
        raise Unfit(f"stored: its {type(module).__name__} is not known to be invertible")
    return Part(f"{name} ({type(module).__name__})", module, run, conditioners)


def _put_stubs(parts: Sequence[Part], draw: Draw) -> None:
    """Stubs in place of a copy's conditioners, as the couplings' own checks have them, with scales near one."""
    for part in parts:
        adapter = adapter_for(part.module)
        if adapter is not None and part.conditioners:
            adapter.probe(part.module, draw)
        for module in part.module.modules():
            if isinstance(module, Stub):
                module.size = 1 / len(parts)


def _conditioners(parts_of: Callable[[Any], list[Part]], chain: Any) -> list[nn.Module]:
    return [conditioner for part in parts_of(chain) for conditioner in part.conditioners]


# nflows and glasflow

_NFLOWS = (
    "ActNorm",
    "HouseholderSequence",
    "IdentityTransform",
    "LULinear",
    "NaiveLinear",
    "OneByOneConvolution",
    "Permutation",
    "PointwiseAffineTransform",
    "QRLinear",
    "RandomPermutation",
    "ReversePermutation",
    "SVDLinear",
)
_COMPOSITES = {"nflows": "nflows.transforms.base", "glasflow": "glasflow.nflows.transforms.base"}


def _flat_nflows(chain: Any, where: str = "") -> Named:
    for i, transform in enumerate(chain._transforms):
        name = f"{where}_transforms[{i}]"
        if any(defined_as(transform, module, "CompositeTransform") for module in _COMPOSITES.values()):
            yield from _flat_nflows(transform, f"{name}.")
        else:
            yield name, transform


def _nflows_parts(chain: Any) -> list[Part]:
    def known(transform: nn.Module) -> bool:
        return any(is_known(transform, library, _NFLOWS, ("forward", "inverse")) for library in _COMPOSITES)

    return [_part(name, transform, known(transform), _run_nflows) for name, transform in _flat_nflows(chain)]


def _run_nflows(transform: Any, x: Tensor, context: Context, inverse: bool) -> Outputs:
    y, log_det = (transform.inverse if inverse else transform)(x, context["context"])
    return y, per_sample(log_det, x, x.dtype)


def _nflows(method: str) -> Callable[..., Any]:
    def run(chain: Any, inputs: Tensor, context: Any = None) -> tuple[Tensor, Any]:
        parts = parts_to_invert(chain, inputs, _nflows_parts)
        if parts is None:
            return getattr(chain._linfast_original, method)(chain, inputs, context)
        return run_inverting(chain, parts, inputs, {"context": context}, method == "inverse")

    return run


def _probe_nflows(chain: Any, draw: Draw) -> Sequence[Tensor]:
    parts = _nflows_parts(chain)
    _put_stubs(parts, draw)
    features = next(part.module.features for part in parts if part.conditioners)
    images = any(type(part.module).__name__ == "OneByOneConvolution" for part in parts)
    shape = (4, features, 2, 3) if images else (4, features)
    return [*chain.forward(draw(*shape), draw(2)), *chain.inverse(draw(*shape), context=draw(2))]


# normflows

_NORMFLOWS = (
    "ActNorm",
    "AffineConstFlow",
    "Invertible1x1Conv",
    "InvertibleAffine",
    "LULinearPermute",
    "Permute",
    "Squeeze",
)


def _flat_normflows(chain: Any, where: str = "") -> Named:
    for i, flow in enumerate(chain.flows):
        name = f"{where}flows[{i}]"
        if defined_as(flow, "normflows.flows.affine.glow", "GlowBlock"):
            yield from _flat_normflows(flow, f"{name}.")
        else:
            yield name, flow


def _normflows_parts(chain: Any) -> list[Part]:
    methods, parts = ("forward", "inverse"), []
    for name, flow in _flat_normflows(chain):
        masked = is_known(flow, "normflows", ("MaskedAffineFlow",), methods)
        nets = [net for net in (flow.s, flow.t) if isinstance(net, nn.Module)] if masked else []
        known = is_known(flow, "normflows", _NORMFLOWS, methods)
        parts.append(_part(name, flow, known, _run_normflows, nets))
    return parts


def _run_normflows(flow: Any, x: Tensor, context: Context, inverse: bool) -> Outputs:
    y, log_det = (flow.inverse if inverse else flow)(x)
    return y, per_sample(log_det, x)


def _through(
    chain: Any, parts: Sequence[Part], x: Tensor, inverse: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(y, log_det), in ``dtype``: what the library adds it up in, torch's default where it does not say."""
    y, log_det = run_inverting(chain, parts, x, {}, inverse)
    assert log_det is not None
    return y, log_det.to(torch.get_default_dtype() if dtype is None else dtype)


def _normflows(method: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` where it is to invert, else the library's own."""

    def either(chain: Any, x: Tensor) -> Any:
        parts = parts_to_invert(chain, x, _normflows_parts)
        return getattr(chain._linfast_original, method)(chain, x) if parts is None else run(chain, parts, x)

    return either


def _log_prob(chain: Any, parts: Sequence[Part], x: Tensor) -> Tensor:
    z, log_det = _through(chain, parts, x, True, x.dtype)
    return log_det + chain.q0.log_prob(z)


def _forward_kld(chain: Any, parts: Sequence[Part], x: Tensor) -> Tensor:
    z, log_det = _through(chain, parts, x, True)
    return -torch.mean((log_det + chain.q0.log_prob(z)).to(log_det.dtype))


def _sample(chain: Any, num_samples: int = 1) -> tuple[Tensor, Tensor]:
    z, log_q = chain.q0(num_samples)
    z, log_det = chain.forward_and_log_det(z)
    return z, log_q - log_det


_NORMFLOWS_METHODS = {
    "forward": lambda chain, parts, x: _through(chain, parts, x, False)[0],
    "forward_and_log_det": lambda chain, parts, x: _through(chain, parts, x, False),
    "inverse": lambda chain, parts, x: _through(chain, parts, x, True)[0],
    "inverse_and_log_det": lambda chain, parts, x: _through(chain, parts, x, True),
    "log_prob": _log_prob,
    "forward_kld": _forward_kld,
}


def _probe_normflows(chain: Any, draw: Draw) -> Sequence[Tensor]:
    shape = chain.q0(2)[0].shape
    outputs: list[Tensor] = []
    for method in _NORMFLOWS_METHODS:
        result = getattr(chain, method)(draw(*shape))
        outputs += result if isinstance(result, tuple) else (result,)
    return [*outputs, *chain.sample(2)]


# FrEIA

_FREIA = (
    "ActNorm",
    "Fixed1x1Conv",
    "FixedLinearTransform",
    "Flatten",
    "HaarDownsampling",
    "HaarUpsampling",
    "IRevNetDownsampling",
    "IRevNetUpsampling",
    "PermuteRandom",
    "Reshape",
)
_KEEP_VOLUME = ("NICECouplingBlock", "PermuteRandom")  # whose log-determinant is the number 0


def _freia_parts(chain: Any) -> list[Part]:
    return [
        _part(
            f"module_list[{i}]",
            block,
            is_known(block, "FrEIA", _FREIA, ("forward",)),
            partial(_run_freia, chain.conditions[i]),
        )
        for i, block in enumerate(chain.module_list)
    ]


def _run_freia(condition: int | None, block: Any, x: Tensor, context: Context, inverse: bool) -> Outputs:
    named = {} if condition is None else {"c": [context["c"][condition]]}
    (y,), log_det = block((x,), rev=inverse, **named)
    return y, per_sample(log_det, x)


def _sequence(chain: Any, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True) -> tuple[Any, Any]:
    x = x_or_z[0] if isinstance(x_or_z, (list, tuple)) else x_or_z
    parts = parts_to_invert(chain, x, _freia_parts)
    if parts is None:
        return chain._linfast_original.forward(chain, x_or_z, c, rev, jac)
    y, log_det = run_inverting(chain, parts, x, {"c": c if c is None else list(c)}, rev)
    keeps_volume = all(is_known(block, "FrEIA", _KEEP_VOLUME, ("forward",)) for block in chain.module_list)
    return (y,) if chain.force_tuple_output else y, 0.0 if keeps_volume else log_det


def _probe_sequence(chain: Any, draw: Draw) -> Sequence[Tensor]:
    parts = _freia_parts(chain)
    _put_stubs(parts, draw)
    used = {where: block.dims_c[0] for block, where in zip(chain.module_list, chain.conditions, strict=True)
            if where is not None}  # fmt: skip
    outputs: list[Tensor] = []
    for rev, shape in ((False, chain.shapes[0]), (True, chain.shapes[-1])):
        c = [draw(2, *used.get(i, (1,))) for i in range(max(used, default=-1) + 1)]
        y, log_det = chain.forward(draw(2, *shape), c, rev=rev)
        outputs += [*(y if isinstance(y, tuple) else (y,)), torch.as_tensor(log_det)]
    return outputs


def _adapter(
    library: str,
    where: str,
    name: str,
    parts_of: Callable[[Any], list[Part]],
    flat: Callable[[Any], Named],
    **what: Any,
) -> Adapter:
    return Adapter(
        library=library,
        where=where,
        name=name,
        chain=True,
        plan=partial(_plan, parts_of),
        inner=lambda chain: [module for _, module in flat(chain)],
        **what,
    )


ADAPTERS = (
    *(
        _adapter(
            library,
            where,
            "CompositeTransform",
            _nflows_parts,
            _flat_nflows,
            methods={method: _nflows(method) for method in ("forward", "inverse")},
            probe=_probe_nflows,
            hollow=partial(_conditioners, _nflows_parts),
        )
        for library, where in _COMPOSITES.items()
    ),
    _adapter(
        "normflows",
        "normflows.core",
        "NormalizingFlow",
        _normflows_parts,
        _flat_normflows,
        methods={name: _normflows(name, run) for name, run in _NORMFLOWS_METHODS.items()} | {"sample": _sample},
        probe=_probe_normflows,
        tolerance=1e-6,  # the original adds log_dets of float64 up in float32
    ),
    _adapter(
        "FrEIA",
        "FrEIA.framework.sequence_inn",
        "SequenceINN",
        _freia_parts,
        lambda chain: ((str(i), block) for i, block in enumerate(chain.module_list)),
        methods={"forward": _sequence},
        probe=_probe_sequence,
        hollow=partial(_conditioners, _freia_parts),
    ),
)
