"""Trainer: the training loop of every application: Adam with a cosine schedule, checkpoints, torchrun's processes.

All random numbers of a step are seeded from (seed, step). Every process draws those of the whole batch and uses
its own rows. A resumed run therefore gives the result of an uninterrupted one, and several processes give that of
one process with the whole batch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from linfast._command import Progress
from linfast.checks import check_count, check_dense, check_flag, check_kind, check_path
from linfast.dispatch import check_values, tensors_of
from linfast.io import written_whole
from linfast.sampling.stream import digest
from linfast.sampling.workers import Workers
from linfast.training import Objective

from .settings import Settings, choice, real, setting, whole

__all__ = ["NonFiniteLoss", "TrainSettings", "Trainer"]

_FORMAT = "linfast-training-2"
_GRADIENT = "gradient norm"
_STEPS, _ROWS, _SEED = 10**9, 2**20, 2**63 - 1  # the largest values
_CHECK_EVERY = 20  # steps between checks of the losses: a check waits for the device and for all processes


class NonFiniteLoss(FloatingPointError):
    """A loss term or the gradient became NaN or infinite; the message names the step and the term."""


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How to train. Adam's learning rate rises from 0 during the warm-up, then falls to 0 as half a cosine.

    Raises:
        TypeError, ValueError: a value is out of its range; the message names it.
    """

    steps: int = setting(MISSING, "optimiser steps in all", whole(1, _STEPS))
    batch: int = setting(128, "rows per step, over all processes together", whole(1, _ROWS))
    learning_rate: float = setting(2e-3, "Adam's, at its peak", real(above=True))
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", real(1, below=True))
    clip: float = setting(1.0, "largest gradient norm", real(above=True))
    ema: float = setting(0.0, "decay of the weights' moving average; 0: none", real(1, below=True))
    precision: str = choice("fp32", "fp32: the parameters' own dtype; bf16: autocast", "fp32", "bf16")
    seed: int = setting(0, "of every random number drawn while training", whole(0, _SEED))
    checkpoint_every: int = setting(500, "steps between checkpoints", whole(1, _STEPS))

    def learning_rate_at(self, step: int) -> float:
        """The rate at a step: linear from 0 to the peak during the warm-up, then half a cosine to 0 at the end."""
        step = check_count("step", step, 0, self.steps)
        rise = self.warmup * self.steps
        if step < rise:
            return self.learning_rate * (step + 1) / (rise + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / (self.steps - rise)))


