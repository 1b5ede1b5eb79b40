"""Reading images and pictures: sizes, ranges, and errors."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from linfast.examples.data import held_out, load_images, load_labels, load_pictures


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


def _damaged(folder: Path) -> list[Path]:
    """Files that are not an .npz with pictures, each for another reason."""
    x = np.zeros((100, 4, 4), np.uint8)
    np.savez_compressed(folder / "whole.npz", x=x)
    np.savez(folder / "plain.npz", x=x)
    np.save(folder / "array.npy", x)
    np.savez(folder / "objects.npz", x=np.array([None, 1]))
    np.savez(folder / "empty.npz", x=np.zeros((100, 0, 0), np.uint8))
    np.savez(folder / "scalar.npz", x=np.uint8(3))
    with zipfile.ZipFile(folder / "bytes.npz", "w") as archive:
        archive.writestr("x", b"no array")
    with zipfile.ZipFile(folder / "header.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00\x06\x00{'a':(" + b"\0" * 10)
    whole, plain = (folder / "whole.npz").read_bytes(), bytearray((folder / "plain.npz").read_bytes())
    plain[300] ^= 1
    (folder / "crc.npz").write_bytes(plain)
    for cut in (0, 1, 40, len(whole) // 2, len(whole) - 1):
        (folder / f"cut{cut}.npz").write_bytes(whole[:cut])
    (folder / "deflate.npz").write_bytes(whole[:60] + b"\xff" * 8 + whole[68:])
    return [path for path in folder.iterdir() if path.name not in ("whole.npz", "plain.npz")]


def test_labels_are_one_hot_and_checked(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    assert torch.equal(load_labels(None, 1797).argmax(1), torch.from_numpy(load_digits().target))
    path, y = tmp_path / "x.npz", np.arange(100) % 7
    np.savez(path, y=y)
    assert torch.equal(load_labels(path, 100), torch.eye(7)[y])
    for wrong in (y[:-1], y - 1, y / 2, y * 1000, y[:, None]):
        np.savez(path, y=wrong)
        with pytest.raises(ValueError, match=r"y must be whole numbers from 0 to 999, \[100\]; got"):
            load_labels(path, 100)
    np.savez(path, x=y)
    with pytest.raises(ValueError, match="got none"):
        load_labels(path, 100)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    for path in _damaged(tmp_path):
        with pytest.raises(ValueError, match=path.name):
            load_images(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_images(tmp_path)
    for resolution in (0, -1):
        with pytest.raises(ValueError, match="resolution must be at least 1"):
            load_images(None, resolution)


def test_damaged_pictures_are_refused_by_name(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    for cut in (0, 5, 20, 40, len(whole) - 30):
        (tmp_path / "x.png").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"x.png: not a picture"):
            load_pictures(tmp_path, 4)
    (tmp_path / "x.png").unlink()
    for name, make in (("folder.png", os.mkdir), ("pipe.png", os.mkfifo)):
        make(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: not a picture \(no file\)"):
            load_pictures(tmp_path, 4)
        os.renames(tmp_path / name, tmp_path / "seen" / name)
