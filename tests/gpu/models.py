"""Whole models that run differently on a GPU: the captured pipeline of a stream, a density, accelerated models."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from linfast.bench.cases import CASES
from linfast.bench.cases.common import FORWARD, INVERSE, TRAIN, perturb
from linfast.bench.harness import Options, judged
from linfast.bench.rounding import relative_error
from linfast.bench.standard import Verdict
from torch import Tensor, nn

import linfast as lf
from linfast.dispatch import plain_torch
from tests.accelerate import stand_in

__all__ = ["models"]

WITHIN = 1e-4  # relative L2 in float32, both sides at torch's full precision
ROWS = 5000  # five blocks of a stream, the last one short
SHOWN = (
    "normflows AffineCouplingBlock exp",
    "nflows AffineCouplingTransform",
    "FrEIA AllInOneBlock",
    "zuko RealNVP",
)


def models(device: torch.device) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    """Names, and the functions that give their verdicts."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    for whole in (True, False):
        yield f"stream, {'one array' if whole else 'batches'}", lambda whole=whole: _stream(device, whole)
    for transform in ("affine", "spline"):
        yield f"density, {transform}", lambda transform=transform: _density(device, transform)
    yield "accelerate, reference model", lambda: _reference(device)
    for name in filter(_is_installed, SHOWN):
        yield f"accelerate, {name}", lambda name=name: _library(name, device)


def _stream(device: torch.device, whole: bool) -> Verdict:
    """On a GPU the stream replays a CUDA graph; the reference calls the model block by block in plain torch."""
    torch.manual_seed(0)
    f = lf.Linearizer(lf.coupling_flow(64, 4, (128, 128)), lf.TimeLowRank(64, 4)).to(device)
    perturb(f)
    with plain_torch():
        expected = lf.sample_stream(f, ROWS, out=torch.empty(ROWS, 64), cuda_graph=False, progress=False)
    got = torch.empty(ROWS, 64)
    if whole:
        lf.sample_stream(f, ROWS, out=got, progress=False)
    else:
        got = torch.cat([batch.cpu() for batch in lf.sample_stream(f, ROWS, 700, progress=False)])
    return _verdict(got, expected)


def _density(device: torch.device, transform: Any) -> Verdict:
    """log p of its own samples, both against plain torch."""
    torch.manual_seed(0)
    p = perturb(lf.Density(lf.coupling_flow(6, 4, (32, 32), transform=transform))).to(device).eval()
    parts = []
    for context in (contextlib.nullcontext(), plain_torch()):
        torch.manual_seed(1)
        with context, torch.no_grad():
            x = p.sample(1000)
            parts.append(torch.cat([x, p.log_prob(x)[:, None]], 1))
    return _verdict(*parts)


def _reference(device: torch.device) -> Verdict:
    """The research repository's image model."""
    torch.manual_seed(0)
    model = stand_in.build(1)
    with torch.no_grad():
        model.gx(torch.randn(8, 1, 8, 8))
    model = model.eval().to(device)
    fast = copy.deepcopy(model)
    lf.accelerate(fast)
    x = torch.randn(16, 1, 8, 8, device=device)
    with torch.no_grad():
        got = [_both(fast, part) for part in (x, x.flip(0))]
        with plain_torch():
            expected = [_both(model, part) for part in (x, x.flip(0))]
    return _verdict(torch.cat(got), torch.cat(expected))


def _both(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model.gx(x).flatten(), model.gy_inverse(x).flatten()])


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.split()[0]) is not None


def _library(name: str, device: torch.device) -> Verdict:
    for direction in (FORWARD, INVERSE, TRAIN):
        size = {"library": name, "direction": direction, "D": 64, "depth": 8, "hidden": 128, "batch": 256}
        verdict = judged(CASES["libraries"].build(size, Options(device)))["accelerated"]
        if verdict.refused is not None:
            return replace(verdict, refused=f"{direction}: {verdict.refused}")
    return verdict


def _verdict(got: Tensor, expected: Tensor) -> Verdict:
    if got.shape != expected.shape:
        return Verdict(None, WITHIN, f"outputs of shape {tuple(got.shape)}, where {tuple(expected.shape)} is right")
    error = relative_error(got, expected)
    return Verdict(error, WITHIN, None if error <= WITHIN else f"error {error:.2g}, allowed {WITHIN:.2g}")
