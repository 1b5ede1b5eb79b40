"""The demo's images: scikit-learn's 8 x 8 digits, or an .npz file of square grey images."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["load_images"]

_LARGEST_SIDE = 16


def load_images(path: str | Path | None = None) -> Tensor:
    """Images [N, side, side] in [-1, 1].

    Args:
        path: an .npz file with ``x``, uint8 [N, side, side]; by default scikit-learn's
            digits, 1797 images of 8 x 8. Images wider than 16 pixels are averaged
            down by a whole factor.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without such an ``x``.
    """
    if path is None:
        from sklearn.datasets import load_digits

        return torch.from_numpy(load_digits().images).float() / 8 - 1
    images = torch.from_numpy(_read(Path(path))).float() / 127.5 - 1
    factor = -(-images.shape[-1] // _LARGEST_SIDE)
    if images.shape[-1] % factor:
        raise ValueError(f"{path}: cannot average {images.shape[-1]} pixels down by {factor}")
    return F.avg_pool2d(images[:, None], factor)[:, 0]


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            x = archive["x"]
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an .npz file with an array x ({error})") from error
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1] != x.shape[2] or len(x) < 100:
        raise ValueError(f"{path}: x must be uint8 [N, side, side] with N >= 100; got {x.dtype} {tuple(x.shape)}")
    return x
