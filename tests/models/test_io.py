"""save and load: the same function again, no code from the file, and clear refusals."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import linfast as lf
from linfast.io import register
from tests.laws.zoo import BIJECTIONS, build, perturb

SCALED = 2.0


def _operators() -> dict[str, lf.LatentOperator]:
    dense, low = lf.Dense(4), lf.LowRank(0.5, nn.Parameter(torch.randn(4, 2)), torch.randn(4, 2))
    return {
        "dense": lf.Dense(3, 4),
        "dense-of": lf.Dense.of(torch.randn(5, 4)),
        "diagonal": lf.Diagonal(4),
        "low-rank": low,
        "low-rank-alpha-tensor": lf.LowRank(torch.tensor(0.5), torch.randn(4, 2), torch.randn(4, 2)),
        "projection": lf.Projection(4, 1),
        "depthwise": lf.DepthwiseConv(1, (3, 2), (2, 2)),
        "sum-product-transpose-scaled": (dense @ low).T + SCALED * dense,
        "inverse": dense.inverse(),
        "float64": lf.Dense(4).double(),
    }


@pytest.mark.parametrize("name", _operators())
def test_operators_come_back(name: str, tmp_path) -> None:
    A = perturb(_operators()[name])
    lf.save(A, tmp_path / "A.safetensors")
    B = lf.load(tmp_path / "A.safetensors")
    z = torch.randn(3, A.n_in, dtype=next(t.dtype for t in A.state_dict().values()))
    assert torch.equal(A(z), B(z))
    assert [n for n, _ in A.named_parameters()] == [n for n, _ in B.named_parameters()]
    assert type(A) is type(B)


@pytest.mark.parametrize("name", BIJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bijections_come_back(name: str, dtype: torch.dtype, tmp_path) -> None:
    g, shape = build(name, dtype)
    lf.save(g, tmp_path / "g.safetensors")
    h = lf.load(tmp_path / "g.safetensors")
    x = torch.randn(3, *shape, dtype=dtype)
    for got, expected in zip(h.forward_and_log_det(x), g.forward_and_log_det(x), strict=True):
        assert torch.equal(got, expected)
    assert g.state_dict().keys() == h.state_dict().keys()


def test_tensors_lie_in_memory_as_they_did(tmp_path) -> None:
    U, V = (nn.Parameter(torch.randn(2, 5, 4).movedim(0, -1)) for _ in range(2))
    A = lf.LowRank(0.5, U, V.detach().mT.contiguous().mT) @ lf.Dense.of(torch.randn(4, 4).t())
    for _ in range(2):
        lf.save(A, tmp_path / "A.safetensors")
        B = lf.load(tmp_path / "A.safetensors")
        for (key, value), loaded in zip(A.state_dict().items(), B.state_dict().values(), strict=True):
            assert torch.equal(value, loaded)
            assert value.stride() == loaded.stride(), key
        A = B


def test_expanded_tensors_stay_expanded(tmp_path) -> None:
    rows = lf.TimeDiagonal(6, 2, time_features=8, hidden=8).at(torch.tensor([0.1, 0.5, 0.9]))
    trained = lf.Dense.of(nn.Parameter(torch.randn(1, 6).expand(6, 6)))
    for A in (rows, trained, rows @ trained):
        lf.save(A, tmp_path / "A.safetensors")
        B = lf.load(tmp_path / "A.safetensors")
        z = torch.randn(3, 6)
        assert torch.equal(A(z), B(z))
        assert [t.stride() for t in A.state_dict().values()] == [t.stride() for t in B.state_dict().values()]


def test_modes_and_requires_grad_are_restored(tmp_path) -> None:
    f = lf.image_flow(1, 8, 2, 4, conditioner="unet", unet_options={"blocks": 1, "dropout": 0.5})
    perturb(f).eval()
    f.bijections[1].requires_grad_(False)
    lf.save(f, tmp_path / "f.safetensors")
    g = lf.load(tmp_path / "f.safetensors")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(g(x), f(x))
    f.bijections[1].train()
    lf.save(f, tmp_path / "f.safetensors")
    g = lf.load(tmp_path / "f.safetensors")
    assert [m.training for m in g.modules()] == [m.training for m in f.modules()]
    assert [p.requires_grad for p in g.parameters()] == [p.requires_grad for p in f.parameters()]


class _Tables(nn.Module):
    """A buffer that state_dict() leaves out, one of integers, a frozen parameter of integers, and tied weights."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.register_buffer("scale", torch.linspace(0, 1, n), persistent=False)
        self.register_buffer("order", torch.arange(n))
        self.count = nn.Parameter(torch.zeros((), dtype=torch.long), requires_grad=False)
        self.first, self.second = nn.Linear(n, n), nn.Linear(n, n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * self.scale)[:, self.order]


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _tied() -> lf.LatentOperator:
    """One tensor twice, and again without its gradient."""
    numbers = _leaf(4)
    return lf.Diagonal(4, numbers) @ lf.Diagonal(4, numbers) @ lf.Diagonal(4, numbers.detach())


