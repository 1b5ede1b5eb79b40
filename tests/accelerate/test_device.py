"""A model that is accelerated and then moved to another device copies nothing there after its first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import linfast as lf
from linfast.accelerate.launch import lone_launch

MASK_OF_8 = torch.tensor([True, True, False, True, False, False, True, False])
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0])  # neither halves nor every other one


def _nflows() -> nn.Module:
    transforms = pytest.importorskip("nflows.transforms")
    nets = pytest.importorskip("nflows.nn.nets")
    return transforms.AffineCouplingTransform(MASK, lambda n_in, n_out: nets.ResidualNet(n_in, n_out, 8))


def _normflows() -> nn.Module:
    nf = pytest.importorskip("normflows")
    return nf.flows.MaskedAffineFlow(MASK, nf.nets.MLP([7, 8, 7]), nn.Sequential(nn.Linear(7, 7), nn.Tanh()))


def _inverted(model: Any, x: Tensor) -> None:
    model(x)
    model.inverse(x)


class _Copies(TorchDispatchMode):
    """Records the copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        devices = {t.device for t in (*args, *outputs) if isinstance(t, Tensor)}
        if len(devices) > 1:
            self.seen.append(func.name())
        return result


@pytest.mark.parametrize(("make", "run"), [(_nflows, _inverted), (_normflows, _inverted)])
def test_a_moved_model_copies_nothing_at_its_second_call(
    make: Callable[[], nn.Module], run: Callable[[Any, Tensor], None]
) -> None:
    model = make()
    keys = list(model.state_dict())
    report = lf.accelerate(model)
    assert not report.left
    assert "gather" in str(report)
    assert list(model.state_dict()) == keys
    model.to("meta")
    x = torch.empty(3, 7, device="meta")
    run(model, x)
    with _Copies() as copies:
        run(model, x)
    assert copies.seen == []


def test_a_launch_made_anew_has_the_permutations_of_the_last() -> None:
    model = pytest.importorskip("zuko").flows.GeneralCouplingTransform(8, mask=MASK_OF_8, hidden_features=(8,))
    lf.accelerate(model)
    members = model._linfast_adapter.members(model, model._linfast_plan.layout)
    one, two = (lone_launch(members, torch.empty(0), None) for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.ends[0]
    assert all(a is b for a, b in zip(one.ends[0] + one.ends[1], two.ends[0] + two.ends[1], strict=True))
