"""Squeeze: space to depth, [B, C, H, W] -> [B, 4 C, H / 2, W / 2]; a permutation of pixels, log|det| = 0."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_count
from .bijection import Bijection, constant_log_det
from .undo import Context, Outputs


class Squeeze(Bijection):
    """Each 2 x 2 patch of a channel becomes four channels, in the order (c, row, column).

    Args:
        features: C of x.

    Raises:
        ValueError: x is not [B, C, H, W] with even H and W.
    """

    _shown = ("features",)

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = check_count("features", features)

    @property
    def features_out(self) -> int | None:
        return None if self.features is None else 4 * self.features

    def _transform(self, x: Tensor, context: Context, inverse: bool, log_det: bool) -> Outputs:
        if x.ndim != 4 or (not inverse and (x.shape[2] % 2 or x.shape[3] % 2)):
            raise ValueError(f"Squeeze: x must be [B, C, H, W] with even H and W; got {tuple(x.shape)}")
        return _unsqueeze(x) if inverse else _squeeze(x), constant_log_det(x) if log_det else None


def _squeeze(x: Tensor) -> Tensor:
    B, C, H, W = x.shape  # not pixel_unshuffle: it refuses an empty batch
    return x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(B, 4 * C, H // 2, W // 2)


def _unsqueeze(z: Tensor) -> Tensor:
    B, C, H, W = z.shape
    return z.reshape(B, C // 4, 2, 2, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, C // 4, 2 * H, 2 * W)
