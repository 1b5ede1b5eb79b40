"""Recognising a conditioner as an MLP: linear layers with one activation between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .identity import defined_as, is_hooked, original_class

__all__ = ["MLP", "find_mlp"]

# Exact classes only: a subclass may compute something else.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
    nn.Softplus: "softplus",
}


@dataclass(frozen=True)
class MLP:
    """y = W_n a(... a(W_1 x + b_1) ...) + b_n.

    Args:
        layers: (W_i [out, in], b_i [out] or None), the parameters themselves.
        activation: a's name.
        constants: a's own numbers: the slope of leaky_relu, alpha of elu, approximate of gelu.
    """

    layers: tuple[tuple[Tensor, Tensor | None], ...]
    activation: str
    constants: tuple[float | str, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.layers[0][0].shape[1], *(weight.shape[0] for weight, _ in self.layers))

    def __str__(self) -> str:
        constants = "".join(f" {value:g}" if isinstance(value, float) else f" {value}" for value in self.constants)
        return f"MLP {'-'.join(map(str, self.sizes))} {self.activation}{constants}"


def find_mlp(module: object) -> MLP | None:
    """The MLP that this module is, or None: nn.Sequential, zuko.nn.MLP and normflows.nets.MLP are looked into.

    Hooks, parametrizations, dropout, stacked layers, two kinds of activation or one after
    the last layer make it None: it is then something else than its weights say.
    """
    parts = _parts(module)
    if parts is None or len(parts) % 2 == 0 or any(is_hooked(part) for part in parts):
        return None
    layers, activations = [_layer(part) for part in parts[::2]], {_activation(part) for part in parts[1::2]}
    if any(layer is None for layer in layers) or None in activations or len(activations) > 1:
        return None
    name, constants = activations.pop() if activations else ("none", ())  # type: ignore[misc]
    return MLP(tuple(layer for layer in layers if layer is not None), name, constants)


def _parts(module: object) -> list[nn.Module] | None:
    """The modules it runs in turn."""
    if not isinstance(module, nn.Module) or is_hooked(module):
        return None
    if defined_as(module, "normflows.nets.mlp", "MLP"):
        return _parts(module.net)
    if original_class(module) is nn.Sequential or defined_as(module, "zuko.nn", "MLP"):
        parts: list[nn.Module] = []
        for child in module.children():
            nested = _parts(child) if original_class(child) is nn.Sequential else [child]
            if nested is None:
                return None
            parts += nested
        return parts
    return None


def _layer(part: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    if original_class(part) is not nn.Linear and not defined_as(part, "zuko.nn", "Linear"):
        return None
    weight, bias = part.weight, part.bias
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    return weight, bias if isinstance(bias, Tensor) else None


def _activation(part: nn.Module) -> tuple[str, tuple[float | str, ...]] | None:
    kind = original_class(part)
    name = _ACTIVATIONS.get(kind)
    if isinstance(part, nn.LeakyReLU) and name:
        return ("relu", ()) if part.negative_slope == 0 else (name, (float(part.negative_slope),))
    if isinstance(part, nn.ELU) and name:
        return name, (float(part.alpha),)
    if isinstance(part, nn.GELU) and name:
        return name, (part.approximate,)
    if isinstance(part, nn.Softplus) and name:
        return name, (float(part.beta), float(part.threshold))
    return None if name is None else (name, ())
