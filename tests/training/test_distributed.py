"""Two processes give the results of one process with the whole batch."""

from __future__ import annotations

import socket

import pytest
import torch
from linfast.examples import Trainer, TrainSettings

from linfast.sampling.workers import Workers, process_group
from tests.processes import results_of_two
from tests.training.toys import idempotent, one_step, style

SETTINGS = TrainSettings(steps=5, batch=8, ema=0.5)
TOYS = {"one_step": lambda: one_step(actnorm=True), "idempotent": lambda: idempotent(denoising=1.0), "style": style}


def _train() -> dict[str, dict[str, torch.Tensor]]:
    """The losses of each toy objective."""
    results = {}
    for name, make in TOYS.items():
        trainer = Trainer(make(), SETTINGS)
        trainer.run(progress=False)
        results[name] = trainer.history
    return results


def _train_as_one_of_two() -> dict[str, dict[str, torch.Tensor]]:
    with process_group(torch.device("cpu")):
        assert Workers.current().count == 2
        with pytest.raises(ValueError, match="multiple of the 2 processes"):
            Trainer(one_step(), TrainSettings(steps=1, batch=3))
        return _train()


def test_two_processes_give_the_losses_of_one() -> None:
    both, one = results_of_two(_train_as_one_of_two), _train()
    for name, expected in one.items():
        for key, value in expected.items():
            for two in both:
                torch.testing.assert_close(two[name][key], value, rtol=1e-5, atol=1e-5, msg=f"{name}: {key}")


def test_a_port_that_is_taken_is_a_sentence(monkeypatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for key, text in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(key, text)
        with pytest.raises(ConnectionError, match=r"2 processes cannot meet at MASTER_ADDR 127.0.0.1: .*port"):
            process_group(torch.device("cpu")).__enter__()
