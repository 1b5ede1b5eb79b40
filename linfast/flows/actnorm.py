"""ActNorm: a learned affine map per channel, initialised from the first batch's statistics.

    y = (x + bias) exp(log_scale),   x = y exp(-log_scale) - bias
    log|det| = (positions per channel) * sum(log_scale)

x [B, C, ...]; bias and log_scale [C]. Source: Glow (arXiv 1807.03039); as in the
Linearizer paper, the bias is added before the scaling.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_count, check_number
from ..dispatch import check_values, has_values, read_at_once
from ..freeze import is_frozen
from .bijection import ChannelLinear, constant_log_det, wide
from .undo import Context, Made, Outputs, Undone, undo


class ActNorm(ChannelLinear):
    """y = (x + bias) exp(log_scale), with bias = -mean and log_scale = -log(std) of the first batch.

    The first forward in training mode (or ``initialize``) sets the parameters, and the buffer ``initialized`` to 1
    (before: 0). A model that is loaded, copied or averaged, even with an uninitialised model, is therefore not
    initialised again. Compiled code notices a value that was loaded into the buffer; after any other write to it,
    call the model once uncompiled. Under torch.distributed the statistics are taken over the samples of all
    processes. In eval mode, inside ``linfast.freeze`` or a sampler, and on the meta device, an uninitialised layer
    uses its parameters as they are; those of a new layer give the identity.

    Args:
        features: C.
        min_std: lower bound of the standard deviations. Otherwise a channel that is nearly
            constant in the first batch would amplify all other values.

    A RuntimeWarning is given where the first batch replaces parameters that are not zero.

    Raises:
        ValueError: a first batch with fewer than two values per channel, or non-finite ones.
        RuntimeError: a first batch inside a torch.func transform, torch.func.functional_call or an
            nn.DataParallel replica, where the new parameters would be lost: call the model once before.
    """

    initialized: Tensor

    def __init__(self, features: int, min_std: float = 1e-2) -> None:
        super().__init__()
        self.features = features = check_count("features", features)
        self.min_std = check_number("min_std", min_std, least=0.0, above=True)
        self.bias = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.register_buffer("initialized", torch.zeros(()))  # not bool: models are averaged
        self.register_load_state_dict_pre_hook(_mark_loaded)
        self._seen: tuple[Tensor, int] | None = None  # the buffer and its version when it was last read as set

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set bias and log_scale so that the output for x [B, C, ...] has mean 0 and variance 1 per channel."""
        self._check("x", x, self.features)
        mean, std = _statistics(x)
        bias, log_scale = -mean, -std.clamp(min=self.min_std).log()
        if torch.compiler.is_compiling():  # the device reads the buffer, the host has not
            bias = torch.where(self.initialized != 0, self.bias, bias)
            log_scale = torch.where(self.initialized != 0, self.log_scale, log_scale)
            self._seen = (self.initialized, -1)  # so that the next call is compiled without this
        elif not bool(torch.isfinite(std).all()):
            raise ValueError("ActNorm: x of the first batch has non-finite values")
        self.bias.copy_(bias)
        self.log_scale.copy_(log_scale)
        self.initialized.fill_(True)

    def waits_for_data(self) -> bool:
        """Whether a forward now would set the parameters: in training mode, not frozen, not initialised."""
        return self.training and not is_frozen(self) and not self._is_initialized()

    def _is_initialized(self) -> bool:
        """Whether the buffer is set. Reading a GPU's buffer waits, so it is read again only after a write to it.

        Compiled code reads nothing: unless the buffer was read as set before, ``initialize`` is traced.
        """
        if torch.compiler.is_compiling():
            return self._seen is not None
        flag = self.initialized
        if not has_values(flag):  # there is no value to read or to set
            return True
        if flag.is_inference():  # torch does not count writes to it
            return _all_set(flag)
        seen = self._seen is not None and self._seen[0] is flag and self._seen[1] == flag._version
        if not seen or read_at_once(flag):
            self._seen = (flag, flag._version) if _all_set(flag) else None
        return self._seen is not None

    def _check_start(self) -> None:
        """Raise where the parameters are replaced for the length of a call; warn where they are not zero."""
        if torch.compiler.is_compiling():
            return
        if not isinstance(self.bias, nn.Parameter) or torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                "ActNorm: its first batch sets its parameters, and here that would be lost: "
                "call the model once before, or load its weights"
            )
        if bool(self.bias.any()) or bool(self.log_scale.any()):
            warnings.warn(
                "ActNorm: its first batch replaces weights that are not zero (copied here without the buffer "
                "'initialized'?); to keep them, call initialized.fill_(True)",
                RuntimeWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, without ``_seen``: the copy must read its own buffer."""
        return {**self.__dict__, "_seen": None}

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        if not inverse and (x.shape[0] > 0 or _is_distributed()) and self.waits_for_data():
            self._check_start()
            self.initialize(x)
        return self._affine(x, inverse, log_det)

    def _undo(self, made: Made, context: Context, inverse: bool, log_det: bool) -> Undone:
        """Undoes the affine map alone: running a step again must not initialise the layer again."""
        return undo(
            lambda x: self._affine(x, inverse, log_det),
            lambda y: self._affine(y, not inverse, False)[0],
            made,
        )

    def _affine(self, x: Tensor, inverse: bool, log_det: bool) -> Outputs:
        per_channel = (1, -1) + (1,) * (x.ndim - 2)
        bias, log_scale = self.bias.view(per_channel), self.log_scale.view(per_channel)
        y = x * (-log_scale).exp() - bias if inverse else (x + bias) * log_scale.exp()
        total = constant_log_det(x, self.log_abs_det(self.numbers()), inverse) if log_det else None
        return y.to(x.dtype), total

    def numbers(self) -> tuple[Tensor, ...]:
        return self.bias, self.log_scale

    def after(self, numbers: Sequence[Tensor], weight: Tensor, bias: Tensor | None, inverse: bool) -> Outputs:
        own, log_scale = map(wide, numbers)
        if inverse:
            scale = (-log_scale).exp()
            bias = -own if bias is None else scale * bias - own
        else:
            scale = log_scale.exp()
            bias = scale * (own if bias is None else bias + own)
        return scale[..., None] * weight, bias

    def log_abs_det(self, numbers: Sequence[Tensor]) -> Tensor:
        return numbers[1].sum(-1)


def _all_set(flag: Tensor) -> bool:
    """Whether the flag is set; under torch.func.vmap, whether the flags of all batched models are."""
    while torch._C._functorch.is_functorch_wrapped_tensor(flag):
        flag = torch._C._functorch.get_unwrapped(flag)
    return bool(flag.all())


def _mark_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Parameters that are loaded without the flag, with strict=False, count as initialised."""
    vars(module)["_seen"] = None
    key = f"{prefix}initialized"
    if key not in state and f"{prefix}log_scale" in state:
        module.get_buffer("initialized").fill_(True)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] over positions and samples, those of all processes together."""
    if not torch.compiler.is_compiling():
        check_values("x", x)
    wide = x.detach().transpose(0, 1).flatten(1).double()
    count = torch.tensor(float(wide.shape[1]), dtype=wide.dtype, device=wide.device)
    total = torch.cat((wide.sum(1), count[None]))
    _all_reduce(total)
    if not torch.compiler.is_compiling() and total[-1] < 2:
        raise ValueError(f"ActNorm: the first batch needs two values per channel; got x {tuple(x.shape)}")
    mean = total[:-1] / total[-1]
    squares = (wide - mean[:, None]).square().sum(1)
    _all_reduce(squares)
    return mean.to(x.dtype), (squares / (total[-1] - 1)).sqrt().to(x.dtype)


def _all_reduce(value: Tensor) -> None:
    if _is_distributed():
        dist.all_reduce(value)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
