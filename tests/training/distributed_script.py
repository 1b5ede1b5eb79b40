"""Run under torchrun: train each toy and, in the first process, save the losses to argv[1]."""

from __future__ import annotations

import sys

import torch

from linfast.training import Trainer, TrainSettings
from linfast.training.distributed import process_group, rank_and_size
from tests.training.toys import idempotent, one_step, style

SETTINGS = TrainSettings(steps=5, batch=8, ema=0.5)
TOYS = {"one_step": lambda: one_step(actnorm=True), "idempotent": lambda: idempotent(denoising=1.0), "style": style}


def train() -> dict[str, dict[str, torch.Tensor]]:
    results = {}
    for name, make in TOYS.items():
        trainer = Trainer(make(), SETTINGS)
        trainer.run(progress=False)
        results[name] = trainer.history
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        assert rank_and_size()[1] == 2
        found = train()
        if rank_and_size()[0] == 0:
            torch.save(found, sys.argv[1])
        try:
            Trainer(one_step(), TrainSettings(steps=1, batch=3))
        except ValueError as error:
            assert "multiple of the 2 processes" in str(error)  # noqa: PT017
        else:
            raise AssertionError("an odd batch was accepted")
