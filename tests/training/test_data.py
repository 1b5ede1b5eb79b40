"""Reading images and pictures: sizes, ranges, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from linfast.training.apps.common import held_out
from linfast.training.data import load_images, load_pictures


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Path, np.ndarray]:
    x = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    return tmp_path / "x.npz", x


@pytest.mark.parametrize("resolution", [None, 14])
def test_images_are_averaged_down(digits, resolution: int | None) -> None:
    path, x = digits
    images = load_images(path, resolution)
    assert images.shape == (100, 1, 14, 14)
    assert float(images[0, 0, 0, 1]) == pytest.approx(x[0, :2, 2:4].mean() / 127.5 - 1, abs=1e-6)


def test_images_are_padded_evenly_with_black(digits) -> None:
    path, x = digits
    images = load_images(path, 33)
    assert images.shape == (100, 1, 33, 33)
    torch.testing.assert_close(images[:, 0, 2:30, 2:30], torch.from_numpy(x) / 127.5 - 1)
    assert float(images[:, 0, :2].max()) == float(images[..., 30:].max()) == -1
    assert torch.equal(load_images(path, 28)[:, 0], images[:, 0, 2:30, 2:30])


def test_the_digits_need_no_file() -> None:
    images = load_images()
    assert images.shape == (1797, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (-1, 1)


def test_sizes_that_cannot_be_had_are_named(digits) -> None:
    with pytest.raises(ValueError, match=r"x.npz: cannot average 28 pixels down to 10"):
        load_images(digits[0], 10)


def test_held_out_images_are_spread_over_a_sorted_file() -> None:
    images = torch.arange(2500)
    training, held = held_out(images)
    assert held.tolist() == list(range(9, 2500, 10))
    assert sorted([*training.tolist(), *held.tolist()]) == list(range(2500))
    assert len(held_out(torch.zeros(60_000))[1]) == 1000


def test_pictures_are_read_by_name_and_resized(tmp_path: Path) -> None:
    from PIL import Image

    flat = np.zeros((8, 8, 3), np.uint8)
    flat[..., 0], flat[..., 2] = 255, 51
    Image.fromarray(flat).save(tmp_path / "red.png")
    Image.fromarray(flat[..., 0]).save(tmp_path / "grey.png")
    pictures = load_pictures(tmp_path, 4)
    assert list(pictures) == ["grey", "red"]
    torch.testing.assert_close(pictures["red"], torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, 4, 4))
    torch.testing.assert_close(pictures["grey"], torch.ones(3, 4, 4))
    (tmp_path / "bad.png").write_text("no")
    with pytest.raises(ValueError, match=r"bad.png: not a picture"):
        load_pictures(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="no folder with PNG"):
        load_pictures(tmp_path / "none", 4)
