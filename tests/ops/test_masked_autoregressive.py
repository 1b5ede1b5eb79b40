"""masked_autoregressive in plain torch: against a network evaluated D times, degrees, operations, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf
from linfast.ops import AutoregressiveMasks, masked_autoregressive
from linfast.ops.masked_plain import invert_affine
from linfast.ops.masked_walk import Network, evaluate
from linfast.scale_maps import ScaleMap

SMOOTH = ScaleMap("smooth", bound=1.0)


class Case:
    """A random network of two hidden layers, or of a residual block, and a transform with it; float64."""

    def __init__(self, features: int, hidden: int, residual: bool = False, order: list[int] | None = None) -> None:
        generator = torch.Generator().manual_seed(features + 10 * hidden)
        at = torch.tensor(range(features) if order is None else order)  # the position of each feature
        units = torch.arange(hidden) % max(features - 1, 1)
        inner = units[:, None] >= units
        outer = at.repeat_interleave(2)[:, None] > units
        masks = (
            [units[:, None] >= at, inner, outer] if features > 1 else [torch.zeros(hidden, 1), inner, outer * 0 + 1]
        )
        if residual:
            masks.insert(2, inner)
        self.adds = (0, 0, 1) if residual else (0, 0)
        self.activated = (True, True, False) if residual else (True, True)
        self.tensors = [torch.as_tensor(mask) != 0 for mask in masks]
        self.masks = AutoregressiveMasks(self.tensors, activated=self.activated, adds=self.adds)
        shapes = [mask.shape for mask in self.tensors]

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weights = [draw(*shape) / shape[1] ** 0.5 for shape in shapes]
        self.biases = [0.3 * draw(shape[0]) for shape in shapes]
        self.draw = draw

    def extras(self, batch: int) -> list[tuple[Tensor | None, Tensor | None]]:
        hidden = len(self.weights[0])
        first, *rest = [(self.draw(batch, hidden), None)] + [(None, self.draw(batch, hidden))] * (
            len(self.adds) - 1
        )
        return [first, *rest]

    def network(self, x: Tensor, extras=None) -> tuple[Tensor, Tensor]:
        """(shift, raw) [B, D], written out."""
        values, read = [], x
        for i, (W, mask, b) in enumerate(zip(self.weights, self.tensors, self.biases, strict=True)):
            value = read @ torch.where(mask, W, 0).T + b
            if i < len(self.adds):
                term, gate = (None, None) if extras is None else extras[i]
                value = value + (0 if term is None else term)
                value = value * (1 if gate is None else gate)
                value = value + (values[self.adds[i] - 1] if self.adds[i] else 0)
                values.append(value)
                read = value.tanh() if self.activated[i] else value
        return value[:, 0::2], value[:, 1::2]

    def invert(self, y: Tensor, order: str, extras=None) -> tuple[Tensor, Tensor]:
        """By as many evaluations of the network as there are features."""
        x = torch.zeros_like(y)
        for _ in range(y.shape[1]):
            shift, raw = self.network(x, extras)
            s = raw / (1 + raw.abs())
            x = (y - shift) * (-s).exp() if order == "scale_first" else y * (-s).exp() - shift
        return x, -s.sum(1)

    def run(self, x: Tensor, **options) -> tuple[Tensor, Tensor]:
        with lf.backend("reference"):
            y, log_det = masked_autoregressive(
                x,
                self.masks,
                self.weights,
                self.biases,
                activation="tanh",
                scale_map=SMOOTH,
                log_det=True,
                **options,
            )
        assert log_det is not None
        return y, log_det


CASES = {
    "one feature": lambda: Case(1, 5),
    "two features": lambda: Case(2, 7),
    "fewer units than features": lambda: Case(9, 4),
    "random order": lambda: Case(12, 40, order=[3, 0, 11, 7, 1, 2, 10, 4, 9, 5, 8, 6]),
    "residual": lambda: Case(5, 12, residual=True),
    "two features of each degree": lambda: Case(6, 12, order=[0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("order", ["scale_first", "shift_first"])
@pytest.mark.parametrize("batch", [0, 3, 1100], ids=["empty", "one degree at a time", "blocks of degrees"])
@pytest.mark.parametrize("name", CASES)
def test_both_directions_agree_with_the_network_written_out(name, batch, order):
    case = CASES[name]()
    x = case.draw(batch, case.masks.features)
    for extras in (None, case.extras(batch)):
        shift, raw = case.network(x, extras)
        s = raw / (1 + raw.abs())
        y, log_det = case.run(x, order=order, extras=extras)
        expected = x * s.exp() + shift if order == "scale_first" else (x + shift) * s.exp()
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_det, s.sum(1), rtol=1e-12, atol=1e-12)
        back, log_det = case.run(y, order=order, extras=extras, inverse=True)
        expected, expected_log_det = case.invert(y, order, extras)
        torch.testing.assert_close(back, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(log_det, expected_log_det, rtol=1e-11, atol=1e-11)


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.overloadpacket.__name__:
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [10, 1100])
def test_the_inverse_multiplies_no_more_than_one_forward_pass(batch):
    case = Case(16, 60)
    x, spec = case.draw(batch, 16), case.masks.spec((0, 0))
    packed = case.masks.pack(case.weights, case.biases)
    net = Network(spec, spec.matrices(packed), spec.biases(packed), spec.split_extras(None), torch.tanh)
    with Multiplications() as forward:
        evaluate(net, x.T)
    with Multiplications() as inverse:
        invert_affine(net, x, torch.exp, torch.abs, True)
    assert forward.count == batch * (16 * 60 + 60 * 60 + 60 * 32)
    assert (
        0.4 * forward.count < inverse.count < 0.7 * forward.count
    )  # masked weights, nearly half, are not multiplied


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_of_the_inverse(residual):
    case = Case(3, 7, residual, order=[1, 2, 0])
    extras, n = case.extras(4), len(case.weights)
    given = [each for pair in extras for each in pair if each is not None]
    inputs = [case.draw(4, 3), *case.weights, *case.biases, *given]

    def run(y, *tensors):
        case.weights, case.biases, rest = tensors[:n], tensors[n : 2 * n], iter(tensors[2 * n :])
        of = [tuple(None if each is None else next(rest) for each in pair) for pair in extras]
        return case.run(y, inverse=True, order="shift_first" if residual else "scale_first", extras=of)

    tensors = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(lambda y: run(y, *(t.detach() for t in tensors[1:])), tensors[:1])


def test_degrees_are_read_from_the_masks():
    first = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])  # unit 2 depends on no feature
    last = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0], [1, 0, 1, 0]])  # x_1 is the first feature, x_0 the last
    masks = AutoregressiveMasks([first, last], per_feature=1)
    assert masks.order == (1, 2, 0)
    assert [list(degrees) for degrees in masks.degrees] == [[3, 1, 2], [1, 2, 0, 3]]


def test_masks_that_are_not_autoregressive_are_refused():
    ones = torch.ones
    with pytest.raises(ValueError, match="feature 0 depend, through the layers, on feature 0"):
        AutoregressiveMasks([ones(4, 1), ones(2, 4)])
    crossed = torch.tensor([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="not autoregressive: features 0 and 1 depend on each other"):
        AutoregressiveMasks([crossed, torch.eye(2)], per_feature=1)
    with pytest.raises(ValueError, match=r"last mask must have 2 x 3 rows, for 3 features; got 5"):
        AutoregressiveMasks([ones(4, 3), ones(5, 4)])
    with pytest.raises(ValueError, match=r"masks\[1\] must be \[out, 4\], as masks\[0\] has 4 rows; got \(2, 5\)"):
        AutoregressiveMasks([ones(4, 1), ones(2, 5)])
