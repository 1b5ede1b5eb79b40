"""Linear operators A on latents, closed under the algebra of linear maps."""

from .base import LatentOperator
from .dense import Dense
from .depthwise import BlockDiagonal, DepthwiseConv
from .diagonal import Diagonal, Projection
from .low_rank import LowRank
from .spectral import SVD, Eig
from .time import TimeDepthwiseConv, TimeDiagonal, TimeLowRank

__all__ = [
    "SVD",
    "BlockDiagonal",
    "Dense",
    "DepthwiseConv",
    "Diagonal",
    "Eig",
    "LatentOperator",
    "LowRank",
    "Projection",
    "TimeDepthwiseConv",
    "TimeDiagonal",
    "TimeLowRank",
]
