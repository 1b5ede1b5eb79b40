"""Functions that cases share: sizes, inputs, the providers of a function, the calls that are timed, and their cost.

Most cases are one op: ``op_case`` makes them from a function that draws arguments, the op and its operation count.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import linfast as lf

from ..harness import Case, Cost, Options, Problem, Provider, Size
from ..rounding import has_kernels
from ..timing import as_tuple

FORWARD, INVERSE, BACKWARD, TRAIN = "forward", "inverse", "forward+backward", "training step"
BOTH = (FORWARD, BACKWARD)
DTYPES = ("float32", "bfloat16")
FP32: Size = {"direction": FORWARD, "dtype": "float32"}
Call = Callable[..., tuple[Tensor, ...]]
Function = Callable[..., Any]  # of tensors, to Outputs
_Made = TypeVar("_Made")
_Module = TypeVar("_Module", bound=torch.nn.Module)


def grid(base: Size, **axes: Iterable[int | str]) -> list[Size]:
    """``base`` with every combination of the axes' values."""
    return [{**base, **dict(zip(axes, values, strict=True))} for values in itertools.product(*axes.values())]


def ints(size: Size, *keys: str) -> tuple[int, ...]:
    """The numbers of the size with these names."""
    return tuple(int(size[key]) for key in keys)


