"""tests.gpu.smoke accepts right kernels and rejects wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from linfast.bench.cases import CASES
from linfast.bench.gpu.stages import SMOKE_PARTS
from linfast.bench.harness import Verdict
from torch.utils._pytree import tree_map_only

from linfast.ops import register
from tests.gpu import smoke
from tests.machine_code.cases import all_cases
from tests.marks import long
from tests.ops.budget import DEVICE

WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "NaN": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    "a tenth off": lambda t: t * 1.1 if t.is_floating_point() else t,
}


def _verdicts(name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> list[str | None]:
    """The reasons why lines of this name that contain ``kind`` were rejected."""
    for what, call in smoke.lines(name):
        if kind in what:
            smoke.look(what, call)
    return [json.loads(line)["wrong"] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("op:low_rank", "fp32"),
        ("case:affine_coupling", "float32"),
        *long(("op:latent_matmul", "fp32"), ("op:coupling_stack", "exact"), ("case:linearizer", "exact")),
    ],
)
def test_kernels_are_right_and_wrong_ones_refused(name: str, kind: str, monkeypatch, capsys) -> None:
    right = _verdicts(name, kind, capsys)
    assert right
    assert set(right) == {None}
    launcher = register._launcher
    for wrong in WRONG.values():
        with monkeypatch.context() as patch:
            patch.setattr(register, "_launcher", _returning(launcher, wrong))
            refused = _verdicts(name, kind, capsys)
        assert len(refused) == len(right)
        assert all(reason is not None and reason.startswith("error ") for reason in refused)


def _returning(launcher: Callable, wrong: Callable) -> Callable:
    def launch_of(path: object) -> Callable:
        launch = launcher(path)
        return lambda *arguments: tree_map_only(torch.Tensor, wrong, launch(*arguments))

    return launch_of


def test_processes_share_the_lines_of_a_name(monkeypatch, capsys) -> None:
    made = [(f"line {i}", lambda: Verdict(0.0, 1.0, None)) for i in range(7)]
    monkeypatch.setattr(smoke, "lines", lambda name: iter(made))
    assert [smoke.main(["models", "--part", f"{i}/3"]) for i in range(3)] == [0, 0, 0]
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert sorted(json.loads(line)["smoke"] for line in out) == [name for name, _ in made]
    assert SMOKE_PARTS.keys() <= {*smoke.NAMES}


def test_a_kernel_that_raises_gets_a_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(register, "_launcher", lambda path: torch.zeros(1, device=DEVICE).tolist()[5])
    assert all(reason and "IndexError" in reason for reason in _verdicts("op:low_rank", "fp32", capsys))


def test_every_op_case_mode_and_direction_is_looked_at() -> None:
    names = [name for case in CASES.values() for name, _ in (smoke.timed(case) if _has_kernels(case.name) else [])]
    for words in (
        ("coupling_stack", "inverse", "high"),
        ("coupling_stack", "forward+backward", "tf32"),
        ("linearizer", "inverse", "fast"),
        ("coupling_flow", "training step", "exact"),
        ("affine_coupling", "inverse"),
        ("coupling_mix", "inverse"),
        ("density", "spline", "training step"),
        ("residual_mlp", "forward+backward", "fast"),
        ("conv2d_fused", "forward+backward", "high"),
    ):
        assert any(all(f" {word} " in f" {name} " for word in words) for name in names), words
    ops = [name for name in smoke.NAMES if name.startswith("op:")]
    assert len(ops) == len({case.op for case in all_cases()})  # which tests.machine_code compares with linfast.ops
    assert "models" in smoke.NAMES


def _has_kernels(name: str) -> bool:
    return f"case:{name}" in smoke.NAMES
