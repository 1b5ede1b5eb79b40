"""ActNorm's state: set by the first batch, once, and never again after loading."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import linfast as lf
from tests.host_reads import forbidden
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


def test_parameters_loaded_without_the_flag_are_kept() -> None:
    g, again = lf.Flow([lf.ActNorm(3)]), lf.Flow([lf.ActNorm(3)])
    g(2 + torch.randn(16, 3))
    again.load_state_dict(dict(g.named_parameters()), strict=False)
    x = 100 * torch.randn(16, 3)
    assert torch.equal(again(x), g(x))


def test_weights_moved_without_the_flag_are_not_replaced_without_a_word() -> None:
    g = lf.ActNorm(3)
    average = copy.deepcopy(g)
    g(2 + torch.randn(16, 3))
    for mine, its in zip(average.parameters(), g.parameters(), strict=True):
        mine.data.lerp_(its.data, 0.5)
    with pytest.warns(RuntimeWarning, match=r"replaces weights .* initialized.fill_\(True\)"):
        average(torch.randn(16, 3))


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


def _copied(average: nn.Module, model: nn.Module) -> None:
    """As moving averages of other libraries do: they write to ``.data``, which changes no version counter."""
    for mine, its in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.data.copy_(its.data)


AVERAGES = {
    "AveragedModel": lambda model: AveragedModel(model),
    "AveragedModel, buffers too": lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True
    ),
    "a copy written to": copy.deepcopy,
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_made_before_the_first_batch_keeps_its_weights(name: str, mode: str) -> None:
    g = lf.coupling_flow(3, 2, (8,), actnorm=True)
    average = AVERAGES[name](g)
    for _ in range(2):
        g(3 * torch.randn(64, 3) + 2)
        average.update_parameters(g) if isinstance(average, AveragedModel) else _copied(average, g)
    before = copy.deepcopy(average.state_dict())
    average.train(mode == "train")(100 * torch.randn(16, 3))
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())


def test_batch_norms_are_updated_by_torch_and_an_average_keeps_its_scales() -> None:
    g = lf.Flow([lf.ActNorm(3)])
    average = AveragedModel(g)
    g(2 + torch.randn(64, 3))
    average.update_parameters(g)
    update_bn([100 * torch.randn(16, 3)], average)
    assert torch.equal(average.module.bijections[0].bias, g.bijections[0].bias)


@pytest.mark.parametrize("method", ["forward", "forward_and_log_det"])
def test_it_initialises_only_in_training_mode(method: str) -> None:
    g = lf.Flow([lf.ActNorm(3)])
    x = 2 + 3 * torch.randn(64, 3)
    call = getattr(g, method)
    g.eval()
    call(x)
    g.train()
    with lf.freeze(g):
        call(x)
    with lf.freeze(nn.Sequential(g)), torch.no_grad():
        call(x)
    norm = g.bijections[0]
    assert not bool(norm.initialized)
    assert not bool(norm.bias.any())
    call(x)
    assert bool(norm.initialized)
    assert bool(norm.bias.all())


def test_a_sampler_initialises_nothing() -> None:
    f = lf.Linearizer(lf.coupling_flow(4, 2, (8,), actnorm=True), lf.TimeLowRank(4, 1, time_features=4, hidden=4))
    one_step = lf.generator(f, steps=3)
    noise = 5 + torch.randn(8, 4)
    lf.sample(f, noise, steps=3)
    lf.sample(f, noise, steps=3, one_step=False)
    lf.invert(f, noise, steps=3)
    list(lf.sample_stream(f, 8, 4, steps=3, block_size=4))
    list(lf.sample_stream(one_step, 8, 4, block_size=4))
    assert not any(bool(module.initialized) for module in f.modules() if isinstance(module, lf.ActNorm))


@pytest.mark.parametrize("write", [lambda flag: flag.fill_(False), lambda flag: flag.data.fill_(False)])
def test_only_the_buffer_decides_whether_it_waits(write: Callable[[Tensor], Tensor]) -> None:
    g = lf.ActNorm(3)
    g(torch.randn(16, 3))
    write(g.initialized)
    g(5 + torch.randn(64, 3))
    assert float(g.bias.detach().mean()) < -4


def test_a_gpu_is_read_once_and_again_after_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linfast.flows.actnorm.read_at_once", lambda tensor: False)
    g, x = lf.ActNorm(3), 5 + torch.randn(64, 3)
    g(x)
    g(x)
    with forbidden():
        g(x)
    g.load_state_dict(lf.ActNorm(3).state_dict())
    g(x)
    assert float(g.bias.detach().mean()) < -4
    again = copy.deepcopy(g)
    again.load_state_dict(lf.ActNorm(3).state_dict())
    again(-x)
    assert float(again.bias.detach().mean()) > 4


@pytest.mark.parametrize("vmapped", [False, True])
def test_what_would_be_lost_is_refused(vmapped: bool) -> None:
    g, x = lf.ActNorm(3), 2 + torch.randn(16, 3)
    given = {name: value.detach().clone() for name, value in g.named_parameters()}
    call = torch.func.vmap(g) if vmapped else lambda x: torch.func.functional_call(g, given, x)
    with pytest.raises(RuntimeError, match=r"ActNorm: its first batch .* call the model once before"):
        call(x[None] if vmapped else x)
    assert not any(bool(value.any()) for value in given.values())
    g(x)
    assert torch.equal(torch.func.functional_call(g, dict(g.named_parameters()), (x,)), g(x))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_models_of_an_ensemble_are_run_at_once(mode: str) -> None:
    models = [lf.coupling_flow(3, 2, (8,), actnorm=True) for _ in range(3)]
    x = 2 + torch.randn(16, 3)
    if mode == "train":
        with pytest.raises(RuntimeError, match=r"ActNorm: its first batch .* call the model once before"):
            _at_once(models, x)
    for model in models:
        model(3 * x + torch.randn(3))
        model.train(mode == "train")
    torch.testing.assert_close(_at_once(models, x), torch.stack([model(x) for model in models]))


def _at_once(models: list[nn.Module], x: Tensor) -> Tensor:
    weights = torch.func.stack_module_state(models)
    return torch.vmap(lambda given: torch.func.functional_call(models[0], given, (x,)))(weights)


def test_a_model_made_in_inference_mode_runs_there() -> None:
    x, far = 2 + torch.randn(16, 3), 100 * torch.randn(16, 3)
    with torch.inference_mode():
        g = lf.ActNorm(3)
        g(x)
        y = g(far)
        before = copy.deepcopy(g.state_dict())
        assert torch.equal(g.eval()(far), y)
        g.initialized.fill_(False)
        g.train()(far)
        assert not torch.equal(g.bias, before["bias"])


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


AVERAGED = {
    "torch's mean": {},
    "a mean, by a function": {"avg_fn": lambda mine, its, n: mine + (its - mine) / (n + 1)},
    "a moving average": {"avg_fn": lambda mine, its, n: 0.9 * mine + 0.1 * its},
    "torch's moving average": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
}


@pytest.mark.parametrize("name", AVERAGED)
@pytest.mark.parametrize("started", [True, False])
def test_averages_of_buffers_too_keep_their_weights(name: str, started: bool) -> None:
    g = lf.coupling_flow(3, 2, (8,), actnorm=True)
    average = AveragedModel(g, use_buffers=True, **AVERAGED[name])
    if not started:  # the next averaged model has weights, and the average had none
        average.update_parameters(g)
    for _ in range(3):
        g(3 * torch.randn(64, 3) + 2)
        average.update_parameters(g)
    before = copy.deepcopy(average.state_dict())
    average.train()(100 * torch.randn(16, 3))
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_flag_goes_with_the_weights_into_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    g = lf.Flow([lf.ActNorm(3), lf.ActNorm(3)])
    g(2 + torch.randn(16, 3))
    g = g.to(dtype)
    lf.save(g, tmp_path / "g.safetensors")
    for again in (lf.load(tmp_path / "g.safetensors"), copy.deepcopy(g)):
        again.train()(torch.full((16, 3), 9.0, dtype=dtype))
        assert torch.equal(again.bijections[0].bias, g.bijections[0].bias)


def _saved(g: nn.Module, path: Path) -> Path:
    lf.save(g, path)
    return path


def test_a_compiled_model_initialises_again_after_a_new_state_is_loaded() -> None:
    g = lf.Flow([lf.ActNorm(3)])
    new = copy.deepcopy(g.state_dict())
    compiled = torch.compile(g, fullgraph=True, backend="eager")
    for sign in (1, -1):
        for _ in range(2):
            compiled(5 * sign + torch.randn(64, 3))
        assert float(g.bijections[0].bias.detach().mean()) * sign < -4
        g.load_state_dict(new)
    compiled(5 + torch.randn(64, 3))
    started = copy.deepcopy(g.state_dict())
    g.load_state_dict(started)
    compiled(torch.randn(64, 3))
    assert all(torch.equal(value, started[key]) for key, value in g.state_dict().items())
