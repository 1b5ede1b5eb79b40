"""Mutants of sampling: integrators, the collapse, inversion, and streams that are resumed."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_LAWS = "tests/laws/test_propagator.py"
_SCHEMES = f"{_LAWS}::test_every_scheme_and_end_is_the_textbooks"
_ONE_STEP = f"{_LAWS}::test_one_step_is_every_step"
_MODELS = "tests/models/test_sampling.py"
_STREAM = "tests/models/test_sampling_stream.py"

MUTANTS = (
    Mutant(
        name="integrate: rk4 weighs its last stage like its middle ones",
        file="linfast/sampling/integrate.py",
        old="b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),",
        new="b=(1 / 6, 1 / 3, 1 / 6, 1 / 3),",
        breaks="Two of rk4's weights are swapped: still consistent, but of lower order.",
        tests=(_SCHEMES,),
    ),
    Mutant(
        name="integrate: rk4's outer weights have six digits",
        file="linfast/sampling/integrate.py",
        old="b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),",
        new="b=(0.166667, 1 / 3, 1 / 3, 0.166667),",
        breaks="A step is too long by a part in a million, in fp32 some ten roundings.",
        tests=(_SCHEMES,),
    ),
    Mutant(
        name="collapse: the product of two windows is transposed",
        file="linfast/sampling/factored.py",
        old="both = second @ (later @ earlier.mT).double() @ first",
        new="both = second @ (later @ earlier.mT).double().mT @ first",
        breaks="U^T V' stands for V'^T U between neighbours.",
        tests=(f"{_LAWS}::test_the_tree_is_the_steps_in_order",),
    ),
    Mutant(
        name="collapse: the small matrices are in single precision",
        file="linfast/sampling/factored.py",
        old="@ _windows(factors.U, factors, 0, 1, plan.count, factors.width).mT).double()",
        new="@ _windows(factors.U, factors, 0, 1, plan.count, factors.width).mT).float()",
        breaks="C is rounded to fp32 at every step and product.",
        tests=(_ONE_STEP, f"{_LAWS}::test_float32_products_keep_100_db"),
    ),
    Mutant(
        name="collapse: one column too few for the tolerance",
        file="linfast/sampling/factored.py",
        old="k = int((lost > allowed).sum())",
        new="k = max(0, int((lost > allowed).sum()) - 1)",
        breaks="The error of the recompressed operator exceeds the tolerance.",
        tests=(f"{_LAWS}::test_tol_is_kept_and_reported",),
    ),
    Mutant(
        name="sample: data are decoded on the noise's side",
        file="linfast/sampling/sampler.py",
        old="        y = f.gx_inverse(z)\n",
        new="        y = f.gy_inverse(z)\n",
        breaks="The steps' result goes through g_y^-1.",
        tests=(_MODELS,),
    ),
    Mutant(
        name="stream: the copy to the host does not wait for the samples",
        file="linfast/sampling/workers.py",
        old="self.copy.wait_stream(torch.cuda.current_stream(noise.device))",
        new="pass",
        breaks="A block is copied before it is computed.",
        tests=("tests/test_cuda_graph.py::test_samples_are_copied_after_they_are_computed_whatever_the_stream",),
    ),
    Mutant(
        name="stream: every block has the same noise",
        file="linfast/sampling/stream.py",
        old="np.random.SeedSequence([self.seed, index])",
        new="np.random.SeedSequence([self.seed])",
        breaks="The samples of one block repeat.",
        tests=(f"{_STREAM}::test_the_same_rows_for_every_batch_size_and_sink",),
    ),
    Mutant(
        name="stream: a resumed file starts a block late",
        file="linfast/sampling/workers.py",
        old="for first in range(-(-done // block), blocks, each * self.count):",
        new="for first in range(-(-done // block) + (done > 0), blocks, each * self.count):",
        breaks="The first block after an interruption stays zeros.",
        tests=(f"{_STREAM}::test_an_interrupted_file_is_gone_on_with",),
    ),
    Mutant(
        name="stream: a file of other weights is resumed",
        file="linfast/sampling/stream.py",
        old='found.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")',
        new="pass",
        breaks="One file contains the rows of two models.",
        tests=(f"{_STREAM}::test_a_file_of_another_run_is_refused",),
    ),
)
