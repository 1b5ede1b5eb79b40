"""After the first call, no flow, operator or inverse, sampler or stream reads the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

import linfast as lf
from linfast import ops
from linfast.flows import Bijection
from tests.host_reads import HostRead, forbidden
from tests.laws import operators_zoo as zoo
from tests.laws.zoo import BIJECTIONS, build, perturb
from tests.marks import long
from tests.ops.budget import DEVICE

METHODS = ("__call__", "inverse", "forward_and_log_det", "inverse_and_log_det")
KERNELS = (
    "affine-odd-first",
    "flow-mixed",
    "flow-timed",
    "mix-free",
    "image-flow-even",
)  # interpreted in the short run

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool((t > 0).all()),
    "int": lambda t: int(t[0, 0]),
    "float": lambda t: float(t[0, 0]),
    "index": lambda t: [0, 1][t.argmax() * 0],
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "cpu": lambda t: t.cpu(),
    "equal": lambda t: torch.equal(t, t),
    "allclose": lambda t: torch.allclose(t, t),
    "nonzero": lambda t: t.nonzero(),
    "a mask": lambda t: t[t > 0],
    "writing by a mask": lambda t: t.clone().index_put_((t > 0,), t.sum()),
    "repeats": lambda t: t.repeat_interleave(torch.tensor([1, 2, 3]), 0),
    "inv": torch.linalg.inv,
    "solve": lambda t: torch.linalg.solve(t, t),
    "cholesky": lambda t: torch.linalg.cholesky(t @ t.mT),
    "svd": torch.linalg.svd,
    "pinv": torch.linalg.pinv,
    "eigh": torch.linalg.eigh,
    "eig": torch.linalg.eig,
    "inside an op": lambda t: ops.latent_matmul(t, torch.stack((t, t)), torch.tensor([0, 1, 0])),
}


@pytest.mark.parametrize("name", READS)
def test_the_stand_in_sees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # a bank's product is an op that reads only on a CPU
    t = torch.eye(3) + 0.1 * torch.randn(3, 3)
    with forbidden(), pytest.raises(HostRead):
        READS[name](t)
    READS[name](t)


def _twice(call: Callable[[], Any]) -> Any:
    """Call it, and call it again where nothing may be read."""
    call()
    with forbidden():
        return call()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "reference") for name in BIJECTIONS),
        *((name, "triton") for name in KERNELS if DEVICE == "cpu"),  # the stand-in is for CPU tensors
        *long(*((name, "triton") for name in BIJECTIONS if name not in KERNELS and DEVICE == "cpu")),
    ],
)
def test_flows(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched and do not run: the host does not read what they would compute."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    g, shape = build(name, torch.float32)
    x = torch.randn(2, *shape)
    z = g(x).detach()
    for method in METHODS:
        call, given = getattr(g, method), z if method.startswith("inverse") else x
        with lf.backend(backend):
            _twice(lambda call=call, given=given: call(given))
            with torch.no_grad():
                _twice(lambda call=call, given=given: call(given))


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_flows_in_training(memory: str) -> None:
    g = perturb(lf.coupling_flow(6, 3, (8,), mix="free", memory=memory))
    x = torch.randn(4, 6)
    _twice(lambda: g.forward_and_log_det(x))


@pytest.mark.parametrize("name", zoo.OPERATORS)
def test_operators(name: str) -> None:
    A = zoo.build(name, torch.float32)
    z, y = (torch.randn(zoo.BATCH, n) for n in (A.n_in, A.n_out))
    _twice(lambda: (A(z), A.T(y)))
    if name in zoo.INVERTIBLE:
        _twice(lambda: A.inverse()(z))


CORES: dict[str, tuple[Callable[[], lf.LatentOperator], Any]] = {
    "dense": (lambda: zoo.dense(6, 6), None),
    "diagonal": (lambda: zoo.diagonal(*range(1, 7)), None),
    "low-rank": (lambda: zoo.low_rank(1.3, 6, 2), None),
    "product": (lambda: zoo.low_rank(1.3, 6, 2) @ zoo.diagonal(*range(1, 7)), None),
    "a time": (lambda: zoo.timed(1.0, 6), 0.3),
    "a time per sample": (lambda: zoo.timed(1.0, 6), torch.linspace(0, 0.9, zoo.BATCH)),
    "a product of times": (lambda: 2.0 * zoo.timed(1.0, 6) @ zoo.timed(1.0, 6), 0.3),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", CORES)
def test_linearizers(name: str, frozen: bool) -> None:
    make, t = CORES[name]
    f = lf.Linearizer(perturb(lf.coupling_flow(6, 2, (8,))), make().float())
    x = torch.randn(zoo.BATCH, 6)

    def call() -> None:
        f(x, t=t)
        f.inverse(x, t=t)
        f.A_inverse(x, t=t)

    if not frozen:
        _twice(call)
        return
    with torch.no_grad(), lf.freeze(f):
        _twice(call)


SAMPLERS: dict[str, Callable[[lf.Linearizer, Tensor], object]] = {
    "one step": lf.sample,
    "steps": lambda f, noise: lf.sample(f, noise, steps=4, one_step=False),
    "path": lambda f, noise: lf.sample(f, noise, steps=4, one_step=False, return_path=True),
    "invert": lambda f, noise: lf.invert(f, noise, steps=4),
    "generator": lambda f, noise: lf.generator(f, 4)(noise),
    "iterator": lambda f, noise: list(lf.sample_stream(f, 5, 2, steps=4, block_size=2)),
    "tensor": lambda f, noise: lf.sample_stream(f, 5, 2, torch.empty(5, noise.shape[1]), steps=4, block_size=2),
}
TIMED: dict[str, Callable[[], lf.LatentOperator]] = {
    "factored": lambda: lf.TimeLowRank(64, 1, 1.0, 4, 8),
    "dense": lambda: lf.TimeLowRank(6, 2, 1.0, 4, 8),
    "fixed factors": lambda: lf.TimeDiagonal(6, 2, 1.0, 4, 8),
    "convolution": lambda: lf.TimeDepthwiseConv(1, 3, (2, 3), 4, (8,)),
    "product": lambda: lf.TimeLowRank(6, 2, 1.0, 4, 8) @ lf.Dense(6),
}


@pytest.mark.parametrize("how", SAMPLERS)
@pytest.mark.parametrize("name", TIMED)
def test_samplers_and_streams(name: str, how: str) -> None:
    A = TIMED[name]()
    f = lf.Linearizer(lf.coupling_flow(A.n_in, 2, (8,)), A)
    noise = torch.randn(3, A.n_in)
    with torch.no_grad():
        _twice(lambda: SAMPLERS[how](f, noise))


def _singular(A: lf.LatentOperator, through_data: bool) -> None:
    with torch.no_grad():
        for p in A.parameters():
            (p.data if through_data else p).zero_()


WITH_INVERSE: dict[str, Callable[[], lf.LatentOperator]] = {
    "dense": lambda: lf.Dense(4),
    "diagonal": lambda: lf.Diagonal(4),
    "low-rank": lambda: lf.LowRank(torch.nn.Parameter(torch.tensor(1.3)), *torch.randn(2, 6, 1).unbind()),
    "conv": lambda: lf.DepthwiseConv(1, 3, (2, 2)),
    "product": lambda: lf.Dense(4) @ lf.Diagonal(4),
}


@pytest.mark.parametrize("name", WITH_INVERSE)
def test_an_operator_that_became_singular_raises_again(name: str) -> None:
    A = WITH_INVERSE[name]()
    A.inverse()
    _singular(A, through_data=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"singular.*pinv"):
            A.inverse()


@pytest.mark.parametrize("name", WITH_INVERSE)
def test_the_inverse_of_an_operator_that_became_singular_unnoticed_is_nan(name: str) -> None:
    """Writes through .data change no version counter, so a device is not read again. A CPU is."""
    A = WITH_INVERSE[name]()
    with mock.patch("linfast.operators.spectral.read_at_once", return_value=False):
        A.inverse()
        _singular(A, through_data=True)
        assert A.inverse()(torch.ones(2, A.n_in)).isnan().all()
    with pytest.raises(ValueError, match="singular to working precision"):
        A.inverse()


def test_a_time_is_read_for_itself() -> None:
    A = lf.TimeDiagonal(4, 1, 0.0, 4, 8) + lf.Diagonal(4)
    f = lf.Linearizer(lf.coupling_flow(4, 2, (8,)), A)
    y = torch.randn(2, 4)
    f.inverse(y, t=0.2)
    with forbidden():
        f.inverse(y, t=0.2)
        with pytest.raises(HostRead):
            f.inverse(y, t=0.4)


def test_what_is_compiled_or_free_of_a_read_says_so_by_nan() -> None:
    g: Bijection = lf.Mix(3, "free")
    with torch.no_grad():
        g.weight.zero_()
    assert g.inverse(torch.ones(2, 3)).isnan().all()
    A = lf.Dense.of(torch.zeros(3, 3))
    torch.compiler.reset()
    compiled = torch.compile(lambda z: A.inverse()(z), fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(2, 3)).isnan().all()
