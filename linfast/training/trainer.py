"""Trainer: the loop of every application.

An ``Objective`` holds a model and says what a step needs and what it minimises; the
trainer does the rest: Adam under a cosine schedule, clipped gradients, a moving
average of the weights, bf16, checkpoints, and torchrun's processes.

All random numbers of a step come from (seed, step), and every process draws those of
the whole batch and keeps its own rows. So a resumed run is the uninterrupted one, and
several processes compute what one computes with the whole batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checks import check_count, check_flag, check_kind, check_path
from ..dispatch import check_values, tensors_of
from .checkpoint import (
    check_moments,
    check_progress,
    check_settings,
    check_tensors,
    check_unchanged,
    read_checkpoint,
    write_checkpoint,
)
from .checks import LARGEST, check_about, check_fields, check_kept, one_of, real, whole
from .distributed import mean_over_processes, rank_and_size, rows_of_this_process
from .objective import Objective
from .progress import Progress

__all__ = ["NonFiniteLoss", "TrainSettings", "Trainer"]

_GRADIENT = "gradient norm"
_CHECK_EVERY = 20  # steps between looks at the losses: each look waits for the device and for all processes


class NonFiniteLoss(FloatingPointError):
    """A loss term or the gradient became NaN or infinite; the message names the step and the term."""


_SETTINGS = {
    "steps": whole(1, LARGEST["steps"]),
    "batch": whole(1, LARGEST["rows"]),
    "checkpoint_every": whole(1, LARGEST["steps"]),
    "learning_rate": real(above=True),
    "clip": real(above=True),
    "warmup": real(1, below=True),
    "ema": real(1, below=True),
    "seed": whole(0, LARGEST["seed"]),
    "precision": one_of("fp32", "bf16"),
}


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        batch: rows a step, over all processes together.
        learning_rate: Adam's, at its peak.
        warmup: share of the steps over which it rises from 0; it then falls to 0 as a cosine.
        clip: largest gradient norm.
        ema: decay of the moving average of the weights; 0 for none.
        precision: "fp32" (the parameters' own dtype) or "bf16" (autocast).
        seed: of every random number drawn while training.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError: a number out of its range, NaN or infinite, by its name.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: float = 0.1
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "fp32"
    seed: int = 0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        check_fields(self, _SETTINGS)

    def learning_rate_at(self, step: int) -> float:
        """Linear from 0 to the peak over the warm-up, then half a cosine to 0 after the last step."""
        step = check_count("step", step, 0, self.steps)
        rise = self.warmup * self.steps
        if step < rise:
            return self.learning_rate * (step + 1) / (rise + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / (self.steps - rise)))


class Trainer:
    """Trains ``objective.model`` in place.

    Args:
        objective: on the device to train on.
        settings: how.
        checkpoint: file to keep the state in; None for no checkpoints.
        about: what else makes the run (its data, the loss's weights), as numbers and strings by name: kept
            with the settings, and a run that is resumed must have the same.

    Raises:
        TypeError, ValueError: what could not be resumed: a model or an ``about`` that no checkpoint holds.

    Attributes:
        history: term -> [steps so far], each step's losses over the whole batch and the
            gradient's norm before clipping.
    """

    def __init__(
        self,
        objective: Objective,
        settings: TrainSettings,
        checkpoint: str | Path | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        check_kind("objective", objective, Objective)
        check_kind("objective.model", getattr(objective, "model", None))
        check_kind("settings", settings, TrainSettings)
        check_kind("checkpoint", checkpoint, (str, os.PathLike, NoneType))
        check_kind("about", about, (Mapping, NoneType))
        self.objective, self.settings = objective, settings
        self.checkpoint = None if checkpoint is None else check_path("checkpoint", checkpoint)
        self.about = check_about(about or {}, asdict(settings))
        if self.checkpoint is not None:
            if self.checkpoint.exists() and not self.checkpoint.is_file():
                raise ValueError(f"checkpoint must be a file; {checkpoint} is none")
            check_kept(objective.model.state_dict())
        self.rows = rows_of_this_process(settings.batch)
        self.optimizer = torch.optim.Adam(objective.model.parameters(), settings.learning_rate)
        average = get_ema_multi_avg_fn(settings.ema) if settings.ema else None
        self._averaged = AveragedModel(objective.model, multi_avg_fn=average) if average else None
        self.step = self._saved_step = 0
        self._terms: tuple[str, ...] = ()
        self._losses: list[Tensor] = []
        self._unchecked: list[Tensor] = []

    @property
    def model(self) -> nn.Module:
        """The trained model: the moving average where one is kept."""
        return self.objective.model if self._averaged is None else self._averaged.module

    @property
    def history(self) -> dict[str, Tensor]:
        return dict(zip(self._terms, torch.stack(self._losses).unbind(1), strict=True)) if self._losses else {}

    def run(self, progress: bool = True) -> nn.Module:
        """Train to the last step and return the trained model.

        Raises:
            NonFiniteLoss: a term or the gradient is NaN or infinite; the last checkpoint stays as it was.
        """
        check_flag("progress", progress)
        check_values("objective.model", *tensors_of(self.objective.model))
        rank, size = rank_and_size()
        compute = DistributedDataParallel(self.objective) if size > 1 else self.objective
        devices = [self._device] if self._device.type == "cuda" else []
        shown = Progress("training", self.step, self.settings.steps, "step", progress and not rank)
        with torch.random.fork_rng(devices), shown:
            while self.step < self.settings.steps:
                self._unchecked.append(self._one_step(compute))
                self.step += 1
                due = self.step == self.settings.steps or self.step % self.settings.checkpoint_every == 0
                if due or self.step % _CHECK_EVERY == 0:
                    self._check()
                    shown.note = f"loss {float(self._losses[-1][:-1].sum()):.3f}"
                if due:
                    self._save()
                shown.show(self.step)
        return self.model

    def resume(self) -> None:
        """Go on from the checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not one, or damaged, or of another model or settings; nothing has changed then.
        """
        if self.checkpoint is None:
            raise FileNotFoundError("no checkpoint file was named to resume from")
        state = read_checkpoint(self.checkpoint)
        try:
            optimizer = self._checked(state)
        except ValueError as error:
            raise ValueError(f"{self.checkpoint}: {' '.join(str(error).split())}") from error  # in one line
        self.objective.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(optimizer)
        if self._averaged is not None:
            self._averaged.load_state_dict(state["averaged"])
        self.step = self._saved_step = state["step"]
        self._terms = tuple(state["terms"])
        self._losses, self._unchecked = list(state["losses"].unbind()), []

    def _checked(self, state: dict[str, Any]) -> dict[str, Any]:
        """The optimiser's state in a checkpoint that this training can have written; ValueError of any other."""
        check_settings(state["settings"], self._all_settings())
        check_progress(state, self.settings.steps, _GRADIENT)
        check_tensors("model", state["model"], self.objective.model.state_dict())
        if (self._averaged is None) != (state["averaged"] is None):
            raise ValueError(
                f"its average must be {'none' if self._averaged is None else 'there'} with these settings"
            )
        if self._averaged is not None:
            check_tensors("average", state["averaged"], self._averaged.state_dict())
            if int(state["averaged"]["n_averaged"]) != state["step"]:
                raise ValueError(
                    f"its average must be of {state['step']} steps; got {state['averaged']['n_averaged']}"
                )
        optimizer = check_moments(state["optimizer"], self.optimizer, state["step"])
        check_unchanged(state)
        return optimizer

    def _all_settings(self) -> dict[str, Any]:
        return {**asdict(self.settings), **self.about}

    @property
    def _device(self) -> torch.device:
        return next(self.objective.model.parameters()).device

    def _one_step(self, compute: nn.Module) -> Tensor:
        """One optimiser step; this process's terms and the gradient norm, [terms + 1] in fp64."""
        settings, device = self.settings, self._device
        self.objective.begin_step(self.step / settings.steps)
        rng = torch.Generator(device).manual_seed(_seed(settings.seed, self.step))
        drawn = {name: value[self.rows] for name, value in self.objective.draw(rng, settings.batch).items()}
        torch.manual_seed(_seed(settings.seed, self.step, rank_and_size()[0] + 1))  # dropout and its like
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            terms = compute(drawn)
        self._terms = (*terms, _GRADIENT)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([term.double() for term in terms.values()]).sum().backward()
        norm = nn.utils.clip_grad_norm_(self.objective.model.parameters(), settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(self.step)
        self.optimizer.step()
        if self._averaged is not None:
            self._averaged.update_parameters(self.objective.model)
        return torch.stack([value.detach().double() for value in (*terms.values(), norm)])

    def _check(self) -> None:
        """Average the new losses over the processes, and raise at the first that is not finite."""
        values = mean_over_processes(torch.stack(self._unchecked)).cpu()
        first_step = self.step - len(self._unchecked)
        self._unchecked = []
        for step, term in (~values.isfinite()).nonzero().tolist():
            kept = f"; {self.checkpoint} is as of step {self._saved_step}" if self._saved_step else ""
            raise NonFiniteLoss(f"step {first_step + step}: {self._terms[term]} is {values[step, term]}{kept}")
        self._losses += values.unbind()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        if rank_and_size()[0] == 0:
            write_checkpoint(self._state(), self.checkpoint)
        self._saved_step = self.step

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self._all_settings(),
            "step": self.step,
            "model": self.objective.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
            "terms": list(self._terms),
            "losses": torch.stack(self._losses),
        }


def _seed(*key: int) -> int:
    """Independent seeds for different keys."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
