"""Mutants of training without stored activations: inversion, replay, the drift guard, checkpoints and modes."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_LAWS = "tests/laws/test_reversible.py"
_OUTSIDE = "tests/laws/test_reversible_outside.py"
_MODELS = "tests/models/test_reversible_training.py"

MUTANTS = (
    Mutant(
        name="reversible: drift is never noticed",
        file="linfast/flows/undo.py",
        old="if chain.guard.strayed(rebuilt,",
        new="if False and chain.guard.strayed(rebuilt,",
        breaks="Gradients of inaccurate activations are returned without a warning.",
        tests=(f"{_MODELS}::test_the_guard_redoes_badly_scaled_stacks",),
    ),
    Mutant(
        name="reversible: a shared layer's earlier gradient is overwritten",
        file="linfast/flows/undo.py",
        old="self._sums[id(tensor)] = sum_of(self._sums.get(id(tensor)), grad)",
        new="self._sums[id(tensor)] = grad",
        breaks="Only one use of a layer that is used twice counts.",
        tests=(f"{_LAWS}::test_shared_layers_add_their_gradients",),
    ),
    Mutant(
        name="reversible: changed parameters are not noticed",
        file="linfast/flows/undo.py",
        old="        chain.check_parameters()\n",
        new="",
        breaks="A parameter that was replaced since the forward gets another one's gradient.",
        tests=(f"{_LAWS}::test_a_replaced_parameter_is_an_error",),
    ),
    Mutant(
        name="replay: random numbers are not those of the first run",
        file="linfast/flows/replay.py",
        old="self._random.append(None if after == self._before else self._before)",
        new="self._random.append(None)",
        breaks="Dropout's masks are drawn anew in the backward.",
        tests=(f"{_LAWS}::test_dropout_is_replayed_and_the_generator_left_alone",),
    ),
    Mutant(
        name="replay: autocast is not what it was",
        file="linfast/flows/replay.py",
        old="            stack.enter_context(self.autocast())\n            stack.enter_context(backend",
        new="            stack.enter_context(backend",
        breaks="A forward under autocast is inverted in fp32.",
        tests=(f"{_LAWS}::test_autocast_is_replayed",),
    ),
    Mutant(
        name="replay: buffers are as the first run left them",
        file="linfast/flows/replay.py",
        old="        put_back(self._held[i])\n",
        new="",
        breaks="Spectral norm's power iteration continues in the backward.",
        tests=(f"{_OUTSIDE}::test_what_is_written_and_rewritten_is_as_it_was",),
    ),
    Mutant(
        name="outside: leaves are not examined",
        file="linfast/flows/replay.py",
        old="if id(node.variable) not in known:",
        new="if False:",
        breaks="A learned prompt gets no gradient.",
        tests=(f"{_OUTSIDE}::test_auto_stores_what_reads_from_outside_and_says_so_once",),
    ),
    Mutant(
        name="outside: tensors computed before are not examined",
        file="linfast/flows/replay.py",
        old="elif _number(node) < since:",
        new="elif False:",
        breaks="A net's own parameters that it reads from outside are differentiated twice.",
        tests=(f"{_OUTSIDE}::test_auto_stores_what_reads_from_outside_and_says_so_once",),
    ),
    Mutant(
        name="reversible: the next step runs while the last one's graph is kept",
        file="linfast/flows/reversible.py",
        old="                del start, total, out, part  # and the step's graph with them\n",
        new="",
        breaks="The forward keeps two steps' activations.",
        tests=(f"{_OUTSIDE}::test_one_steps_graph_at_a_time_is_kept",),
    ),
    Mutant(
        name="memory: an inverse's steps are in the forward's order",
        file="linfast/flows/flow.py",
        old="reversible(steps[::-1] if inverse else steps, x",
        new="reversible(steps, x",
        breaks="The inverse of a flow in memory mode 'invert' starts with the first layer.",
        tests=(
            "tests/laws/test_reversible.py::test_actnorm_is_initialised_by_a_forward_and_never_by_a_replay",
            "tests/laws/test_reversible.py::test_gradients_are_those_of_the_stored_graph",
        ),
    ),
)
