"""Styles: interpolated and composed operators, generated kernels, the loss, files, errors."""

from __future__ import annotations

import pytest
import torch
from linfast.examples import Trainer, TrainSettings

import linfast as lf
from linfast.training import GeneratedDepthwise, ModularStyle, StyleTransfer
from tests.laws.zoo import perturb

from .toys import style, styles


def _perturbed() -> ModularStyle:
    return perturb(styles())


def test_interpolation_is_of_operators_and_its_ends_are_the_styles() -> None:
    model, x = _perturbed(), torch.randn(2, 3, 8, 8)
    a, b = model.style("a"), model.style("b")
    assert torch.equal(model.interpolate("a", "b", 1.0)(x), a(x))
    assert torch.equal(model.interpolate("a", "b", 0.0)(x), b(x))
    weights = 0.3 * model.operator("a").weight + 0.7 * model.operator("b").weight
    expected = lf.Linearizer(model.g, lf.DepthwiseConv(3, 3, (8, 8), weights.detach()))(x)
    torch.testing.assert_close(model.interpolate("a", "b", 0.3)(x), expected)


def test_composition_is_one_style_after_another() -> None:
    operators = [
        lf.DepthwiseConv(3, 3, (8, 8)),
        lf.Diagonal.of(torch.rand(192)),
        lf.Dense.of(torch.randn(192, 192)),
    ]
    model = ModularStyle(perturb(lf.image_flow(3, 8, 2, 8)), operators, list("abc"))
    x = torch.randn(2, 3, 8, 8)
    in_turn = model.style("c")(model.style("a")(model.style("b")(x)))
    torch.testing.assert_close(model.compose("b", "a", "c")(x), in_turn, atol=1e-3, rtol=1e-3)
    assert torch.equal(model.compose("b")(x), model.style("b")(x))


def test_rows_are_decoded_by_their_style() -> None:
    model, x = _perturbed(), torch.randn(5, 3, 8, 8)
    index = torch.tensor([3, 0, 3, 1, 0])
    got = model.decode(model.g(x), index)
    for row, k in enumerate(index.tolist()):
        torch.testing.assert_close(got[row : row + 1], model.style("abcd"[k])(x[row : row + 1]))


def test_generated_kernels_start_near_the_identity_and_differ() -> None:
    bank = GeneratedDepthwise(3, 2, 4, (8, 8), 8, 8)
    kernels = torch.stack([bank[k].weight for k in range(3)])
    impulse = torch.zeros(2, 4, 4)
    impulse[:, 1, 1] = 1
    assert kernels.shape == (3, 2, 4, 4)
    assert float((kernels - impulse).detach().abs().max()) < 1
    assert not torch.equal(kernels[0], kernels[1])
    kernels.sum().backward()
    assert all(parameter.grad is not None for parameter in bank.parameters())
    with pytest.raises(IndexError, match="style 3 of 3"):
        bank[3]


def test_loss_is_the_mean_over_the_pairs_drawn() -> None:
    objective = style()
    perturb(objective.model)
    drawn = objective.draw(torch.Generator().manual_seed(0), 8)
    assert sorted(zip(drawn["style"].tolist(), drawn["content"].tolist(), strict=True)) == [
        (k, n) for k in range(4) for n in range(2)
    ]
    part = {name: value[:3] for name, value in drawn.items()}
    expected = torch.stack(
        [
            (objective.model.style("abcd"[k])(objective.contents[n : n + 1])[0] - objective.styled[k, n])
            .square()
            .mean()
            for k, n in zip(part["style"].tolist(), part["content"].tolist(), strict=True)
        ]
    ).mean()
    torch.testing.assert_close(objective(part)["style"], expected)


def test_any_operators_train() -> None:
    torch.manual_seed(0)
    operators = [lf.DepthwiseConv(3, 3, (8, 8)), lf.Diagonal(192)]
    model = ModularStyle(lf.image_flow(3, 8, 2, 8), operators, ["blur", "scale"])
    content = torch.randn(1, 3, 8, 8)
    objective = StyleTransfer(model, content, torch.stack((content * 0.5, -content)))
    trainer = Trainer(objective, TrainSettings(steps=80, batch=2, learning_rate=2e-2))
    trainer.run(progress=False)
    losses = trainer.history["style"]
    assert float(losses[-1]) < 0.2 * float(losses[0])


def test_files_hold_all_styles(tmp_path) -> None:
    for model in (_perturbed(), ModularStyle(lf.coupling_flow(4, 2, (8,)), [lf.Dense(4)], ["only"])):
        lf.save(model, tmp_path / "m.safetensors")
        loaded = lf.load(tmp_path / "m.safetensors")
        x = torch.randn(2, *model.g.shape)
        for name in model.names:
            assert torch.equal(loaded.style(name)(x), model.style(name)(x))


def test_mistakes_are_named() -> None:
    model = styles()
    with pytest.raises(ValueError, match="name: no style 'z'; there are a, b, c, d"):
        model.style("z")
    for names in (["a", "b"], list("abca")):
        with pytest.raises(ValueError, match="names must be 4 different ones"):
            ModularStyle(model.g, model.operators, names)
    with pytest.raises(ValueError, match=r"styled must be \[4, 2, 3, 8, 8\].*got \(3, 2, 3, 8, 8\)"):
        StyleTransfer(model, torch.zeros(2, 3, 8, 8), torch.zeros(3, 2, 3, 8, 8))
    with pytest.raises(ValueError, match="at most the 8 pairs"):
        style().draw(torch.Generator(), 9)
