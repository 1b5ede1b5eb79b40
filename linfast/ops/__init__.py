"""linfast's ops: functions of plain tensors, one file per op."""

from .affine_coupling import affine_coupling
from .autoregressive_masks import AutoregressiveMasks
from .channel_mix import channel_mix
from .conv2d_fused import conv2d_fused
from .coupling_mix import coupling_mix
from .coupling_stack import coupling_stack, mlp_coupling
from .depthwise_conv import depthwise_conv
from .group_norm_silu import group_norm_silu
from .latent_matmul import latent_matmul
from .linearizer_stack import linearizer_stack
from .low_rank import low_rank
from .masked_autoregressive import masked_autoregressive
from .norm_activate import norm_activate
from .rq_spline import rq_spline
from .stack_weights import AffineMap, CouplingLayer, CouplingStack

__all__ = [
    "AffineMap",
    "AutoregressiveMasks",
    "CouplingLayer",
    "CouplingStack",
    "affine_coupling",
    "channel_mix",
    "conv2d_fused",
    "coupling_mix",
    "coupling_stack",
    "depthwise_conv",
    "group_norm_silu",
    "latent_matmul",
    "linearizer_stack",
    "low_rank",
    "masked_autoregressive",
    "mlp_coupling",
    "norm_activate",
    "rq_spline",
]