LEARNED_CONSTANTS = {
    "factors": lambda: lf.LowRank(0.5, _leaf(4, 2), torch.randn(4, 2)),
    "alpha": lambda: lf.LowRank(
        torch.tensor(0.5, requires_grad=True), torch.randn(4, 2), nn.Parameter(_leaf(4, 2))
    ),
    "diagonal": lambda: lf.Diagonal(4, _leaf(4)),
    "dense": lambda: lf.Dense.of(_leaf(3, 3)),
    "transposed": lambda: lf.Dense.of(_leaf(3, 4).T),
    "sliced": lambda: lf.Dense.of(_leaf(4, 6)[:, ::2]),
    "expanded": lambda: lf.Dense.of(_leaf(1, 3).expand(3, 3)),
    "depthwise": lambda: lf.DepthwiseConv(2, (3, 3), (4, 4), _leaf(2, 3, 3)),
    "context": lambda: lf.coupling_flow(4, 2, (8,), context_features=3).at(context=_leaf(1, 3)),
    "half": lambda: lf.Diagonal(4, torch.randn(4, dtype=torch.float16, requires_grad=True)),
    "tied": _tied,
}


@pytest.mark.parametrize("name", LEARNED_CONSTANTS)
def test_constants_that_require_a_gradient_come_back(name: str, tmp_path) -> None:
    model = LEARNED_CONSTANTS[name]()
    lf.save(model, tmp_path / "m.safetensors")
    again = lf.load(tmp_path / "m.safetensors")
    requires = [
        {key: t.requires_grad for key, t in (*m.named_parameters(), *m.named_buffers())} for m in (model, again)
    ]
    assert requires[0] == requires[1]
    assert any(t.requires_grad for t in model.buffers())
    assert all(t.is_leaf for t in again.buffers())
    lf.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_everything_that_a_module_keeps_comes_back(tmp_path) -> None:
    register(_Tables)
    f = _Tables(3)
    f.second.weight = f.first.weight
    f.scale.mul_(3)
    f.order.copy_(torch.tensor([2, 0, 1]))
    lf.save(f, tmp_path / "f.safetensors")
    g = lf.load(tmp_path / "f.safetensors")
    x = torch.randn(4, 3)
    assert torch.equal(g(x), f(x))
    assert g.second.weight is g.first.weight
    assert g.state_dict().keys() == f.state_dict().keys()


def test_tied_weights_and_layers_stay_tied(tmp_path) -> None:
    one, other = lf.MLP(3, 6, (3, 3)), lf.MLP(3, 6, (3, 3))
    other.layers[0] = one.layers[0]
    for mine, theirs in zip(other.layers[1:], one.layers[1:], strict=True):
        mine.weight = theirs.weight
    g = perturb(lf.Flow([lf.AffineCoupling(one, 6), lf.AffineCoupling(other, 6, "second")]))
    lf.save(g, tmp_path / "g.safetensors")
    h = lf.load(tmp_path / "g.safetensors")
    x = torch.randn(3, 6)
    assert torch.equal(h(x), g(x))
    first, second = (coupling.conditioner.layers for coupling in h.bijections)
    assert first[0] is second[0]
    assert first[1].weight is second[1].weight
    assert first[2].weight is second[2].weight
    assert len(list(h.parameters())) == len(list(g.parameters()))


