"""linfast's image Linearizer beside the reference repository's, with the same weights, on the CPU.

    python -m linfast.bench.reference_images PATH --config mnist --batch 16 64
    python -m linfast.bench.reference_images PATH --what times     # in a fresh process: see below
    python -m linfast.bench.reference_images PATH --what launches

PATH is a checkout of github.com/assafshocher/Linearizer, which is imported and not changed.

compare     errors of the outputs and of the input's gradient; truth: the reference in float64
times       forward, inverse and a training step of g, in turns in one process on one thread. After
            ``compare`` the allocator has larger thresholds, so that fewer pages fault: that favours the
            reference, whose attention weights are large.
memory      tensors alive at the peak of a training step of g, at the first batch size
operations  what reaches a backend below autograd, without views and allocations: on a GPU each is one
            launch or more
launches    the same where the ops run their kernels, as on a GPU, and how many Triton launches are among
            it: the kernels are interpreted at batch 1, which takes a minute. "frozen": inside lf.freeze
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import linfast as lf

from .reference import CONFIGS, interleaved, launches, operations, reference_model, step, step_bytes

_PARTS = ("compare", "times", "memory", "operations", "launches")
_DEPTH = 8  # couplings of the reference's g


def compare(f: Any, h: Any, x: Tensor, t: Tensor) -> None:
    """Relative L2 distance of every output from the reference's in float64, ours and its own."""

    def results(model: Any, *given: Tensor) -> dict[str, Tensor]:
        x, t = given
        model.zero_grad()
        x = x.clone().requires_grad_()
        out = {"f": model(x, t=t), "gx": model.gx(x), "gy": model.gy(x), "gx_inverse": model.gx_inverse(x)}
        out["gy_inverse"] = model.gy_inverse(x)
        sum(value.square().mean() for value in out.values()).backward()
        assert x.grad is not None
        return {**{name: value.detach() for name, value in out.items()}, "gradient of x": x.grad}

    ours, own = results(h, x, t), results(f, x, t)
    truth = results(f.double(), x.double(), t.double())
    f.float()
    for name, value in truth.items():
        errors = [float((r[name].double() - value).norm() / value.norm()) for r in (ours, own)]
        print(f"{name:14s} linfast {errors[0]:.1e}   reference in fp32 {errors[1]:.1e}")


def times(f: Any, h: Any, x: Tensor, repeats: int) -> None:
    """Of g's forward, inverse and training step; the last with activations stored, and inverted."""
    with torch.no_grad():
        z = f.gx(x)
        _ratios("forward", x, {"reference": f.gx, "linfast": h.gx}, repeats)
        _ratios("inverse", z, {"reference": f.gx_inverse, "linfast": h.gx_inverse}, repeats)
    f.train(), h.train()

    def linfast(memory: str, x: Tensor) -> None:
        h.g_x.bijection.memory = memory
        step(h.gx, list(h.parameters()), x)

    runs = {f"linfast, {memory}": functools.partial(linfast, memory) for memory in ("store", "invert")}
    _ratios("training step", x, {"reference": lambda x: step(f.gx, list(f.parameters()), x), **runs}, repeats)
    f.eval(), h.eval()


def _ratios(name: str, x: Tensor, runs: dict[str, Callable[[Tensor], Any]], repeats: int) -> None:
    (wall, cpu), *others = interleaved([functools.partial(run, x) for run in runs.values()], repeats)
    ours = ", ".join(
        f"{label} {own_wall * 1e3:.0f} ms, ratio {wall / own_wall:.2f} (CPU time {cpu / own_cpu:.2f})"
        for label, (own_wall, own_cpu) in zip(list(runs)[1:], others, strict=True)
    )
    print(f"{name}, batch {len(x)}: reference {wall * 1e3:.0f} ms, {ours}", flush=True)


def memory(f: Any, h: Any, x: Tensor) -> None:
    """Of a training step of g: the reference's, ours with its weights, and ``image_flow``'s own."""
    channels, side = x.shape[1:3]
    own = lf.image_flow(channels, side, _DEPTH, conditioner="unet", time_features=16, actnorm=True, mix="free")
    own(x, t=1.0)
    f.train(), h.train()
    flows = {"from_reference": (h.g_x.bijection, h.gx), "image_flow": (own, own.at(t=1.0))}
    full = _mega("reference", step_bytes(f.gx, list(f.parameters()), x), x)
    for label, (flow, g) in flows.items():
        for mode in ("store", "invert"):
            flow.memory = mode
            _mega(f"{label}, {mode}", step_bytes(g, list(flow.parameters()), x), x, full)
    print(f"of it, the weights' gradients: {sum(p.nbytes for p in own.parameters()) / 1e6:.1f} MB (image_flow)")
    f.eval(), h.eval()


def _mega(label: str, size: int, x: Tensor, full: int = 0) -> int:
    share = f", {size / full:.3f} of the reference" if full else ""
    print(f"peak of a training step, batch {len(x)}, {label}: {size / 1e6:.1f} MB{share}", flush=True)
    return size


def count_operations(f: Any, h: Any, x: Tensor) -> None:
    """Of g forward."""
    with torch.no_grad():
        for label, g in (("reference", f.gx), ("linfast", h.gx)):
            counts = operations(functools.partial(g, x))
            print(f"operations of g forward, {label}: {counts.total()}  {dict(counts.most_common(14))}")


def count_launches(h: Any, x: Tensor) -> None:
    """Of g forward, outside ``freeze`` and inside, when what is derived from weights is there."""
    run = functools.partial(h.gx, x)
    with torch.no_grad():
        _print_launches("linfast on a GPU", launches(run))
        with lf.freeze(h):
            launches(run)
            _print_launches("the same, frozen", launches(run))


def _print_launches(label: str, found: tuple[Counter[str], Counter[str]]) -> None:
    counts, kernels = found
    print(f"operations of g forward, {label}: {counts.total()}  {dict(counts.most_common())}")
    print(f"    Triton launches among them: {kernels.total()}  {dict(kernels)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--config", choices=CONFIGS, default="mnist")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--what", choices=_PARTS, nargs="+", default=list(_PARTS[:4]))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    channels, side = CONFIGS[options.config]
    f = reference_model(options.path, channels, side)
    h = lf.from_reference(f)

    def draw(batch: int) -> Tensor:
        return torch.randn(batch, channels, side, side)

    if "compare" in options.what:
        compare(f, h, draw(2), torch.rand(2))
    if "times" in options.what:
        for batch in options.batch:
            times(f, h, draw(batch), options.repeats)
    if "memory" in options.what:
        memory(f, h, draw(options.batch[0]))
    if "operations" in options.what:
        count_operations(f, h, draw(2))
    if "launches" in options.what:
        count_launches(h, draw(1))


if __name__ == "__main__":
    main()
