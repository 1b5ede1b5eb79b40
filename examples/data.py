"""Images for training: square grey ones from an .npz file, and aligned colour pictures from a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["held_out", "load_images", "load_labels", "load_pictures"]

_LARGEST_DEFAULT = 16  # pixels per side
_HELD_OUT = 1000  # images
_CLASSES = 1000  # at most


def load_images(path: str | Path | None = None, resolution: int | None = None) -> Tensor:
    """Grey images [N, 1, resolution, resolution] in [-1, 1].

    Args:
        path: an .npz file with ``x``, uint8 [N, side, side]; by default the 1797 digits of scikit-learn, 8 x 8.
        resolution: the side of the images. A smaller one than the file's must divide it, and pixels are averaged; a
            larger one pads evenly with -1. By default the file's, averaged by an integer factor to at most 16.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one without such an ``x``; its side is not a multiple of the resolution.
    """
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution must be at least 1; got {resolution}")
    if path is None:
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    else:
        images = torch.from_numpy(_read(Path(path))).float()[:, None] / 127.5 - 1
    side = images.shape[-1]
    if resolution is not None and resolution >= side:
        before = (resolution - side) // 2
        after = resolution - side - before
        return F.pad(images, (before, after, before, after), value=-1.0)
    factor = -(-side // (resolution or _LARGEST_DEFAULT))
    if side % factor or (resolution and side != factor * resolution):
        raise ValueError(
            f"{path or 'digits'}: cannot average {side} pixels down to {resolution or side / factor:g}"
        )
    return F.avg_pool2d(images, factor)


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            x = np.asarray(archive["x"])
    except Exception as error:  # of zlib, zipfile, numpy or Python: damaged files raise all kinds
        raise ValueError(f"{path}: expected an .npz file with an array x ({error})") from error
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1] != x.shape[2] or len(x) < 100 or not x.size:
        raise ValueError(f"{path}: x must be uint8 [N, side, side], N >= 100; got {x.dtype} {tuple(x.shape)}")
    return x


def load_labels(path: str | Path | None, count: int) -> Tensor:
    """The class of each of the ``count`` images that ``load_images(path)`` returns, one-hot [count, classes].

    Args:
        path: an .npz file with ``y``, whole numbers from 0, [count]; by default the digits of scikit-learn.

    Raises:
        ValueError: there is no such ``y`` in the file.
    """
    if path is None:
        from sklearn.datasets import load_digits

        y = load_digits().target
    else:
        with np.load(path, allow_pickle=False) as archive:
            y = np.asarray(archive.get("y"))
    if y.dtype.kind not in "iu" or y.shape != (count,) or not 0 <= y.min() <= y.max() < _CLASSES:
        got = "none" if y.shape == () else f"{y.dtype} {y.shape}"
        raise ValueError(f"{path}: y must be whole numbers from 0 to {_CLASSES - 1}, [{count}]; got {got}")
    return F.one_hot(torch.from_numpy(y.astype(np.int64))).float()


def held_out(data: Tensor) -> tuple[Tensor, Tensor]:
    """(training rows, held-out rows) of images or labels: every tenth, or about 1000, as files may be sorted."""
    every = max(10, len(data) // _HELD_OUT)
    held = torch.zeros(len(data), dtype=torch.bool)
    held[every - 1 :: every] = True
    return data[~held], data[held]


def load_pictures(folder: str | Path, resolution: int) -> dict[str, Tensor]:
    """The folder's PNG pictures by name, each [3, resolution, resolution] in [-1, 1], resized with antialiasing.

    Raises:
        FileNotFoundError: no such folder, or no PNG in it.
        ValueError: a file that is not a picture, or a damaged one.
    """
    from PIL import Image

    pictures = {}
    for path in sorted(Path(folder).glob("*.png")):
        if not path.is_file():
            raise ValueError(f"{path}: not a picture (no file)")
        try:
            picture = Image.open(path).convert("RGB")
        except Exception as error:  # damaged files raise whatever their decoder does
            raise ValueError(f"{path}: not a picture ({error})") from error
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        size = (resolution, resolution)
        pictures[path.stem] = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)[0]
    if not pictures:
        raise FileNotFoundError(f"{folder}: no folder with PNG pictures")
    return pictures