class Trainer:
    """Trains ``objective.model`` in place.

    Args:
        objective: the model, data and loss, on the device to train on.
        settings: steps, batch size, optimiser and more.
        checkpoint: the file of the training state; None for no checkpoints.
        about: what else defines the run (its data, the weights of its loss), as numbers and strings by name. It is
            saved with the settings, and a run that is resumed must have the same.

    Raises:
        TypeError, ValueError: a model or an ``about`` that a checkpoint cannot hold, or a batch that torchrun's
            processes cannot share equally.

    Attributes:
        history: for each loss term a tensor [steps so far] of its value over the whole batch, and for "gradient
            norm" the norm before clipping.
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
        check_kind("about", about, (Mapping, NoneType))
        self.objective, self.settings, self.workers = objective, settings, Workers.current()
        self.checkpoint = None if checkpoint is None else check_path("checkpoint", checkpoint)
        self._run = {**asdict(settings), **_checked_about(about or {}, asdict(settings))}
        if self.checkpoint is not None:
            if self.checkpoint.exists() and not self.checkpoint.is_file():
                raise ValueError(f"checkpoint must be a file; {checkpoint} is not one")
            _check_kept(objective.model.state_dict())
        size = self.workers.count
        if settings.batch % size:  # the mean over processes would not be the mean over the batch
            raise ValueError(f"batch {settings.batch} must be a multiple of the {size} processes")
        each = settings.batch // size
        self._rows = slice(self.workers.rank * each, (self.workers.rank + 1) * each)
        self.optimizer = torch.optim.Adam(objective.model.parameters(), settings.learning_rate)
        average = get_ema_multi_avg_fn(settings.ema)
        self._averaged = AveragedModel(objective.model, multi_avg_fn=average) if settings.ema else None
        self.step = self._saved_step = 0
        self._terms: tuple[str, ...] = ()
        self._losses: list[Tensor] = []
        self._unchecked: list[Tensor] = []

    @property
    def model(self) -> nn.Module:
        """The trained model: the moving average of the weights where ``settings.ema`` is not 0."""
        return self.objective.model if self._averaged is None else self._averaged.module

    @property
    def history(self) -> dict[str, Tensor]:
        return dict(zip(self._terms, torch.stack(self._losses).unbind(1), strict=True)) if self._losses else {}

    def run(self, progress: bool = True) -> nn.Module:
        """Train to the last step and return the trained model.

        Raises:
            NonFiniteLoss: a term or the gradient is NaN or infinite; the last checkpoint is not overwritten.
        """
        check_flag("progress", progress)
        check_values("objective.model", *tensors_of(self.objective.model))
        compute = DistributedDataParallel(self.objective) if self.workers.count > 1 else self.objective
        devices = [self._device] if self._device.type == "cuda" else []
        steps = self.settings.steps
        shown = Progress("training", self.step, steps, "step", progress and not self.workers.rank)
        with torch.random.fork_rng(devices), shown:
            while self.step < steps:
                self._unchecked.append(self._one_step(compute))
                self.step += 1
                due = self.step == steps or self.step % self.settings.checkpoint_every == 0
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
            FileNotFoundError: there is no checkpoint.
            ValueError: it is not a checkpoint, damaged, or of another model or settings; the trainer is unchanged.
        """
        if self.checkpoint is None:
            raise FileNotFoundError("no checkpoint file was named to resume from")
        state = read_checkpoint(self.checkpoint)
        for name, had, has in _differences(state["settings"], self._run):
            raise ValueError(f"{self.checkpoint}: its training had {name}={had!r:.60}; got {has!r}")
        for name, had, has in _differences(*map(_shapes, (state["model"], self.objective.model.state_dict()))):
            what = f"it has {had} for {name}; this one has {has}"
            raise ValueError(f"{self.checkpoint}: it is of another model ({what})")
        self.objective.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._averaged is not None:
            self._averaged.load_state_dict(state["averaged"])
        self.step = self._saved_step = state["step"]
        self._terms = tuple(state["terms"])
        self._losses, self._unchecked = list(state["losses"].unbind()), []

    @property
    def _device(self) -> torch.device:
        return next(self.objective.model.parameters()).device

    def _one_step(self, compute: nn.Module) -> Tensor:
        """Make one optimiser step; returns this process's terms and the gradient norm, [terms + 1] in float64."""
        settings, device = self.settings, self._device
        self.objective.begin_step(self.step / settings.steps)
        rng = torch.Generator(device).manual_seed(_seed(settings.seed, self.step))
        drawn = {name: value[self._rows] for name, value in self.objective.draw(rng, settings.batch).items()}
        torch.manual_seed(_seed(settings.seed, self.step, self.workers.rank + 1))  # for dropout and the like
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
        values = torch.stack(self._unchecked)
        if self.workers.count > 1:
            dist.all_reduce(values)
        values = (values / self.workers.count).cpu()
        first_step, self._unchecked = self.step - len(self._unchecked), []
        for step, term in (~values.isfinite()).nonzero().tolist():
            kept = f"; {self.checkpoint} is as of step {self._saved_step}" if self._saved_step else ""
            raise NonFiniteLoss(f"step {first_step + step}: {self._terms[term]} is {values[step, term]}{kept}")
        self._losses += values.unbind()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        if self.workers.rank == 0:
            state = {
                "settings": self._run,
                "step": self.step,
                "model": self.objective.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "averaged": None if self._averaged is None else self._averaged.state_dict(),
                "terms": list(self._terms),
                "losses": torch.stack(self._losses),
            }
            write_checkpoint(state, self.checkpoint)
        self._saved_step = self.step


def _seed(*key: int) -> int:
    """Independent seeds for different keys."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, the saved value, our own value) of each entry that differs; None stands for a missing value."""
    both = ((name, saved.get(name), own.get(name)) for name in {**own, **saved})
    return (entry for entry in both if entry[1] != entry[2])


def _shapes(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(value.shape)} {value.dtype}" for name, value in state.items()}


# Checkpoints are written whole or not at all, read without running code, and compared with their digest before use.


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a state of tensors, numbers, strings and containers of them; an OSError names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state, content = {"format": _FORMAT, **state}, io.BytesIO()
    torch.save({**state, "digest": digest(state)}, content)
    with written_whole(path) as partial:
        Path(partial).write_bytes(content.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that ``write_checkpoint`` wrote, its tensors on the CPU; ValueError for any other file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        is_whole = isinstance(state, dict) and state.pop("digest", None) == digest(state)
    except PermissionError:
        raise
    except Exception as error:  # torch and pickle raise all kinds of errors for damaged files
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})") from error
    if not is_whole or state.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint, or a damaged one (it does not hold what was written to it)")
    return state


def _checked_about(about: Mapping[str, Any], settings: Container[str]) -> dict[str, Any]:
    """``about`` with NumPy numbers as Python numbers; TypeError or ValueError if no checkpoint can hold it."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in about.items()}
    for name, value in plain.items():
        if type(name) is not str or type(value) not in (bool, int, float, str, NoneType):
            raise TypeError(f"about must hold numbers, strings and None by name; got {name!r:.60}: {value!r:.60}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"about[{name!r}] must be finite; got {value}")
        if isinstance(value, int) and value.bit_length() > 64:
            raise ValueError(f"about[{name!r}] is too large")
        if name in settings:
            raise ValueError(f"about must not hold {name!r}, which is one of settings")
    return plain


def _check_kept(state: Mapping[str, Any]) -> None:
    """ValueError unless a model's state consists of dense tensors with values."""
    try:
        for name, value in state.items():
            if check_dense(name, value).is_meta:
                raise TypeError(f"{name} is on the meta device and has no values")
    except TypeError as error:
        raise ValueError(f"objective has a model that no checkpoint can hold: {error}") from error