def test_a_linearizer_keeps_what_it_shares(tmp_path) -> None:
    g = perturb(lf.coupling_flow(6, 2, (8,), time_features=8))
    f = lf.Linearizer(g.at(t=1.0), lf.TimeLowRank(6, 2), g.at(t=0.0))
    lf.save(f, tmp_path / "f.safetensors")
    h = lf.load(tmp_path / "f.safetensors")
    x = torch.randn(3, 6)
    assert torch.equal(h(x, t=0.3), f(x, t=0.3))
    assert h.g_x.bijection is h.g_y.bijection
    shared = lf.Linearizer(g.at(t=1.0), lf.Dense(6))
    lf.save(shared, tmp_path / "shared.safetensors")
    again = lf.load(tmp_path / "shared.safetensors")
    assert again.g_x is again.g_y
    assert torch.equal((again @ again)(x), (shared @ shared)(x))


def test_tensor_context_is_saved(tmp_path) -> None:
    g = perturb(lf.coupling_flow(4, 2, (8,), context_features=3)).at(context=torch.randn(2, 3))
    lf.save(g, tmp_path / "g.safetensors")
    x = torch.randn(2, 4)
    assert torch.equal(lf.load(tmp_path / "g.safetensors")(x), g(x))


def test_loading_leaves_the_random_state_alone(tmp_path) -> None:
    lf.save(lf.Dense(3), tmp_path / "A.safetensors")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    lf.load(tmp_path / "A.safetensors")
    assert torch.equal(torch.rand(1), expected)


def test_foreign_classes_are_refused_until_registered(tmp_path) -> None:
    class Halve(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.n = n

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x, x), 1) / 2

    g = lf.AffineCoupling(Halve(2), 4)
    with pytest.raises(TypeError, match=r"Halve.*register"):
        lf.save(g, tmp_path / "g.safetensors")
    assert list(tmp_path.iterdir()) == []
    register(Halve)
    lf.save(g, tmp_path / "g.safetensors")
    x = torch.randn(3, 4)
    assert torch.equal(lf.load(tmp_path / "g.safetensors")(x), g(x))


