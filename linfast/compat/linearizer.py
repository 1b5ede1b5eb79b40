"""The import surface of github.com/assafshocher/Linearizer: G, Linearizer, LinearModule.

Code written against that repository runs after changing one import,

    from linearizer import G, LinearModule, Linearizer                    # before
    from linfast.compat.linearizer import G, LinearModule, Linearizer     # after

and its state_dict checkpoints load: the keys start with ``net_gx``, ``net_gy`` and
``linear_network``. To load a pickle of a whole module, or to run code without editing it,
register this module under the old name:

    import linfast.compat.linearizer
    sys.modules["linearizer"] = linfast.compat.linearizer

New code should use ``linfast.Linearizer``, whose A is an operator with an algebra.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

from torch import Tensor, nn

from ..checks import check_count, check_kind, said_of
from ..flows.bijection import Bijection
from ..operators.base import LatentOperator
from ..space import decode_latents

__all__ = ["G", "LinearModule", "Linearizer"]


class G(nn.Module):
    """An invertible network on images of ``in_ch`` channels, ``image_resolution`` pixels square.

    Subclasses define ``forward(x, **kwargs)`` and ``inverse(z, **kwargs)``.

    Attributes:
        dim: in_ch * image_resolution ** 2, the number of latent coordinates.
    """

    def __init__(self, in_ch: int, image_resolution: int) -> None:
        super().__init__()
        self.dim = check_count("in_ch", in_ch) * check_count("image_resolution", image_resolution) ** 2

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """z = g(x)."""
        raise _not_overridden(self, G, "forward")

    def inverse(self, z: Tensor, **kwargs: Any) -> Tensor:
        """x = g^{-1}(z)."""
        raise _not_overridden(self, G, "inverse")


class LinearModule(nn.Module):
    """A linear map of latents. Subclasses define ``forward(x, **kwargs)``; ``inverse(z, **kwargs)`` is optional."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """A x."""
        raise _not_overridden(self, LinearModule, "forward")

    def inverse(self, z: Tensor, **kwargs: Any) -> Tensor:
        """A^{-1} z; only ``Linearizer.inverse`` and ``A_inverse`` call it."""
        raise _not_overridden(self, LinearModule, "inverse")


class Linearizer(nn.Module):
    """f(x) = g_y^{-1}(A g_x(x)), with inverse f^{-1}(y) = g_x^{-1}(A^{-1} g_y(y)).

    ``forward`` and ``inverse`` call the methods gx, gy, gx_inverse, gy_inverse, A and
    A_inverse with all keyword arguments. Subclasses may override these, for instance to
    call one shared network in two modes.

    Args:
        gx: a G, or any module with forward and inverse.
        linear_network: a LinearModule, or any module.
        gy: like gx; None shares gx.

    linfast's own classes work too. As in ``linfast.Linearizer``, a LatentOperator gets only
    the keyword ``t``, a Bijection all others. Fix the time of a time-conditioned Bijection:
    ``Linearizer(g.at(t=1.0), A, g.at(t=0.0))``. These classes have no ``dim`` and no
    ``get_lin_t``; ``linfast.collapse(f.linear_network)`` combines all sampling steps.

    Raises:
        NotImplementedError: a call needs a forward or inverse that a part does not define.
    """

    def __init__(self, gx: nn.Module, linear_network: nn.Module, gy: nn.Module | None = None) -> None:
        super().__init__()
        check_kind("gx", gx)
        check_kind("linear_network", linear_network)
        check_kind("gy", gy, (nn.Module, NoneType))
        self.net_gx = gx
        self.net_gy = gx if gy is None else gy
        self.linear_network = linear_network

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """f(x) = g_y^{-1}(A g_x(x))."""
        return self.gy_inverse(self.A(self.gx(x, **kwargs), **kwargs), **kwargs)

    def inverse(self, y: Tensor, **kwargs: Any) -> Tensor:
        """f^{-1}(y) = g_x^{-1}(A^{-1} g_y(y))."""
        return self.gx_inverse(self.A_inverse(self.gy(y, **kwargs), **kwargs), **kwargs)

    def gx(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Latents of x, g_x(x)."""
        return _encode("x", self.net_gx, x, kwargs)

    def gy(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Latents of y, g_y(y)."""
        return _encode("y", self.net_gy, y, kwargs)

    def gx_inverse(self, g_x: Tensor, **kwargs: Any) -> Tensor:
        """The x with these latents."""
        return _decode("g_x", "net_gx", self.net_gx, g_x, kwargs)

    def gy_inverse(self, g_y: Tensor, **kwargs: Any) -> Tensor:
        """The y with these latents."""
        return _decode("g_y", "net_gy", self.net_gy, g_y, kwargs)

    def A(self, g_x: Tensor, **kwargs: Any) -> Tensor:
        """A g_x."""
        if isinstance(self.linear_network, LatentOperator):
            return said_of("g_x", self.linear_network, g_x, t=kwargs.get("t"))
        return self.linear_network(g_x, **kwargs)

    def A_inverse(self, g_y: Tensor, **kwargs: Any) -> Tensor:
        """A^{-1} g_y."""
        if isinstance(self.linear_network, LatentOperator):
            return said_of("g_y", self.linear_network.inverse_at(kwargs.get("t")), g_y)
        return _inverse_of("linear_network", self.linear_network)(g_y, **kwargs)


def _encode(argument: str, g: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return said_of(argument, g, x, **_bijection_context(kwargs)) if isinstance(g, Bijection) else g(x, **kwargs)


def _decode(argument: str, name: str, g: nn.Module, z: Tensor, kwargs: dict[str, Any]) -> Tensor:
    if isinstance(g, Bijection):
        return said_of(argument, lambda z: decode_latents(g, z, _bijection_context(kwargs)), z)
    return _inverse_of(name, g)(z, **kwargs)


def _bijection_context(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords for a Bijection: all but t, which is the operator's."""
    return {key: value for key, value in kwargs.items() if key != "t"}


def _inverse_of(name: str, module: nn.Module) -> Callable[..., Tensor]:
    inverse = getattr(module, "inverse", None)
    if inverse is None:
        raise NotImplementedError(f"{name} is a {type(module).__name__}, which has no inverse method")
    return inverse


def _not_overridden(module: nn.Module, base: type, method: str) -> NotImplementedError:
    return NotImplementedError(
        f"{base.__name__}.{method} is left to subclasses; {type(module).__name__} does not override it"
    )
