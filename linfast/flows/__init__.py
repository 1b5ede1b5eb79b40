"""Invertible networks g: bijections, couplings and the flows built of them."""

from ..nets import MLP, ConvNet, SinusoidalEmbedding
from .actnorm import ActNorm
from .bijection import Bijection, Conditioned, Inverse, same_space
from .builders import coupling_flow, image_flow
from .couplings import AdditiveCoupling, AffineCoupling
from .flow import Flow
from .mix import Householder, Mix, Permute
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
    "Mix",
    "Permute",
    "SinusoidalEmbedding",
    "Squeeze",
    "UNet",
    "coupling_flow",
    "image_flow",
    "same_space",
]
