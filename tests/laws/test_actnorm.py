"""ActNorm's state: set by the first batch, once, and never again after loading."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import linfast as lf
from tests.processes import results_of_two


def test_first_batch_is_normalised() -> None:
    for shape in ((512, 5), (32, 5, 4, 4)):
        z = lf.ActNorm(5)(3 + 2 * torch.randn(*shape))
        per_channel = z.transpose(0, 1).flatten(1)
        torch.testing.assert_close(per_channel.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(per_channel.std(1), torch.ones(5), atol=1e-5, rtol=0)


def test_a_mean_ten_thousand_times_the_spread_is_taken_off_first() -> None:
    x = 1e4 + torch.randn(256, 3)
    z = lf.ActNorm(3)(x)
    torch.testing.assert_close(z.std(0), torch.ones(3), atol=1e-3, rtol=0)


def test_second_batch_changes_nothing() -> None:
    g = lf.ActNorm(3)
    g(torch.randn(16, 3))
    kept = g.bias.clone()
    g(5 + torch.randn(16, 3))
    assert torch.equal(g.bias, kept)


def test_loading_copying_and_pickling_keep_the_flag() -> None:
    g = lf.ActNorm(3)
    g(2 + torch.randn(16, 3))
    loaded = lf.ActNorm(3)
    loaded.load_state_dict(g.state_dict())
    inside = lf.Flow([lf.ActNorm(3)])
    inside.load_state_dict(lf.Flow([g]).state_dict())
    x = 7 + torch.randn(16, 3)
    for again in (loaded, inside, copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        assert torch.equal(again(x), g(x))


def test_loading_an_uninitialised_one_asks_for_data_again() -> None:
    g = lf.ActNorm(3)
    g(torch.randn(16, 3))
    g.load_state_dict(lf.ActNorm(3).state_dict())
    g(5 + torch.randn(64, 3))
    assert bool(g.initialized)
    assert float(g.bias.detach().mean()) < -4


def test_no_rows_initialise_nothing() -> None:
    g = lf.ActNorm(3)
    assert g(torch.empty(0, 3)).shape == (0, 3)
    assert not bool(g.initialized)
    g(5 + torch.randn(16, 3))
    assert bool(g.initialized)


def test_inverse_before_data_is_the_identity() -> None:
    z = torch.randn(4, 3)
    g = lf.ActNorm(3)
    assert torch.equal(g.inverse(z), z)
    assert not bool(g.initialized)


def test_nearly_constant_channels_are_not_blown_up() -> None:
    x = torch.randn(64, 2) * torch.tensor([1.0, 1e-9])
    g = lf.ActNorm(2, min_std=1e-2)
    g(x)
    assert float(g.log_scale.max()) <= -torch.log(torch.tensor(1e-2)) + 1e-6


def test_compiles_before_and_after_initialisation() -> None:
    x = 3 + torch.randn(32, 4)
    g = lf.Flow([lf.ActNorm(4), lf.Mix(4)])
    reference = copy.deepcopy(g)
    compiled = torch.compile(g, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), reference(x))
    y = torch.randn(32, 4)
    torch.testing.assert_close(compiled(y), reference(y))


def _statistics_of_one_process(rows: int) -> list[torch.Tensor]:
    torch.distributed.init_process_group("gloo")
    rank, g = torch.distributed.get_rank(), lf.ActNorm(3)
    g(torch.arange(24.0).reshape(8, 3).square()[rank * rows : rows + rank * 8])
    torch.distributed.destroy_process_group()
    return [g.bias.detach(), g.log_scale.detach()]


@pytest.mark.parametrize("rows", [3, 0])
def test_statistics_are_those_of_all_processes(rows: int) -> None:
    whole = lf.ActNorm(3)
    whole(torch.arange(24.0).reshape(8, 3).square())
    for statistics in results_of_two(_statistics_of_one_process, rows):
        torch.testing.assert_close(statistics, [whole.bias.detach(), whole.log_scale.detach()])
