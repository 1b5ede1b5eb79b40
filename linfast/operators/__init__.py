"""Linear operators A on latents, closed under the algebra of linear maps."""

from .base import LatentOperator
from .block_diagonal import BlockDiagonal
from .dense import Dense
from .depthwise_conv import DepthwiseConv
from .diagonal import Diagonal, Projection
from .low_rank import LowRank
from .spectral import SVD, Eig
from .time_depthwise_conv import TimeDepthwiseConv
from .time_diagonal import TimeDiagonal
from .time_low_rank import TimeLowRank

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
