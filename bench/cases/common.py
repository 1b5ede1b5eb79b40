"""What cases share: inputs, the providers of one function, what a call is, the least it must do.

A case with one function needs ``inputs``, ``providers``, ``run`` and ``cost``; see
``depthwise_conv.py`` for the shortest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import linfast as lf
from linfast.backend import has_kernels

from ..check import Outputs, as_tuple
from ..harness import Cost, Options, Provider, Size

__all__ = [
    "BACKWARD",
    "FORWARD",
    "INVERSE",
    "Call",
    "Source",
    "cost",
    "inputs",
    "perturb",
    "providers",
    "run",
    "sweep",
]

FORWARD, INVERSE, BACKWARD = "forward", "inverse", "forward+backward"
Call = Callable[..., tuple[Tensor, ...]]


def sweep(base: Size, **axes: Iterable[int | str]) -> list[Size]:
    """``base`` with each axis in turn at each of its values, none twice."""
    sizes = [{**base, axis: value} for axis, values in axes.items() for value in values]
    return list({tuple(size.items()): size for size in sizes}.values())


class Source:
    """Standard normal tensors, drawn on the device: the same numbers every run."""

    def __init__(self, options: Options, size: Size) -> None:
        self.device = options.device
        self.dtype: torch.dtype = getattr(torch, str(size.get("dtype", "float32")))
        self.generator = torch.Generator(options.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def below(self, count: int, n: int) -> Tensor:
        """``n`` whole numbers in [0, count)."""
        return torch.randint(count, (n,), generator=self.generator, device=self.device)


def inputs(make: Callable[[], tuple[Tensor, ...]], options: Options) -> list[tuple[Tensor, ...]]:
    """Three argument tuples; on a GPU as many as pass twice through its L2, up to 17. Primes: every
    provider gets every one, whatever their number."""
    first = make()
    count = 3
    if options.device.type == "cuda":
        cache = torch.cuda.get_device_properties(options.device).L2_cache_size
        wanted = 2 * cache / max(_bytes(first), 1)
        count = next((prime for prime in (3, 5, 7, 11, 13) if prime >= wanted), 17)
    return [first, *(make() for _ in range(count - 1))]


def providers(function: Callable[..., Outputs], options: Options, call: Callable[..., Call]) -> list[Provider]:
    """eager, torch.compile of it, and where kernels run linfast and compiled linfast, of ``call(function)``.

    On a CPU the ops are their eager references: "eager" is linfast, and is not timed twice.
    """
    kernels = ["triton"] if options.kernels else ["auto"] if has_kernels(options.device) else []
    if options.compile:
        torch.compiler.reset()  # else the recompile limit, counted over all sizes, falls back to eager
    result = []
    for backend in ["reference", *kernels]:
        names = ("eager", "torch.compile") if backend == "reference" else ("linfast", "linfast compiled")
        result.append(Provider(names[0], _under(backend, call(function)), baseline=names[0] == "eager"))
        if options.compile:
            compiled = torch.compile(function, dynamic=False, fullgraph=True)
            result.append(Provider(names[1], _under(backend, call(compiled))))
    return result


def run(direction: str, weights: Sequence[Tensor] = ()) -> Callable[[Callable[..., Outputs]], Call]:
    """function -> what is timed.

    forward, inverse   (*arguments) -> its outputs, without autograd
    forward+backward   (*arguments, v) -> (y, gradients of <y, v> in the floating arguments and the weights)
    """
    if direction != BACKWARD:
        return lambda function: lambda *arguments: _no_grad(function, arguments)
    return lambda function: lambda *arguments: _with_gradients(function, weights, *arguments)


def _no_grad(function: Callable[..., Outputs], arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return as_tuple(function(*arguments))


def _with_gradients(
    function: Callable[..., Outputs], weights: Sequence[Tensor], *arguments: Tensor
) -> tuple[Tensor, ...]:
    *given, v = arguments
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in given]
    outputs = function(*leaves)
    y = outputs if isinstance(outputs, Tensor) else outputs[0]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return (y.detach(), *torch.autograd.grad(y, [*wanted, *weights], v))


def _under(backend: str, call: Call) -> Call:
    def chosen(*arguments: Tensor) -> tuple[Tensor, ...]:
        with lf.backend(backend):
            return call(*arguments)

    return chosen


def cost(
    direction: str, arguments: Sequence[Tensor], outputs: Sequence[Tensor | torch.Size], operations: int
) -> Cost:
    """The least bytes and operations of a call whose forward does ``operations``.

    Forward: arguments (weights too) read and outputs written once. The backward reads the
    arguments again and the outputs' gradients, writes the arguments' gradients, and does
    twice the operations.
    """
    element = arguments[0].element_size()
    read = _bytes(arguments)
    written = sum(t.nbytes if isinstance(t, Tensor) else element * t.numel() for t in outputs)
    if direction != BACKWARD:
        return Cost(read + written, operations)
    return Cost(3 * read + 2 * written, 3 * operations)


def perturb(model: torch.nn.Module) -> None:
    """Add 0.05 randn to every trained weight: default conditioners end in zeros, which hide what is wrong."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
