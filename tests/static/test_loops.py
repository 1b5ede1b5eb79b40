"""Loops are found in machine code with their iterations, and counts are multiplied by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.static.loops import Loop, loop_of, loops, per_row_and_layer

_WAIT = "        /*0030*/                   DEPBAR.LE SB0, {} ;\n        /*0030*/                   LDGDEPBAR ;"
_PYTHON = """\
for layer in tl.range(0, n_layers, num_stages=2):
    for first in tl.range(0, HIDDEN, CHUNK):
        pass
    for half in tl.range(2):
        pass
"""
# As nvdisasm -c -g writes it: two loops in one, which is left by a call that does not return; and the endless loop
# that ends every kernel. Instructions with @!PT are issued and do nothing.
_SASS = """\
	//## File "{file}", line 1
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   MUFU.EX2 R3, R3 ;
	//## File "{file}", line 2
.L_x_2:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/                   LDSM.16.M88.4 R12, [R41+0x3400] ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/              @!P4 LDGSTS.E.BYPASS.128 [R24], desc[UR4][R152.64], !P5 ;
        /*0070*/              @!P5 BRA `(.L_x_2) ;
	//## File "{file}", line 4
.L_x_3:
        /*0080*/                   HGMMA.64x32x16.F32.BF16 R4, R8, gdesc[UR4], R4 ;
        /*0090*/              @!P5 BRA `(.L_x_3) ;
	//## File "{file}", line 1
        /*00a0*/                   STL [R1], R4 ;
        /*00b0*/              @!P4 CALL.REL.NOINC `(.L_x_9) ;
        /*00c0*/                   BRA `(.L_x_1) ;
.L_x_9:
        /*00d0*/                   EXIT ;
.L_x_10:
        /*00e0*/                   BRA `(.L_x_10);
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Loop:
    """A launch with four chunks."""
    file = tmp_path / "kernel.py"
    file.write_text(_PYTHON)
    return loops(_SASS.format(file=file), {"HIDDEN": 128, "CHUNK": 32})


def test_the_tree_is_that_of_the_python_loops(kernel: Loop) -> None:
    found = [(depth, loop.source[:14], loop.trips, loop.own["instructions"]) for depth, loop in kernel.walk()]
    assert found == [
        (0, "", 1, 4), (1, "for layer in t", None, 4), (2, "for first in t", 4, 5), (2, "for half in tl", 2, 2),
    ]  # fmt: skip


def test_an_iteration_counts_inner_loops_with_all_their_iterations(kernel: Loop) -> None:
    (layer,) = kernel.inner
    assert layer.total() == {
        "instructions": 4 + 4 * 5 + 2 * 2, "mufu": 1, "local": 1, "matrix": 4 + 2, "wgmma": 2, "shared": 4,
        "copies": 4, "products": 4 * 16 * 8 * 16 + 2 * 64 // 4 * 32 * 16, "bytes": 4 * 16, "shared_bytes": 4 * 16,
    }  # fmt: skip
    assert loop_of(layer.plain()) == layer


@pytest.mark.parametrize(("left", "beside"), [("0x0", 1), ("0x1", 1 + 7), ("0x2", 1 + 14)])
def test_copies_that_are_left_under_way_have_more_iterations(tmp_path: Path, left: str, beside: int) -> None:
    """The branch runs beside the copy, and so do the iterations whose group of copies the wait leaves."""
    sass = _SASS.replace(".L_x_2:", f".L_x_2:\n{_WAIT.format(left)}")
    layer = loops(sass.format(file=tmp_path / "none"), {}).inner[0]
    assert [loop.beside for loop in (layer, *layer.inner)] == [0, beside, 0]


def test_counts_per_row_and_layer(kernel: Loop) -> None:
    assert "instructions 3.5," in per_row_and_layer(kernel, {"ROWS": 64}, {"num_warps": 8})


def test_iterations_that_are_not_constant_are_not_guessed(kernel: Loop) -> None:
    with pytest.raises(ValueError, match="n_layers"):
        kernel.total()
