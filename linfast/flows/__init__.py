"""Invertible networks g: bijections, couplings and the flows built of them."""

from ..masked_net import MaskedMLP
from ..nets import MLP, ConvNet, SinusoidalEmbedding
from .actnorm import ActNorm
from .autoregressive import MaskedAutoregressive
from .bijection import Bijection, Conditioned, Inverse, same_space
from .builders import autoregressive_flow, coupling_flow, image_flow
from .couplings import AdditiveCoupling, AffineCoupling
from .flow import Flow
from .mix import Householder, Mix, Permute
from .splines import SplineCoupling
from .squeeze import Squeeze
from .unet import UNet

__all__ = [
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Bijection",
    "Conditioned",
    "ConvNet",
    "Flow",
    "Householder",
    "Inverse",
    "MaskedAutoregressive",
    "MaskedMLP",
    "Mix",
    "Permute",
    "SinusoidalEmbedding",
    "SplineCoupling",
    "Squeeze",
    "UNet",
    "autoregressive_flow",
    "coupling_flow",
    "image_flow",
    "same_space",
]
