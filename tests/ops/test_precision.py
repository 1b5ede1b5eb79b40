"""The precision mode that torch's settings select, and the path of each size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from linfast.kernels import coupling_stack_backward, stack_configs
from linfast.kernels.stack_configs import CONFIGS, MULTIPROCESSORS, entry_for, mode_on
from linfast.kernels.stack_spec import DIAGONAL

from linfast.precision import PRECISIONS, half_dtype, resolve_precision


@pytest.fixture(autouse=True)
def _torch_settings():
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # which the older interface writes to
    before = [setting.fp32_precision for setting in matmuls]
    yield
    torch.set_float32_matmul_precision("highest")
    for setting, value in zip(matmuls, before, strict=True):
        setting.fp32_precision = value


@pytest.mark.parametrize(("setting", "mode"), [("highest", "exact"), ("high", "tf32"), ("medium", "fast")])
def test_torchs_matmul_precision_chooses(setting: str, mode: str) -> None:
    torch.set_float32_matmul_precision(setting)
    assert resolve_precision(torch.zeros(1)) == mode
    assert resolve_precision(torch.zeros(1).double()) == "exact"
    assert resolve_precision(torch.zeros(1), "high") == "high"


def test_tf32_is_never_on_silently() -> None:
    assert resolve_precision(torch.zeros(1)) == "exact"
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert resolve_precision(torch.zeros(1)) == "high"
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_tf32 = False  # now torch's two interfaces disagree
    assert resolve_precision(torch.zeros(1)) == "exact"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_or_autocast_is_fast(dtype: torch.dtype) -> None:
    assert resolve_precision(torch.zeros(1, dtype=dtype)) == "fast"
    with torch.autocast("cpu", dtype):
        assert resolve_precision(torch.zeros(1)) == "fast"
        assert resolve_precision(torch.zeros(1), "exact") == "exact"
        assert half_dtype(torch.zeros(1)) == torch.float16  # the stand-in in the interpreter


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="precision must be one of exact, high, tf32, fast; got 'bf16'"):
        resolve_precision(torch.zeros(1), "bf16")


def test_compiled_code_follows_the_setting() -> None:
    def mode_as_number(x: torch.Tensor) -> torch.Tensor:
        return x + PRECISIONS.index(resolve_precision(x))

    compiled = torch.compile(mode_as_number, fullgraph=True, backend="eager")
    for setting in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(setting)
        assert torch.equal(compiled(torch.zeros(1)), mode_as_number(torch.zeros(1)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_one_launch_on_sm_90(precision: str) -> None:
    assert entry_for(64, 128, 3, precision, "sm_90") is not None
    assert entry_for(2, 8, 1, precision, "sm_90") is not None
    assert entry_for(63, 100, 2, precision, "sm_90", DIAGONAL) is not None
    wide = entry_for(128, 256, 3, precision, "sm_90") is not None
    assert wide == (precision in ("fast", "tf32"))
    both = entry_for(128, 256, 3, precision, "sm_90", linearizer=True) is not None
    assert both == (precision == "fast")  # in "tf32" two launches take less
    assert entry_for(130, 256, 3, precision, "sm_90") is None
    assert entry_for(1024, 1024, 3, precision, "sm_90") is None
    assert entry_for(64, 128, 3, precision, None) is None


def test_small_batches_get_tiles_of_fewer_rows() -> None:
    """The fewest rows that make at most one program per multiprocessor."""
    entry = entry_for(64, 128, 3, "fast", "sm_90", DIAGONAL, linearizer=True)
    assert entry is not None
    batches = (1, 2112, 2113, 8448, 8449, 1 << 22)
    assert [entry.config_of(batch, 132).rows for batch in batches] == [16, 16, 64, 64, 128, 128]
    for entries in CONFIGS.values():
        for entry in entries:
            rows = [config.rows for config in (*entry.smaller, entry.config)]
            assert rows == sorted(set(rows)), "fewest first, each another number"
            assert [entry.config_of(132 * most, 132).rows for most in rows] == rows
            assert entry.config_of(1 << 22, 132) == entry.config


_OUTSIDE_TESTS = {name: getattr(stack_configs, name) for name in ("_of_gpu", "_without_gpu")}


@pytest.mark.parametrize("module", [stack_configs, coupling_stack_backward])
def test_tiles_are_for_the_gpus_own_multiprocessors(module, monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 on PCIe has 114 and not 132; without a GPU the table says how many."""
    for name, function in _OUTSIDE_TESTS.items():  # in tests they return 1
        monkeypatch.setattr(stack_configs, name, function)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=114)
    )
    on_gpu = SimpleNamespace(device=torch.device("cuda:99"))
    assert module.multiprocessors(on_gpu) == 114
    monkeypatch.setattr(stack_configs, "_target", lambda kind, index: "sm_80")
    assert module.multiprocessors(torch.zeros(1)) == MULTIPROCESSORS["sm_80"]


def test_every_target_has_every_mode_it_can_run() -> None:
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for precision in PRECISIONS:
            assert entry_for(64, 128, 3, mode_on(target, precision), target, DIAGONAL) is not None
    assert mode_on("gfx942", "tf32") == "high"
    assert mode_on("sm_90", "tf32") == "tf32"
    assert ("gfx942", "tf32") not in CONFIGS
