"""The loop: resumed runs, moving average, precision, checkpoints, and what it does when a loss is NaN."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from linfast.examples import NonFiniteLoss, Trainer, TrainSettings

from linfast._command import Progress

from .toys import Breaking, idempotent, one_step, style

_EVERYTHING = TrainSettings(steps=9, batch=8, ema=0.9, checkpoint_every=4, seed=3)


def _state(trainer: Trainer) -> list[torch.Tensor]:
    """The state after training: weights, average, optimiser, losses."""
    averaged = trainer.model.state_dict().values()
    moments = [value for entry in trainer.optimizer.state_dict()["state"].values() for value in entry.values()]
    return [*trainer.objective.state_dict().values(), *averaged, *moments, *trainer.history.values()]


def _run(objective, settings: TrainSettings, **options) -> Trainer:
    trainer = Trainer(objective, settings, **options)
    trainer.run(progress=False)
    return trainer


@pytest.mark.parametrize("make", [lambda: one_step(actnorm=True), idempotent, style])
def test_resumed_is_uninterrupted_bit_for_bit(make, tmp_path: Path, monkeypatch) -> None:
    whole = _run(make(), _EVERYTHING)
    killed = Trainer(make(), _EVERYTHING, tmp_path / "c.pt")
    step = killed._one_step

    def until_six(compute):
        if killed.step == 6:
            raise KeyboardInterrupt
        return step(compute)

    monkeypatch.setattr(killed, "_one_step", until_six)
    with pytest.raises(KeyboardInterrupt):
        killed.run(progress=False)
    resumed = Trainer(make(), _EVERYTHING, tmp_path / "c.pt")
    for parameter in resumed.objective.parameters():
        parameter.data.normal_()
    torch.manual_seed(99)
    resumed.resume()
    assert resumed.step == 4
    resumed.run(progress=False)
    assert len(_state(whole)) == len(_state(resumed))
    assert all(torch.equal(a, b) for a, b in zip(_state(whole), _state(resumed), strict=True))


def test_seed_decides_the_run() -> None:
    losses = [_run(one_step(), TrainSettings(steps=2, batch=8, seed=seed)).history["latent"] for seed in (0, 0, 1)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_every_step_draws_anew() -> None:
    objective, seen = Breaking(), []
    objective.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]["x"]))
    _run(objective, TrainSettings(steps=3, batch=8))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_the_callers_random_state_is_left_alone() -> None:
    objective = one_step()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _run(objective, TrainSettings(steps=2, batch=8))
    assert torch.equal(torch.rand(3), expected)


def test_ema_is_its_formula() -> None:
    settings = TrainSettings(steps=3, batch=8, ema=0.75)
    path = []
    for steps in (1, 2, 3):
        part = Trainer(Breaking(), settings)
        for _ in range(steps):
            part._one_step(part.objective)
            part.step += 1
        path.append(part.objective.model.weight.detach().clone())
    expected = 0.75 * (0.75 * path[0] + 0.25 * path[1]) + 0.25 * path[2]
    trainer = _run(Breaking(), settings)
    torch.testing.assert_close(trainer.model.weight.detach(), expected)
    assert torch.equal(trainer.objective.model.weight, path[2])
    assert _run(Breaking(), TrainSettings(steps=3, batch=8)).model.weight.equal(path[2])


def test_bf16_is_near_fp32_and_keeps_fp32_weights() -> None:
    runs = [_run(one_step(), TrainSettings(steps=5, batch=8, precision=p)) for p in ("fp32", "bf16")]
    losses = [torch.stack(list(run.history.values())[:-1]).sum(0) for run in runs]
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=3e-2, atol=3e-2)
    assert {p.dtype for p in runs[1].model.parameters()} == {torch.float32}


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    settings = TrainSettings(steps=100, learning_rate=0.5, warmup=0.2)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[:20] == sorted(rates[:20])
    assert rates[0] > 0
    assert rates[20] == max(rates) == 0.5
    assert rates[60] == pytest.approx(0.25)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    trainer, used = Trainer(Breaking(), settings), []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    trainer.step = 60
    trainer._one_step(trainer.objective)
    assert used == [rates[60]]


def test_gradients_are_clipped_and_their_norm_is_kept() -> None:
    loose, tight = (TrainSettings(steps=1, batch=8, clip=clip) for clip in (1e6, 1e-3))
    runs = [_run(Breaking(), settings) for settings in (loose, tight)]
    norms = [run.history["gradient norm"] for run in runs]
    assert torch.equal(*norms)
    assert float(norms[0]) > 1e-3
    kept = [torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm() for run in runs]
    assert float(kept[0]) == pytest.approx(float(norms[0]), rel=1e-5)
    assert float(kept[1]) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "step 7: other is nan"),
        ({"value": math.inf}, "step 7: other is inf"),
        ({"gradient": True}, "step 7: gradient norm is nan"),
    ],
)
def test_nan_stops_with_step_and_term_and_keeps_the_checkpoint(tmp_path: Path, options, says: str) -> None:
    settings = TrainSettings(steps=9, batch=8, checkpoint_every=4)
    with pytest.raises(NonFiniteLoss, match=f"{says}; .*c.pt is as of step 4"):
        _run(Breaking(at=7, **options), settings, checkpoint=tmp_path / "c.pt")
    kept = Trainer(Breaking(), settings, tmp_path / "c.pt")
    kept.resume()
    assert kept.step == 4
    same = Trainer(Breaking(), settings)
    for _ in range(4):
        same._one_step(same.objective)
        same.step += 1
    assert torch.equal(kept.objective.model.weight, same.objective.model.weight)


def test_nan_before_any_checkpoint_says_no_more(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"^step 0: other is nan$"):
        _run(Breaking(at=0), TrainSettings(steps=3, batch=8), checkpoint=tmp_path / "c.pt")
    assert not list(tmp_path.iterdir())


def test_resume_refuses_what_would_be_another_run(tmp_path: Path) -> None:
    settings = TrainSettings(steps=2, batch=8)
    _run(Breaking(), settings, checkpoint=tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"had batch=8; got 4"):
        Trainer(Breaking(), TrainSettings(steps=2, batch=4), tmp_path / "c.pt").resume()
    with pytest.raises(ValueError, match="of another model"):
        Trainer(idempotent(), settings, tmp_path / "c.pt").resume()
    with pytest.raises(FileNotFoundError, match=r"none.pt"):
        Trainer(Breaking(), settings, tmp_path / "none.pt").resume()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Trainer(Breaking(), settings).resume()
    (tmp_path / "bad.pt").write_bytes(b"no")
    torch.save({"step": 1}, tmp_path / "other.pt")
    for name in ("bad.pt", "other.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a checkpoint"):
            Trainer(Breaking(), settings, tmp_path / name).resume()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("batch", 0), ("checkpoint_every", 0), ("learning_rate", 0.0), ("learning_rate", math.nan),
        ("clip", -1.0), ("warmup", 1.0), ("ema", 1.0), ("seed", -1), ("precision", "fp16"), ("clip", math.inf),
        ("steps", 2.0), ("steps", True), ("batch", 10**9), ("seed", 2**63), ("ema", "0.5"), ("warmup", None),
        ("precision", None), ("checkpoint_every", math.nan),
    ],
)  # fmt: skip
def test_bad_settings_are_named(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name} "):
        TrainSettings(**{"steps": 1, name: value})


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("tqdm", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, tqdm: bool, terminal: bool) -> None:
    shown = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    if not tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    Trainer(Breaking(), TrainSettings(steps=2, batch=8)).run(progress=True)
    assert "2/2" in shown.getvalue()
    assert ("\r" in shown.getvalue()) == (tqdm and terminal)
    if not (tqdm and terminal):
        assert re.fullmatch(r"training: 2/2 steps, \d+ s, loss \d+\.\d{3}\n", shown.getvalue())
    shown.truncate(0)
    Trainer(Breaking(), TrainSettings(steps=2, batch=8)).run(progress=False)
    assert shown.getvalue() == ""


def test_lines_come_every_few_seconds(monkeypatch, capsys) -> None:
    now = 0.0
    monkeypatch.setattr("linfast._command.time.monotonic", lambda: now)
    with Progress("sampling", 0, 100, "sample") as progress:
        for done in range(1, 101):
            now += 0.25
            progress.show(done)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"sampling: {done}/100 samples" for done in (20, 40, 60, 80, 100)
    ]
    assert [line.split(", ")[1] for line in lines[-2:]] == ["20 s and about 5 s left", "25 s"]
    monkeypatch.setattr("sys.stderr", None)
    with Progress("sampling", 0, 1, "sample") as progress:
        progress.show(1)