class Source:
    """Random tensors, drawn on the device; the same in every run."""

    def __init__(self, options: Options, size: Size) -> None:
        self.device = options.device
        self.dtype: torch.dtype = getattr(torch, str(size.get("dtype", "float32")))
        self.generator = torch.Generator(options.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """A standard normal tensor of this shape."""
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def image(self, size: Size) -> Tensor:
        """Standard normal images with C (or D) channels and ``side`` x ``side`` pixels; ``side`` 1 is a vector."""
        batch, channels, side = ints(size, "batch", "C" if "C" in size else "D", "side")
        return self.normal(batch, channels, *([side, side] if side != 1 else []))

    def below(self, count: int, n: int) -> Tensor:
        """``n`` whole numbers in [0, count)."""
        return torch.randint(count, (n,), generator=self.generator, device=self.device)


def inputs(draw: Callable[[], tuple[Tensor, ...]], options: Options) -> list[tuple[Tensor, ...]]:
    """Three argument tuples; on a GPU enough to fill its L2 cache twice, up to 17.

    Their number is a prime, so that every provider gets every tuple unless it divides the number of providers.
    """
    first = draw()
    count = 3
    if options.device.type == "cuda":
        cache = torch.cuda.get_device_properties(options.device).L2_cache_size
        wanted = 2 * cache / max(_bytes(first), 1)
        count = next((prime for prime in (3, 5, 7, 11, 13) if prime >= wanted), 17)
    return [first, *(draw() for _ in range(count - 1))]


def providers(function: Function, options: Options, call: Callable[[Function], Call]) -> list[Provider]:
    """Providers of ``call(function)``: eager, torch.compile and, where kernels run, linfast and compiled linfast.

    On a CPU the ops run their eager references: "eager" is then linfast, which is not timed twice.
    """
    kernels = kernel_backend(options)
    if options.compile:
        torch.compiler.reset()  # else the recompile limit, counted over all sizes, falls back to eager
    result = []
    for backend in filter(None, ("reference", kernels)):
        names = ("eager", "torch.compile") if backend == "reference" else ("linfast", "linfast compiled")
        result.append(Provider(names[0], under(backend, call(function)), baseline=names[0] == "eager"))
        if options.compile:
            compiled = torch.compile(function, dynamic=False, fullgraph=True)
            result.append(Provider(names[1], under(backend, call(compiled))))
    return result


def kernel_backend(options: Options) -> str | None:
    """The backend that runs linfast's kernels; None where there are none."""
    return "triton" if options.kernels else "auto" if has_kernels(options.device) else None


def under(backend: str, call: Call) -> Call:
    """The call on this backend."""

    def chosen(*arguments: Tensor) -> tuple[Tensor, ...]:
        with lf.backend(backend):
            return call(*arguments)

    return chosen


# Relative L2, far above rounding and far below the error of a wrong kernel. One rounding of an operand is 2^-24
# (2^-22 in stacks), 2^-17, 2^-11 or 2^-9.
TOLERANCES = {"exact": 2e-5, "high": 2e-4, "tf32": 1e-2, "fast": 5e-2}


@contextlib.contextmanager
def in_precision(mode: str) -> Iterator[None]:
    """In this block torch's settings select the mode; "" is "exact". See linfast.precision."""
    backends: Any = torch.backends  # its type stubs lack one of these settings
    matmul, convolution = backends.cuda.matmul, backends.cudnn.conv
    before = convolution.fp32_precision
    torch.set_float32_matmul_precision({"high": "high", "tf32": "high", "fast": "medium"}.get(mode, "highest"))
    if mode == "high":
        matmul.fp32_precision = "ieee"
    convolution.fp32_precision = "tf32" if mode in ("tf32", "fast") else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        convolution.fp32_precision = before


def run(direction: str, weights: Sequence[Tensor] = ()) -> Callable[[Function], Call]:
    """A map from a function to the call that is timed, by direction.

    forward, inverse   (*arguments) -> its outputs, without autograd
    forward+backward   (*arguments, v) -> (y, gradients of <y, v> in the floating arguments and the weights)
    training step      (x) -> (loss, its gradients in the weights), where function(x) is (z, log_det) or (z,) and
                       the loss is mean(|z|^2 / 2 - log_det); the optimiser's update, alike for all, is left out
    """

    def forward(function: Function, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(function(*arguments))

    def both(function: Function, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        *given, v = arguments
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in given]
        outputs = function(*leaves)
        y = outputs if isinstance(outputs, Tensor) else outputs[0]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return (y.detach(), *torch.autograd.grad(y, [*wanted, *weights], v))

    def train(function: Function, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        z, *log_det = function(*arguments)
        loss = (0.5 * z.square().sum(1) - sum(log_det)).mean()
        return (loss.detach(), *torch.autograd.grad(loss, weights))

    timed = {BACKWARD: both, TRAIN: train}.get(direction, forward)
    return lambda function: lambda *arguments: timed(function, arguments)


def op_case(
    name: str,
    draw: Callable[[Source, Size], tuple[Tensor, ...]],
    op: Callable[[Size], Function],
    operations: Callable[[Size, Tensor], int],
    truth: Callable[[Size], Function] | None = None,
    reference: Callable[[Size], Function] | None = None,
    rivals: Callable[[Size, Options], Mapping[str, Function]] = lambda size, options: {},
    baseline: str = "eager",
    **sizes: Sequence[Size],
) -> Case:
    """The case of one op that returns y or (y, log_det), where y has the shape of the first argument.

    Args:
        draw: the arguments of one call.
        op: the op at this size, as a function of the arguments.
        operations: of one forward, from the size and the first argument; a multiply-add is two.
        truth: computes the right outputs in float64; by default the op itself, which then runs in plain torch.
        reference: computes them in the measured dtype, from which the allowance for rounding follows; by default
            the truth.
        rivals: other ways to compute the same, by name.
        baseline: the provider that the others are compared with; "eager" where there is no such provider.
        sizes: at each of the ``SCALES``.
    """

    def build(size: Size, options: Options) -> Problem:
        source, direction = Source(options, size), str(size.get("direction", BACKWARD))

        def arguments() -> tuple[Tensor, ...]:
            drawn = draw(source, size)
            if direction != BACKWARD:
                return drawn
            return *drawn, torch.empty_like(drawn[0]).copy_(source.normal(*drawn[0].shape))

        call, given = run(direction), inputs(arguments, options)
        others = [Provider(name, call(f)) for name, f in rivals(size, options).items()]
        compared = [*providers(op(size), options, call), *others]
        base = baseline if any(p.name == baseline for p in compared) else "eager"
        read = _bytes(given[0][: -1 if direction == BACKWARD else None])
        written, n = given[0][0].nbytes, operations(size, given[0][0])
        return Problem(
            inputs=given,
            truth=call((truth or op)(size)),
            reference=call((reference or truth or op)(size)),
            providers=[Provider(p.name, p.call, baseline=p.name == base) for p in compared],
            cost=Cost(3 * read + 2 * written, 3 * n) if direction == BACKWARD else Cost(read + written, n),
        )

    return Case(name, build, sizes)


def seeded(make: Callable[[], _Made]) -> _Made:
    """Make a model with the same weights in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def perturb(model: _Module) -> _Module:
    """Add 0.05 randn to every trained weight: default conditioners end in zeros, which would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
