"""The files that load refuses before it computes anything, and the models that save refuses before it writes."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize, prune

import linfast as lf
from linfast.blueprint import _CallLimit, _Refused
from linfast.io import register
from linfast.operators.base import Transposed


def _node(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class": name, "arguments": arguments}


def _tensor(shape: list[int], dtype: str = "float32", **more: Any) -> dict[str, Any]:
    return {"tensor": shape, "dtype": dtype, "parameter": True, **more}


def _write(path: Path, architecture: Any, tensors: dict[str, torch.Tensor], **more: Any) -> None:
    text = architecture if isinstance(architecture, str) else json.dumps(architecture)
    empty = {"aliases": {}, "strides": {}, "shared": {}, "frozen": [], "learned": [], "switched": []}
    rest = json.dumps({"format": "linfast-2", **empty, **more})
    save_file(tensors, path, metadata={"linfast": f'{rest[:-1]}, "architecture": {text}}}'})


def _twice_over(n: int) -> dict[str, Any]:
    node = _node("Dense", n_out=2)
    for i in range(n):
        node = _node("Sum", left=node, right={"same": i})
    return node


def _nested(n: int) -> str:
    return '{"class": "Transposed", "arguments": {"operator": ' * n + json.dumps(_node("Dense", n_out=2)) + "}}" * n


_EMBEDDING = {
    "num_embeddings": 2, "embedding_dim": 2, "padding_idx": None, "max_norm": None, "norm_type": 2.0,
    "scale_grad_by_freq": False, "sparse": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu", "num_embeddings": 10**9}, {"dtype": "float32"}, {"_freeze": True}, {"sparse": "yes"},
        {"max_norm": "a"}, {"norm_type": "x"}, {"scale_grad_by_freq": 5}, {"num_embeddings": True},
    ],
)  # fmt: skip
@pytest.mark.usefixtures("_little_memory")
def test_an_embedding_takes_only_what_save_writes(change: dict[str, Any], tmp_path: Path) -> None:
    """Its constructor takes a device too, with which it would make a table of any size."""
    _write(tmp_path / "good", _node("Embedding", **_EMBEDDING), {"weight": torch.ones(2, 2)})
    assert torch.equal(lf.load(tmp_path / "good")(torch.tensor([1])), torch.ones(1, 2))
    _write(tmp_path / "f", _node("Embedding", **_EMBEDDING | change), {"weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=f"Embedding takes no {next(iter(change))}"):
        lf.load(tmp_path / "f")


@pytest.fixture
def _little_memory() -> Iterator[None]:
    """Limit memory to a few GiB more than are in use, so that code that allocates before it checks fails."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (3 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


_UNET = {"channels_in": 1, "channels_out": 2, "resolution": 8}


