"""The scale of a density's data: a flow begins as the identity, so that data should be near unit scale.

    z = g((x - mean) / std)

mean, std [C] are those of the data, per feature (channel): a fixed ActNorm in front of g.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .dispatch import capturing, has_values
from .flows.actnorm import ActNorm
from .flows.bijection import Bijection
from .flows.flow import Flow

_LEAST_ROWS = 16  # batches of fewer samples do not tell the scale of the data
_FARTHEST_MEAN, _STDS = 10.0, (0.1, 10.0)
_TRIED_ROWS = 1000  # of which a layer that takes an interval only refuses some


def begins_with_actnorm(flow: Bijection) -> bool:
    return isinstance(flow, Flow) and len(flow) > 0 and isinstance(flow[0], ActNorm)


def standardizing(x: Tensor) -> ActNorm:
    """The fixed layer that takes x [N, C, ...] to mean 0 and standard deviation 1 per feature."""
    numbers = torch.finfo(x.dtype)
    layer = ActNorm(x.shape[1], min_std=numbers.tiny).to(x).requires_grad_(False)
    layer.initialize(x)
    constant = (-layer.log_scale).exp() <= numbers.eps * layer.bias.abs() + numbers.tiny
    if features := constant.nonzero().flatten().tolist():
        raise ValueError(f"x {tuple(x.shape)} is constant in features {features[:9]}: leave them out, or add noise")
    return layer


def in_front(layer: ActNorm, flow: Bijection) -> Flow:
    """The layer and then the flow, as one Flow in the flow's mode."""
    layers, memory = (list(flow), flow.memory) if type(flow) is Flow else ([flow], "auto")
    whole = Flow([layer, *layers], flow.features, flow.shape, memory)
    whole.training = layer.training = flow.training
    return whole


@torch.no_grad()
def check_takes(flow: Flow, x: Tensor) -> None:
    """ValueError where a layer gives NaN or infinite values for x after ``flow[0]``, as a logit does.

    linfast's own layers take any values. A layer that needs a context ends the search: what reaches it comes from a
    network's output or from layers that were tried.
    """
    bijections = [type(module).__module__ for module in flow.modules() if isinstance(module, Bijection)]
    if all(name.partition(".")[0] == "linfast" for name in bijections):
        return
    values = x[:_TRIED_ROWS]
    for layer in flow:
        try:
            values = copy.deepcopy(layer).eval()(values)
        except Exception:  # it is not ours, and is called without what else it takes
            return
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"the flow's {type(layer).__name__} gives NaN or infinite values for standardized x: it takes an "
                "interval only. Leave out standardize, and put lf.ActNorm after that layer"
            )


def insert_when_loaded(p: Any, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Before ``load_state_dict``: a state with the layer of ``standardize`` adds it to a density p without.

    Densities that were pickled by an earlier version call it as a hook, with the ``rest`` of a hook's arguments.
    """
    start = f"{prefix}flow."
    names = {key.removeprefix(start) for key in state if key.startswith(start)}
    layer = {f"bijections.0.{name}" for name in ("bias", "log_scale", "initialized")}
    if begins_with_actnorm(p.flow) or not layer <= names:
        return
    features = state[f"{start}bijections.0.bias"].numel()
    if p.flow.features not in (None, features):
        return
    whole = in_front(ActNorm(features).to(p._like()).requires_grad_(False), p.flow)
    own = whole.state_dict()
    if own.keys() == names and all(_of_one_shape(value, state[start + name]) for name, value in own.items()):
        p.flow, p._scale_is_known = whole, True


def _of_one_shape(own: Any, given: Any) -> bool:
    """Whether a state's value may replace this one, which may be a lazy parameter or a module's extra state."""
    return is_lazy(own) or getattr(own, "shape", None) == getattr(given, "shape", None)


def warn_of_scale(p: Any, x: Tensor) -> None:
    """Warn where x tells its scale and is far from unit scale: once for the density p. It reads x on the host."""
    if x.shape[0] < _LEAST_ROWS or not has_values(x) or capturing(x):
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return
    p._scale_is_known = True
    values = x.detach().transpose(0, 1).flatten(1).double()
    mean, std = values.mean(1), values.std(1)
    far = (mean.abs() > _FARTHEST_MEAN) | (std < _STDS[0]) | (std > _STDS[1])
    for i in far.nonzero().flatten().tolist()[:1]:
        warnings.warn(
            f"Density: the data are far from mean 0 and standard deviation 1 (feature {i}: mean {mean[i]:.4g}, "
            f"deviation {std[i]:.4g}) and would fit slowly: call p.standardize(x) with the training data",
            stacklevel=3,
        )
