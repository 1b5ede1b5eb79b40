"""A captured graph keeps everything that it reads by address: streams and benchmarks."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest
import torch
from linfast.bench import timing
from torch import Tensor

import linfast as lf
from linfast.cuda_graph import CudaGraph
from linfast.sampling import stream, workers
from tests.cuda_stand_in import Cuda, Stream
from tests.laws.zoo import perturb

N = 6
CPU = torch.device("cpu")
WAYS = {
    "reference": ("reference", "highest", None),
    "autocast": ("reference", "highest", torch.bfloat16),
    "exact": ("triton", "highest", None),
    "tf32": ("triton", "high", None),
    "fast": ("triton", "medium", None),
    "fast by autocast": ("triton", "highest", torch.float16),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[contextlib.AbstractContextManager[None]]:
    """Every setting under which other weights are derived, as a context manager."""
    backend, matmul, autocast = WAYS[request.param]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        with lf.backend(backend), torch.autocast("cpu", autocast, enabled=autocast is not None):
            yield

    yield block()
    torch.set_float32_matmul_precision(before)


def _flow() -> lf.Flow:
    g = lf.coupling_flow(N, 2, (8,), actnorm=True, mix="lu")
    g(2 + 3 * torch.randn(64, N))
    return perturb(g)  # type: ignore[return-value]


def _close(value: Tensor, expected: Tensor) -> bool:
    return torch.allclose(value.float(), expected.float(), rtol=1e-5, atol=1e-5)


def test_a_stream_keeps_what_it_reads(cuda: Cuda, way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "make_pipeline", workers.CudaPipeline)
    f = lf.Linearizer(_flow(), lf.Dense(N))
    with way:
        expected = torch.cat(list(lf.sample_stream(f, 20, 5, block_size=4, cuda_graph=False)))
        batches = lf.sample_stream(f, 20, 5, block_size=4)
        got = [next(batches)]
    for parameter in f.parameters():  # the promise is broken, but no foreign memory is read
        parameter.data = parameter.data.clone()
    gc.collect()
    assert cuda.freed() == []
    got += list(batches)
    assert _close(torch.cat(got), expected)
    assert cuda.counts == (1, 5)


def test_a_timed_provider_keeps_what_it_reads(cuda: Cuda, way) -> None:
    g, inputs = _flow(), [(torch.randn(3, N),) for _ in range(2)]
    with torch.no_grad(), way:
        expected = [g(x) for (x,) in inputs]
        with lf.freeze(g):
            timed = timing.Timing()
            run = timing._cuda_round(g.forward, inputs, timed)
        torch.clear_autocast_cache()
        gc.collect()
        assert timed.captured
        assert cuda.freed() == []
        for index in range(2):
            assert _close(run(index)[1][0], expected[index])


def test_a_graph_keeps_what_its_work_refers_to(cuda: Cuda) -> None:
    weight, x = torch.randn(3, 3), torch.randn(2, 3)
    expected = x @ weight
    captured = CudaGraph(lambda x, weight=weight: x @ weight, [x], CPU)
    del weight
    gc.collect()
    assert torch.equal(captured(x), expected)


def test_frozen_weights_are_derived_once(cuda: Cuda) -> None:
    g, x = _flow(), torch.randn(4, N)
    with torch.no_grad(), lf.backend("triton"), lf.freeze(g):
        loose, still = (CudaGraph(g.inverse, [x], CPU, model) for model in (None, g))
        before = g.inverse(x)
        assert torch.equal(loose(x), still(x))
    assert len(cuda.graphs[1]._steps) < len(cuda.graphs[0]._steps)
    for parameter in g.parameters():
        parameter.data.mul_(1.1)
    with torch.no_grad(), lf.backend("triton"):
        after = g.inverse(x)
    assert not _close(before, after)
    assert _close(loose(x), after)


def test_outputs_are_the_callers(cuda: Cuda) -> None:
    captured = CudaGraph(lambda x: (x.exp(), x), [torch.zeros(2, 3)], CPU)
    x = torch.randn(2, 3)
    first = captured(x)
    captured(x + 1)
    assert torch.equal(first[0], x.exp())
    assert torch.equal(first[1], x)


def test_a_graph_captured_in_inference_mode_is_called_outside(cuda: Cuda) -> None:
    with torch.inference_mode():
        captured = CudaGraph(torch.exp, [torch.zeros(3)], CPU)
        captured(torch.ones(3))
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(captured(x), x.exp())
    assert not captured(x).requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_a_capture_that_fails_leaves_everything_as_it_was(cuda: Cuda, autocast: bool) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(RuntimeError, match="not permitted"),
    ):
        CudaGraph(lambda x: x * x.sum().item(), [torch.ones(3)], CPU)
    assert torch.is_autocast_cache_enabled()
    assert torch.is_grad_enabled()


# Streams.


def test_calls_on_several_streams_follow_one_another(cuda: Cuda) -> None:
    captured = CudaGraph(torch.exp, [torch.zeros(3)], CPU)
    for _ in range(3):
        with cuda.stream(Stream()):  # which has not waited for any stream; the stand-in raises on a race
            captured(torch.ones(3))


@pytest.mark.parametrize("captured", [False, True])
def test_samples_are_copied_after_they_are_computed_whatever_the_stream(cuda: Cuda, captured: bool) -> None:
    """The pipeline is built on one stream and started on other streams."""
    model = torch.nn.Tanh()
    done: list[object] = []

    def work(noise: Tensor) -> Tensor:
        done.append(object())
        cuda.here.known.add(done[-1])
        return model(noise)

    lines = workers.CudaPipeline(work, torch.zeros(2, 3), model if captured else None)
    for _ in range(3):
        noise = torch.randn(2, 3)
        with cuda.stream(Stream()):
            slot, copied = lines.start(noise)
            assert cuda.here.known <= copied.known
            assert torch.equal(lines.finish((slot, copied)), noise.tanh())
