"""linfast: fast Linearizers, f(x) = g_y^{-1}(A g_x(x)), and coupling flows for PyTorch."""

from . import _command, ops  # noqa: F401  # _command is first, so that an interrupted command prints one line
from ._version import __version__
from .accelerate import accelerate, register_adapter, restore
from .compat.from_reference import from_reference
from .density import Density
from .dispatch import backend
from .explain import explain, plan
from .flows import (
    MLP,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Bijection,
    ConvNet,
    Flow,
    Householder,
    Inverse,
    MaskedAutoregressive,
    MaskedMLP,
    Mix,
    Permute,
    ResidualMLP,
    SplineCoupling,
    Squeeze,
    UNet,
    autoregressive_flow,
    coupling_flow,
    image_flow,
)
from .freeze import freeze
from .io import load, save
from .linearizer import Linearizer
from .operators import (
    Dense,
    DepthwiseConv,
    Diagonal,
    LatentOperator,
    LowRank,
    Projection,
    TimeDepthwiseConv,
    TimeDiagonal,
    TimeLowRank,
)
from .sampling import collapse, generator, invert, sample, sample_stream
from .scale_maps import ScaleMap
from .space import InducedSpace
from .transform import FlowTransform

__all__ = [
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Bijection",
    "ConvNet",
    "Dense",
    "Density",
    "DepthwiseConv",
    "Diagonal",
    "Flow",
    "FlowTransform",
    "Householder",
    "InducedSpace",
    "Inverse",
    "LatentOperator",
    "Linearizer",
    "LowRank",
    "MaskedAutoregressive",
    "MaskedMLP",
    "Mix",
    "Permute",
    "Projection",
    "ResidualMLP",
    "ScaleMap",
    "SplineCoupling",
    "Squeeze",
    "TimeDepthwiseConv",
    "TimeDiagonal",
    "TimeLowRank",
    "UNet",
    "__version__",
    "accelerate",
    "autoregressive_flow",
    "backend",
    "collapse",
    "coupling_flow",
    "explain",
    "freeze",
    "from_reference",
    "generator",
    "image_flow",
    "invert",
    "load",
    "ops",
    "plan",
    "register_adapter",
    "restore",
    "sample",
    "sample_stream",
    "save",
]
