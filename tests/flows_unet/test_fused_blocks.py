"""Residual blocks on ``conv2d_fused`` give the results of plain torch in fewer launches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf
from linfast.flows.unet_blocks import ResidualBlock
from linfast.precision import full_precision
from tests.laws.zoo import perturb
from tests.marks import long
from tests.ops.budget import DEVICE, assert_within_budget

BLOCKS = {
    "same": (8, 8, {}),
    "wider": (4, 8, {}),
    "down": (8, 8, {"resample": "down"}),
    "up": (8, 4, {"resample": "up"}),
    "no bias": (8, 8, {"bias": False}),
    "attention": (4, 4, {"attention": True}),
}


def _block(name: str, dropout: float = 0.0) -> tuple[ResidualBlock, Tensor, Tensor]:
    n_in, n_out, options = BLOCKS[name]
    block = perturb(ResidualBlock(n_in, n_out, dropout=dropout, **options)).to(DEVICE)  # type: ignore[arg-type]
    block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, n_in, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return block, x, torch.randn(2, n_out, device=DEVICE)


@pytest.fixture(autouse=True)
def convolutions_in_full_precision() -> Iterator[None]:
    """Torch's default for convolutions is tf32."""
    with full_precision():
        yield


@pytest.fixture
def short_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a weight sums only the batch's steps: in the interpreter an empty step is as slow."""
    monkeypatch.setattr("linfast.kernels.conv2d_configs._STEPS_A_SPLIT", 2)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, True) for name in BLOCKS),
        ("wider", False),
        *long(*((name, False) for name in BLOCKS if name != "wider")),
    ],
)
@pytest.mark.usefixtures("short_sums")
def test_it_is_the_block_of_plain_torch(name: str, rows: bool) -> None:
    block, x, shift = _block(name)

    def call(x: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        own = block.to(x.dtype)
        y = own(x, shift if rows else shift[0])
        return (y, *torch.autograd.grad(y.pow(2).sum(), (x, shift, *own.parameters()), allow_unused=True))

    assert_within_budget(call, [x.requires_grad_(), shift.requires_grad_()])


def test_dropout_reads_the_same_masks() -> None:
    block, x, shift = _block("same", dropout=0.5)
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        with lf.backend(backend):
            results.append(block.train()(x, shift[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


class _Launches(TorchDispatchMode):
    """Counts operations that reach a backend, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name and name not in ("detach", "_unsafe_view", "promote_types"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the launched kernels."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    run = InterpretedFunction.run

    def counted(self, *arguments, **options):
        names.append(self.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return names


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's launches")
def test_launches_of_a_block(launched: list[str]) -> None:
    block, x, shift = _block("same")
    with torch.no_grad(), lf.backend("triton"), _Launches() as mode:
        block.eval()(x, shift)
    assert mode.names == ["conv2d_fused", "conv2d_fused"]
    assert launched == ["_group_statistics_kernel", "_conv2d_fused_kernel", "_conv2d_fused_kernel"]
    with torch.no_grad(), lf.backend("reference"), _Launches() as mode:
        block.eval()(x, shift)
    plain = [name for name in mode.names if name not in ("silu", "silu_")]  # one kernel with the norm on a GPU
    assert len(plain) == 6, mode.names  # norm, conv, shift, norm, conv, sum


@pytest.mark.parametrize("name", ["norm0", "norm1", "conv1"])
def test_hooks_inside_a_block_run(name: str) -> None:
    block, x, shift = _block("same")
    seen: list[str] = []
    getattr(block, name).register_forward_hook(lambda *_: seen.append(name))
    with torch.no_grad(), lf.backend("triton"):
        block(x, shift)
    assert seen == [name]