@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        (_twice_over(40), "shares modules"),
        (_node("Dense", n_out=10**7), r"weight is \(2, 2\), expected"),
        (_node("Dense", n_out=10**30), "n_out must be an integer of 64 bits"),
        (_node("Householder", features=2, count=10**9), "missing tensors"),
        (_node("MaskedMLP", features=10**9, hidden={"list": [10**9]}), "missing tensors"),
        (_node("Permute", features=10**9, permutation=None), "missing tensors"),
        (_node("Mix", features=40000, kind="free"), r"weight is \(2, 2\), expected"),
        (_node("MLP", n_in=1, n_out=1, hidden={"list": [1] * 10**5}), "far more tensors"),
        (_node("MLP", n_in=-5, n_out=3, hidden={"list": []}), "n_in must be at least 1; got -5"),
        (_node("UNet", **_UNET, blocks=10**9), "far more tensors"),
        (_node("Diagonal", n=10**12, diagonal=_tensor([10**12])), "n is too large"),
        (_node("DepthwiseConv", channels=10**6, kernel_size=10**3, size={"list": [1, 1]}), "expected"),
        (_node("TimeDiagonal", n=10**8, rank=10**6), "missing tensors"),
        (_nested(450), "lie too deep"),
        (_nested(90).replace("Transposed", "Inverse").replace("operator", "bijection"), "lie too deep"),
        (_nested(20000), "nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_file_does_not_hold_is_not_made(architecture: Any, match: str, tmp_path: Path) -> None:
    _write(tmp_path / "f", architecture, {"weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=f"{tmp_path}/f: .*{match}"):
        lf.load(tmp_path / "f")


_LU = {"lower": torch.zeros(2, 2), "upper": torch.zeros(2, 2), "log_diagonal": torch.zeros(2)}
_REVERSED, _ONES = _node("Permute", features=2, permutation="reverse"), torch.ones(2)
_DIAGONAL = _node("Diagonal", n=2, diagonal=None)


@pytest.mark.parametrize(
    ("architecture", "tensors", "match"),
    [
        (_REVERSED, {"permutation": torch.tensor([0, 0])}, "permutation must hold"),
        (_REVERSED, {"permutation": torch.tensor([0, 7])}, "permutation must hold"),
        (_REVERSED, {"permutation": torch.tensor([0.5, 1.0])}, "permutation is float32, expected int64"),
        (_REVERSED, {"permutation": torch.tensor([0, 1], dtype=torch.int32)}, "permutation is int32"),
        (
            _node("Mix", features=2, kind="lu"),
            {"permutation": torch.tensor([1, 1]), **_LU},
            "permutation must hold",
        ),
        (_node("Scaled", factor=float("nan"), operator=_DIAGONAL), {}, "Scaled: factor must be finite; got nan"),
        ('{"class": "Diagonal", "arguments": {"n": 1e999}}', {}, "Diagonal: n must be finite; got inf"),
        (
            _node("LowRank", alpha=-float("inf"), U=_tensor([2, 1]), V=_tensor([2, 1])),
            {"U": torch.ones(2, 1), "V": torch.ones(2, 1)},
            "LowRank: alpha must be finite",
        ),
        (
            _node("LowRank", alpha=0.5, U=_tensor([2, 1]), V=_tensor([2, 1])),
            {"U": torch.ones(2, 1).double(), "V": torch.ones(2, 1)},
            "U is float64, expected float32",
        ),
        (_DIAGONAL, {"diagonal": torch.tensor([3, 1])}, "diagonal is int64, expected floating point"),
        (_DIAGONAL, {"diagonal": torch.tensor([True, True])}, "diagonal is bool"),
        (_DIAGONAL, {"diagonal": _ONES.to(torch.float8_e4m3fn)}, "diagonal is F8_E4M3"),
        (_DIAGONAL, {"diagonal": _ONES.to(torch.complex64)}, "diagonal is C64"),
        (_node("Diagonal", n=2, diagonal=_tensor([2], "qint8")), {"diagonal": _ONES}, "qint8"),
        (_node("Diagonal", n=2, diagonal=_tensor([2], "int64")), {"diagonal": _ONES}, "floating point"),
        (_node("Diagonal", n=2, diagonal=_tensor([-2])), {"diagonal": _ONES}, "list of sizes"),
        (_node("Diagonal", n=2, diagonal=_tensor([True])), {"diagonal": _ONES}, "list of sizes"),
        (_node("Diagonal", n=True), {"diagonal": torch.ones(1)}, "n must be a whole number; got True"),
        (_node("Diagonal", n=2.0), {"diagonal": _ONES}, "n must be a whole number; got 2.0"),
        (_node("Diagonal", n="2"), {"diagonal": _ONES}, "n must be a whole number; got .2."),
        (_node("Diagonal"), {"diagonal": _ONES}, "missing 1 required"),
        (_node("Inverse", bijection=_DIAGONAL), {}, "bijection must be a Bijection; got (a )?Diagonal"),
        (_node("MLP", n_in=1, n_out=1, hidden={"list": [1.5]}), {}, "hidden must be a whole number; got 1.5"),
        (
            _node("AffineCoupling", conditioner=_node("MLP", n_in=1, n_out=2), features=2, scale_map=3),
            {},
            "scale_map",
        ),
        ({"same": 0}, {}, "cannot be built"),
        (_node("Transposed", operator={"same": 0}), {}, "module 0, which was not built"),
        (
            _node("Permute", features=2, permutation=_tensor([3], "int64", parameter=False, values=[0, 1])),
            {"permutation": torch.tensor([1, 0])},
            "values of",
        ),
        (
            _node("Permute", features=2, permutation=_tensor([2], "int64", parameter=False, values=[0.5, 1])),
            {"permutation": torch.tensor([1, 0])},
            "values of",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_save_never_writes_is_refused(
    architecture: Any, tensors: dict[str, torch.Tensor], match: str, tmp_path: Path
) -> None:
    _write(tmp_path / "f", architecture, tensors)
    with pytest.raises(ValueError, match=f"{tmp_path}/f: .*{match}"):
        lf.load(tmp_path / "f")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"aliases": {"a": "b", "b": "diagonal"}}, "an alias of b"),
        ({"aliases": {"diagonal": "diagonal"}}, "an alias of diagonal"),
        ({"aliases": [1]}, "aliases is"),
        ({"aliases": {"other": "diagonal"}}, "left over.*other"),
        ({"strides": {"diagonal": [True]}}, "list of sizes"),
        ({"strides": {"diagonal": 0}}, "strides is"),
        ({"strides": "diagonal"}, "strides is"),
        ({"frozen": ["other"]}, "frozen names 'other'"),
        ({"frozen": 1}, "frozen is"),
        ({"learned": ["other"]}, "learned names 'other'"),
        ({"learned": ["diagonal"]}, "learned names 'diagonal'"),
        ({"learned": {"diagonal": True}}, "learned is"),
        ({"switched": ["part"]}, "switched names 'part'"),
        ({"shared": {"part": ""}}, "cannot be built"),
    ],
)
def test_damaged_lists_are_refused(more: dict[str, Any], match: str, tmp_path: Path) -> None:
    _write(tmp_path / "f", _DIAGONAL, {"diagonal": _ONES}, **more)
    with pytest.raises(ValueError, match=match):
        lf.load(tmp_path / "f")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    lf.save(lf.coupling_flow(2, 1, (2,)), tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "f").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a safetensors file"):
            lf.load(tmp_path / "f")


def _coupling() -> lf.AffineCoupling:
    return lf.AffineCoupling(lf.MLP(3, 6, (8,)), 6)


def _with(change: Callable[[Any], object], make: Callable[[], nn.Module] = _coupling) -> nn.Module:
    model = make()
    change(model)
    return model


def _first_layer(model: Any) -> nn.Linear:
    return model.conditioner.layers[0]


def _overlapping() -> lf.LatentOperator:
    numbers = torch.randn(10)
    return lf.Diagonal.of(nn.Parameter(numbers[:6])) @ lf.Diagonal.of(nn.Parameter(numbers[3:9]))


def _transposed() -> lf.LatentOperator:
    A, B = lf.Dense(3), lf.Dense(3)
    B.weight = nn.Parameter(A.weight.data.t())
    return A @ B


def _constant(value: torch.Tensor) -> lf.LatentOperator:
    A = lf.Diagonal(2)
    del A.diagonal
    A.register_buffer("diagonal", value)
    return A


def _deep(n: int) -> lf.LatentOperator:
    A: lf.LatentOperator = lf.Dense(2)
    for _ in range(n):
        A = Transposed(A)
    return A


def _doubled(n: int) -> lf.LatentOperator:
    A: lf.LatentOperator = lf.Dense(2)
    for _ in range(n):
        A = A + A
    return A


class _MyDense(lf.Dense):
    pass


@register
class _KeepsATensor(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.table = n, torch.arange(n)


@register
class _ReadsATensor(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.sum = n, int(torch.arange(n).sum())


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@register
class _Settings(nn.Module):
    """Attributes that a constructor may keep beside its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self._private, self.nothing, self.function = 1.0, 1, None, torch.tanh
        self.numbers, self.named, self.array = [1.0], {"a": 1.0}, np.ones(2)
        self.norm = nn.LayerNorm(4)

    def helper(self) -> None:
        """Replaced in a test."""


def _parametrize(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", nn.Identity())


_NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: _with(lambda m: _parametrize(_first_layer(m))), "layers.0 is a ParametrizedLinear"),
        (lambda: _with(_parametrize, lambda: lf.Dense(2)), "remove its parametrizations"),
        (lambda: _with(lambda m: nn.utils.parametrizations.spectral_norm(_first_layer(m))), "layers.0"),
        (lambda: _with(lambda m: nn.utils.spectral_norm(_first_layer(m))), "layers.0.*SpectralNorm"),
        (lambda: _with(lambda m: prune.l1_unstructured(_first_layer(m), "weight", amount=0.5)), "layers.0.*L1"),
        (lambda: _with(lambda m: m.conditioner.register_forward_hook(lambda *_: None)), "MLP at conditioner.*hook"),
        (lambda: _with(lambda m: setattr(m, "forward", m.inverse)), "forward of its own"),
        (lambda: _with(lambda m: m.conditioner.layers.__setitem__(0, nn.LazyLinear(8))), "not been initialised"),
        (lambda: _coupling().to("meta"), "meta device"),
        (lambda: _with(lambda m: m.register_parameter("extra", nn.Parameter(_ONES))), "extra is a parameter"),
        (lambda: _with(lambda m: m.register_buffer("extra", _ONES)), "extra is a buffer"),
        (lambda: _with(lambda m: m.conditioner.layers.append(nn.Linear(6, 6))), "conditioner.layers.2"),
        (lambda: _with(lambda m: m.conditioner.layers.__setitem__(0, nn.Identity())), "layers.0 is a Identity"),
        (lambda: _with(lambda m: setattr(m.conditioner, "hidden", (9,))), "out_features is 8 and would be 9"),
        (lambda: _with(lambda m: setattr(m.layers[1], "stride", 2), lambda: lf.ConvNet(2, 2, 4)), "layers.1.str"),
        (lambda: _with(lambda m: m.permutation.zero_(), lambda: lf.Permute(3)), "permutation must hold"),
        (lambda: _with(lambda m: _first_layer(m).bias.data.fill_(_NAN)), r"layers.0.bias \(8,\) has NaN"),
        (
            lambda: _with(lambda m: setattr(m, "factor", _NAN), lambda: 2.0 * lf.Dense(2)),
            "Scaled: factor must be finite; got nan",
        ),
        (lambda: lf.AffineCoupling(lf.MLP(3, 6), 6, scale_map=lf.ScaleMap("clamp", math.inf)), "scale_map must be"),
        (lambda: _constant(torch.ones(2).to_sparse()), "diagonal, a sparse_coo"),
        (lambda: _constant(torch.ones(2, dtype=torch.complex64)), "diagonal, .*complex64"),
        (lambda: _constant(torch.ones(2).to(torch.float8_e4m3fn)), "diagonal, .*float8"),
        (_overlapping, "share memory"),
        (_transposed, "share memory"),
        (lambda: _deep(350), "lie too deep"),
        (lambda: _doubled(40), "shares modules"),
        (lambda: _MyDense(3), "_MyDense: register"),
        (lambda: lf.AffineCoupling(nn.Sequential(nn.Linear(1, 2)), 2), "in a class of your own, registered"),
        (lambda: torch.compile(lf.Dense(2)), r"an OptimizedModule: give what is inside it, its \._orig_mod"),
        (lambda: nn.DataParallel(lf.Dense(2)), r"a DataParallel: give what is inside it, its \.module"),
        (lambda: _KeepsATensor(3), "keeps 'table'"),
        (lambda: _with(lambda m: setattr(m, "gain", 2.0), _Settings), "gain is 2.0 and would be 1.0"),
        (lambda: _with(lambda m: setattr(m, "gain", _ONES), _Settings), "gain is missing and would be 1.0"),
        (lambda: _with(lambda m: setattr(m, "_private", 2), _Settings), "_private is 2 and would be 1"),
        (lambda: _with(lambda m: setattr(m, "nothing", 2), _Settings), "nothing is 2 and would be None"),
        (lambda: _with(lambda m: setattr(m, "function", _double), _Settings), "function is .*_double"),
        (lambda: _with(lambda m: m.numbers.append(2.0), _Settings), r"numbers is list\(1.0, 2.0\)"),
        (lambda: _with(lambda m: m.named.update(a=2.0), _Settings), "named is dict"),
        (lambda: _with(lambda m: m.array.fill(2), _Settings), r"array is float64 \[2.0, 2.0\]"),
        (lambda: _with(lambda m: setattr(m.norm, "eps", 1.0), _Settings), "norm.eps is 1.0 and would be 1e-05"),
        (lambda: _with(lambda m: setattr(m, "helper", _double), _Settings), "it has a helper of its own"),
        (lambda: _ReadsATensor(3), "_ReadsATensor cannot be constructed on the meta device"),
    ],
)  # fmt: skip
def test_what_load_would_refuse_or_change_is_not_saved(make: Callable[[], nn.Module], match: str, tmp_path) -> None:
    with pytest.raises((TypeError, ValueError), match=f"(?s)cannot save.*{match}"):
        lf.save(make(), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_little_memory")
def test_strides_in_a_file_take_no_more_memory_than_narrow_gaps_do(tmp_path: Path) -> None:
    weight = torch.arange(4.0).reshape(2, 2)
    for strides in ([10**12, 10**15], [1, 10**15], [1, 1], [0, 1]):
        _write(tmp_path / "f", _node("Dense", n_out=2, n_in=2), {"weight": weight}, strides={"weight": strides})
        loaded = lf.load(tmp_path / "f").weight
        assert loaded.untyped_storage().nbytes() <= 4 * weight.nbytes
        assert torch.equal(loaded, weight[:1].expand(2, 2) if strides[0] == 0 else weight)


def test_a_refusal_does_not_change_torch() -> None:
    """Wherever in a constructor the limit is reached, the enclosing blocks (such as torch.no_grad) end."""
    for calls in range(40):
        with pytest.raises(_Refused, match="far more tensors"), _CallLimit(calls):
            lf.UNet(4, 8, resolution=8, width=4)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("path", ["a\0b", "\udcff.safetensors"])
def test_a_name_that_cannot_be_read_is_not_written(path: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (lambda: lf.save(lf.Dense(2), path), lambda: lf.load(path)):
        with pytest.raises(ValueError, match=r"^path must be a name that a file can have, in UTF-8"):
            call()
    assert not list(tmp_path.iterdir())
