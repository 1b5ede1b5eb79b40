"""Mutants of accelerate: recognition, the check before a swap, adapters, rebuilding and graphs."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_SWAP = "tests/accelerate/test_swap.py"
_LIBRARIES = "tests/accelerate/test_libraries.py"
_KEPT = f"{_LIBRARIES}::test_outputs_log_dets_inverses_and_gradients_are_kept"
_WHOLE = "tests/accelerate/test_whole.py"
_INVERT = "tests/accelerate/test_invert.py"
_VERIFY = "tests/accelerate/test_verify.py"
_CAPTURE = "tests/test_cuda_graph.py"

MUTANTS = (
    Mutant(
        name="verify: everything is accepted",
        file="linfast/accelerate/verify.py",
        old="if not error <= case.allowed and not _explained(errors, before, least, instance, adapter, case):",
        new="if False:",
        breaks="A module is swapped for one that computes something else.",
        tests=(
            f"{_SWAP}::test_what_disagrees_with_the_original_stays_as_it_was",
            f"{_SWAP}::test_wrong_gradients_are_seen",
        ),
    ),
    Mutant(
        name="verify: the original's own rounding explains anything",
        file="linfast/accelerate/verify.py",
        old="_OWN_ERROR, _AT_MOST = 4, 10",
        new="_OWN_ERROR, _AT_MOST = 4e9, 10",
        breaks="Differences of up to ten tolerances are accepted.",
        tests=(f"{_VERIFY}::test_what_the_rounding_of_the_original_does_not_explain_is_a_difference",),
    ),
    Mutant(
        name="verify: gradients are not compared",
        file="linfast/accelerate/verify.py",
        old="found = torch.autograd.grad(total, wanted, allow_unused=True)",
        new="pass",
        breaks="A module is swapped for one that trains differently.",
        tests=(f"{_SWAP}::test_wrong_gradients_are_seen",),
    ),
    Mutant(
        name="identity: a patched method is not noticed",
        file="linfast/accelerate/identity.py",
        old="name in vars(instance) or not is_own_method",
        new="not is_own_method",
        breaks="A user's own forward on an instance is replaced.",
        tests=(f"{_SWAP}::test_a_patched_method_is_left_alone",),
    ),
    Mutant(
        name="couple: an inverse moves its sides in the forward's order",
        file="linfast/accelerate/coupling.py",
        old="for member in reversed(members) if inverse else members:",
        new="for member in members:",
        breaks="A two-sided coupling is undone first side first.",
        tests=(_KEPT,),
    ),
    Mutant(
        name="launch: an inverse's log_det of the maps has the forward's sign",
        file="linfast/accelerate/launch.py",
        old="total = total - entry.log_det if inverse else total + entry.log_det",
        new="total = total + entry.log_det",
        breaks="The inverse adds what the forward added.",
        tests=("tests/accelerate/test_chain.py::test_it_is_one_launch_where_kernels_run",),
    ),
    Mutant(
        name="nflows: the scale lacks its floor",
        file="linfast/accelerate/libraries/nflows.py",
        old="return torch.sigmoid(raw + 2) + _FLOOR",
        new="return torch.sigmoid(raw + 2)",
        breaks="The plain form's scale is too small by 0.001.",
        tests=(_KEPT,),
    ),
    Mutant(
        name="whole layer: the precision asked for is not heard",
        file="linfast/accelerate/launch.py",
        old="mode, half = mode_on(target_of(x), resolve_precision(x, precision)), half_dtype(x)",
        new="mode, half = mode_on(target_of(x), resolve_precision(x, None)), half_dtype(x)",
        breaks="accelerate(precision=...) changes nothing.",
        tests=(f"{_WHOLE}::test_the_requested_precision_reaches_the_launch",),
    ),
    Mutant(
        name="invert: a chain's inverse has its steps in the forward's order",
        file="linfast/accelerate/chain.py",
        old="steps[::-1] if inverse else steps",
        new="steps",
        breaks="A library's chain is inverted starting with its first step.",
        tests=(f"{_INVERT}::test_chains_give_the_same_results",),
    ),
    Mutant(
        name="recall: the kept half's gradient through the conditioner is lost",
        file="linfast/accelerate/evaluate_once.py",
        old="return None, None, *found",
        new="return None, None, None, *found[1:]",
        breaks="dx lacks the gradient through the conditioner in a rebuilt chain.",
        tests=(f"{_INVERT}::test_chains_give_the_same_results",),
    ),
    Mutant(
        name="recall: a net's calls are recalled in the order they were made",
        file="linfast/accelerate/evaluate_once.py",
        old="        if len(fitting) > 1:",
        new="        if False:",
        breaks="A net that both sides of a coupling share gives each the other's parameters.",
        tests=("tests/accelerate/test_invert_changed.py::test_each_recalled_call_matches_its_arguments",),
    ),
    Mutant(
        name="graph: the caller is given the graph's own output",
        file="linfast/cuda_graph.py",
        old="result = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.result)",
        new="result = self.result",
        breaks="The next replay overwrites what the last call returned.",
        tests=(f"{_CAPTURE}::test_outputs_are_the_callers",),
    ),
    Mutant(
        name="graph: weights kept by a freeze around the capture are used",
        file="linfast/cuda_graph.py",
        old="thawed(), ",
        new="",
        breaks="The graph reads derived weights that the freeze frees.",
        tests=(f"{_CAPTURE}::test_a_timed_provider_keeps_what_it_reads",),
    ),
    Mutant(
        name="graph: autocast's casts of weights are used",
        file="linfast/cuda_graph.py",
        old="torch.set_autocast_cache_enabled(False)",
        new="pass",
        breaks="The graph reads casts that autocast frees.",
        tests=(f"{_CAPTURE}::test_a_timed_provider_keeps_what_it_reads",),
    ),
    Mutant(
        name="graph: weights that are replaced are not kept",
        file="linfast/cuda_graph.py",
        old="self._read = [tensor.detach() for tensor in read]",
        new="self._read = []",
        breaks="The graph reads a parameter that was freed.",
        tests=(f"{_CAPTURE}::test_a_stream_keeps_what_it_reads",),
    ),
    Mutant(
        name="graph: a call does not wait for one on another stream",
        file="linfast/cuda_graph.py",
        old="stream.wait_event(self._replayed)",
        new="pass",
        breaks="Two calls write to the same inputs at once.",
        tests=(f"{_CAPTURE}::test_calls_on_several_streams_follow_one_another",),
    ),
    Mutant(
        name="verify: the original may run the kernel under test",
        file="linfast/accelerate/verify.py",
        old="        with plain_torch():\n            before = _run(original, ",
        new="        if True:\n            before = _run(original, ",
        breaks="A wrong kernel is compared with itself.",
        tests=(f"{_VERIFY}::test_a_wrong_kernel_is_left_alone_where_the_original_runs_it_too",),
    ),
    Mutant(
        name="verify: torch's settings of products are not changed",
        file="linfast/accelerate/verify.py",
        old="@full_precision()\n",
        new="",
        breaks="tf32 convolutions differ by more than is allowed, and deep models are left alone.",
        tests=(f"{_VERIFY}::test_both_sides_are_compared_in_full_precision",),
    ),
)