def test_nan_weights_are_refused(tmp_path) -> None:
    A = lf.Dense(2)
    with torch.no_grad():
        A.weight[0, 0] = float("nan")
    path = tmp_path / "A.safetensors"
    with pytest.raises(ValueError, match=r"weight \(2, 2\) has NaN"):
        lf.save(A, path)
    assert not path.exists()
    lf.save(lf.Dense(2), path)
    _rewrite(path, lambda tensors, header: tensors["weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"weight \(2, 2\) has NaN"):
        lf.load(path)


_SLICES = {
    "every second column": lambda: lf.Dense.of(torch.randn(8, 16)[:, ::2]),
    "one of three": lambda: lf.Dense.of(torch.randn(8, 8, 3)[..., 0]),
    "columns of a basis": lambda: (lambda Q: lf.LowRank(0.5, Q[:, ::2], Q[:, 1::2]))(torch.randn(8, 16)),
    "one column": lambda: (lambda Q: lf.LowRank(0.5, Q[:, ::2], Q[:, 1::2]))(torch.randn(128, 2)),
}


@pytest.mark.parametrize("name", _SLICES)
def test_slices_compute_the_same_bits(name: str, tmp_path) -> None:
    path = tmp_path / "A.safetensors"
    for seed in range(10):
        torch.manual_seed(seed)
        A = _SLICES[name]()
        lf.save(A, path)
        z, first = torch.randn(5, A.n_in), path.read_bytes()
        assert torch.equal(lf.load(path)(z), A(z))
        lf.save(lf.load(path), path)
        assert path.read_bytes() == first


def test_notes_on_a_model_are_no_part_of_it(tmp_path) -> None:
    f = lf.Linearizer(lf.coupling_flow(4, 2, (8,)), lf.Dense(4))
    f.epoch, f.note, f.history = 3, "digits", [0.5, 0.25]
    lf.save(f, tmp_path / "f.safetensors")
    x = torch.randn(5, 4)
    assert torch.equal(lf.load(tmp_path / "f.safetensors")(x), f(x))


def _rewrite(path, change) -> None:
    """Change a saved file's tensors and header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["linfast"])
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata={"linfast": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, h: t.pop("weight"), "missing tensors.*weight"),
        (lambda t, h: t.update(other=torch.zeros(1)), "left over.*other"),
        (lambda t, h: t.update(weight=torch.zeros(3, 3)), r"weight is \(3, 3\), expected \(2, 2\)"),
        (lambda t, h: h["architecture"].update({"class": "os.system"}), "unknown class 'os.system'"),
        (lambda t, h: h.update(format="linfast-99"), "linfast-99"),
        (lambda t, h: h.pop("architecture"), "cannot be built.*architecture"),
        (lambda t, h: h.update(architecture=[1]), "cannot be built"),
        (lambda t, h: h["architecture"]["arguments"].update(bogus=1), "cannot be built.*bogus"),
        (lambda t, h: h["aliases"].update(weight="nowhere"), "cannot be built.*nowhere"),
        (lambda t, h: h.update(strides={"nowhere": [0]}), "cannot be built.*nowhere"),
        (lambda t, h: h.update(strides={"weight": [2]}), r"cannot be built.*\[2\] are no strides of weight"),
        (lambda t, h: h.update(strides={"weight": [1, 2, 0]}), r"cannot be built.*\[1, 2, 0\] are no strides"),
        (lambda t, h: h.update(strides={"weight": [1, -2]}), "cannot be built.*list of sizes"),
        (lambda t, h: h.update(format="linfast-1"), "not a linfast file of format 'linfast-2'.*linfast-1"),
        (lambda t, h: h.pop("frozen"), "cannot be built.*frozen"),
        (lambda t, h: h["architecture"]["arguments"].update(n_out={"run": "x"}), "unknown entry"),
    ],
)
def test_damaged_files_are_refused(change, match: str, tmp_path) -> None:
    path = tmp_path / "A.safetensors"
    lf.save(lf.Dense(2), path)
    _rewrite(path, change)
    with pytest.raises(ValueError, match=match):
        lf.load(path)


def test_files_that_are_not_ours(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        lf.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"a folder and no file \(from_pretrained reads"):
        lf.load(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        lf.load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="not a linfast file"):
        lf.load(tmp_path / "plain")
    save_file({"a": torch.zeros(1)}, tmp_path / "json", metadata={"linfast": "{"})
    with pytest.raises(ValueError, match="header is not JSON"):
        lf.load(tmp_path / "json")
    with pytest.raises(TypeError, match="model must be a Module; got dict"):
        lf.save({}, tmp_path / "dict")  # type: ignore[arg-type]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "A.safetensors"
    A = lf.Dense(2)
    lf.save(A, path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        lf.save(lf.Dense(2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_have_the_mode_of_any_new_file(umask: int, tmp_path) -> None:
    before = os.umask(umask)
    try:
        lf.save(lf.Dense(2), tmp_path / "A.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "A.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o664, 0o444])
def test_a_replaced_file_keeps_its_mode(mode: int, tmp_path) -> None:
    path = tmp_path / "A.safetensors"
    path.touch()
    path.chmod(mode)
    lf.save(lf.Dense(2), path)
    assert path.stat().st_mode & 0o777 == mode
    lf.load(path)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "A.safetensors", tmp_path / "real" / "A.safetensors"
    link.symlink_to(target)
    for n in (2, 3):
        lf.save(lf.Dense(n), link)
        assert link.is_symlink()
        assert lf.load(target).n_in == n
    assert list(target.parent.iterdir()) == [target]


def test_what_is_no_file_is_not_replaced(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder is not a file that could be replaced"):
        lf.save(lf.Dense(2), tmp_path / "folder")
    with pytest.raises(OSError, match="null is not a file"):
        lf.save(lf.Dense(2), "/dev/null")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        lf.save(lf.Dense(2), tmp_path / "none" / "A.safetensors")
    with pytest.raises(TypeError, match="path must be a str or a PathLike; got 3"):
        lf.save(lf.Dense(2), 3)  # type: ignore[arg-type]


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch) -> None:
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    lf.save(lf.Dense(2), tmp_path / "A.safetensors")
    assert calls[-2:] == ["fsync", "replace"]
