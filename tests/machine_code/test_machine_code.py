"""The runs on machine code leave nothing out, and fail where a kernel is wrong."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime import interpreter

import linfast as lf
from linfast import ops
from tests.machine_code import __main__ as command
from tests.machine_code.cases import all_cases
from tests.machine_code.check import outputs_and_gradients
from tests.machine_code.kernels import SOURCES, entry_kernels
from tests.machine_code.target import CAPABILITIES, ELEMENTS_ALONE, folder
from tests.machine_code.variants import DTYPES, Variant, in_short_run, uncovered, variants
from tests.ops.budget import COMPILED

ROOT = Path(__file__).parent.parent.parent

# The places where launchers query the GPU, which a CPU tensor lacks; all but the index's check and what
# StackPass.part_dtype is given are in as_on_gpu.
ASKS_FOR_A_GPU = {
    ("latent_matmul", "_check_index"), ("mlp", "activation_form"),
    ("coupling_stack_backward", "launch_coupling_stack_backward"),
    ("stack_backward_grid", "part_dtype"),
}  # fmt: skip


@pytest.mark.parametrize("smoke", [True, False])
def test_every_op_is_run(smoke: bool) -> None:
    assert not uncovered(all_cases(), smoke)


def test_an_op_without_a_case_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "new_op", lambda x: x, raising=False)
    monkeypatch.setattr(ops, "__all__", [*ops.__all__, "new_op"])
    assert uncovered(all_cases(), smoke=True) == ["new_op"]


def test_every_mode_direction_and_dtype_is_run() -> None:
    found = {(v.case.op, v.dtype, v.mode, v.direction) for v in variants(all_cases(), smoke=False)}
    assert {mode for op, _, mode, _ in found if op == "conv2d_fused"} == {"exact", "high", "tf32", "fast"}
    assert {direction for op, _, _, direction in found if op == "coupling_mix"} == {"forward", "inverse"}
    for op, _, mode, direction in found:
        assert {d for o, d, m, way in found if (o, m, way) == (op, mode, direction)} == set(DTYPES)


def test_the_short_run_has_each_pair_of_target_dtype_mode_and_direction() -> None:
    """Every variant runs on a target. Each pair that an op has on the whole, it has on the targets together."""
    whole = list(variants(all_cases(), smoke=True))
    runs = [(v, target) for v in whole for target in CAPABILITIES if in_short_run(v, target)]
    assert {v.name for v, _ in runs} == {v.name for v in whole}
    for i, j in itertools.combinations(range(4), 2):
        found, possible = (
            {(v.case.op, pair[i], pair[j]) for v, t in chosen for pair in [(t, v.dtype, v.mode, v.direction)]}
            for chosen in (runs, itertools.product(whole, CAPABILITIES))
        )
        assert found == possible


@pytest.mark.skipif(COMPILED, reason="records what the interpreter would launch")
def test_the_short_run_has_every_kernel_and_dtype_and_the_shipped_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are recorded and do not run. The tile is sm_90's of 128 rows whose layers are pipelined."""
    monkeypatch.setattr("linfast.kernels.latent_matmul.ELEMENTS_ALONE", ELEMENTS_ALONE)
    launched: dict[str, set[str]] = {}
    shipped: set[tuple[str, str]] = set()
    for variant in variants(all_cases(), smoke=True):

        def record(launch, *_: object, variant: Variant = variant, **constants: object) -> None:
            launched.setdefault(launch.fn.__name__, set()).add(variant.dtype)
            if constants.get("ROWS") == 128 and constants.get("LAYER_STAGES", 1) > 1:
                shipped.add((launch.fn.__name__, variant.mode))

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
        with lf.backend("triton"):
            outputs_and_gradients(variant)
    assert launched == {name: set(DTYPES) for name in entry_kernels()}
    stacks = ("_coupling_stack_kernel", "_linearizer_stack_kernel")
    assert shipped >= set(itertools.product(stacks, ("exact", "high", "fast")))


def test_launchers_ask_for_a_gpu_where_it_is_known() -> None:
    """Code that queries the GPU elsewhere would run on machine code as on a CPU, and not as on a GPU."""
    found = set()
    for path in SOURCES.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                attributes = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
                found |= {(path.stem, function.name)} if attributes & {"is_cuda", "on_gpu"} else set()
    assert found == ASKS_FOR_A_GPU


def test_without_the_emulator_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("LINFAST_PTX", str(tmp_path))
    assert command.main(["--smoke"]) == command.NOT_THERE
    assert "was not run" in capsys.readouterr().out


PLANTED = """
import sys
from tests.machine_code.target import emulator
emulator("launch")
from linfast.kernels.low_rank import _expand_kernel as kernel
from tests.machine_code.__main__ import parser, run_target
source, old, new = kernel.src, *sys.argv[1:]
assert source.count(old) == 1
kernel._unsafe_update_src(source.replace(old, new))
only = "low_rank (2, 300, 300, 8) shares nothing fp32"
sys.exit(run_target("sm_80", parser().parse_args(["--smoke", "--only", only])))
"""
_STORE = "y.to(y_ptr.dtype.element_ty), mask=inside)"


@pytest.mark.long
@pytest.mark.skipif(folder() is None, reason="../shared/tools/ptx is not there")
@pytest.mark.parametrize(
    ("new", "status", "said"),
    [
        (_STORE, 0, "0 failed"),
        (_STORE.replace("y.to", "(1.00001 * y).to"), 1, "FAIL"),
        ("y.to(y_ptr.dtype.element_ty))", 1, "out of bounds"),
    ],
)
def test_a_kernel_that_is_wrong_fails(new: str, status: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", PLANTED, _STORE, new], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stdout
