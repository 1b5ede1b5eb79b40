"""Mutants of accelerate: what is recognised, the check before a swap, adapters, rebuilding and graphs."""

from __future__ import annotations

from .mutant import Mutant

__all__ = ["MUTANTS"]

_SWAP = "tests/accelerate/test_swap.py"
_LIBRARIES = "tests/accelerate/test_libraries.py"
_KEPT = f"{_LIBRARIES}::test_outputs_log_dets_inverses_and_gradients_are_kept"
_KERNELS = f"{_LIBRARIES}::test_the_kernels_give_the_same"
_WHOLE = "tests/accelerate/test_whole.py"
_INVERT = "tests/accelerate/test_invert.py"
_GRAPH = "tests/accelerate/test_graph.py"
_REFERENCE = "tests/accelerate/test_reference.py"

MUTANTS = (
    Mutant(
        name="verify: everything is accepted",
        file="linfast/accelerate/verify.py",
        old='        if not error <= allowed:\n            raise Unfit(f"it differs',
        new='        if False:\n            raise Unfit(f"it differs',
        breaks="A module is swapped for one that computes something else.",
        tests=(
            f"{_SWAP}::test_what_disagrees_with_the_original_stays_as_it_was",
            f"{_SWAP}::test_wrong_gradients_are_seen",
        ),
    ),
    Mutant(
        name="verify: a layer in one launch is accepted whatever it computes",
        file="linfast/accelerate/verify.py",
        old='    if not error <= allowed:\n        raise Unfit(f"the layer',
        new='    if False:\n        raise Unfit(f"the layer',
        breaks="Where kernels run, a wrong launch takes a module's place.",
        tests=(f"{_WHOLE}::test_the_check_sees_a_layer_that_is_wrong",),
    ),
    Mutant(
        name="verify: gradients are not compared",
        file="linfast/accelerate/verify.py",
        old="gradients = torch.autograd.grad(total, wanted, allow_unused=True) if differentiable else ()",
        new="gradients = ()",
        breaks="A module is swapped for one that trains otherwise.",
        tests=(f"{_SWAP}::test_wrong_gradients_are_seen",),
    ),
    Mutant(
        name="verify: the check runs on the module itself",
        file="linfast/accelerate/verify.py",
        old="return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)",
        new="return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)",
        breaks="What a copy does to its buffers in the check is done to the model's.",
        tests=(f"{_SWAP}::test_nothing_is_touched_by_the_check",),
    ),
    Mutant(
        name="identity: a patched method is not noticed",
        file="linfast/accelerate/identity.py",
        old="        if name in vars(instance):\n            return name\n",
        new="",
        breaks="A user's own forward on an instance is replaced.",
        tests=(f"{_SWAP}::test_a_patched_method_is_left_alone",),
    ),
    Mutant(
        name="swap: a hook put inside later is passed by",
        file="linfast/accelerate/swap.py",
        old="            if is_hooked(module):\n",
        new="            if False:\n",
        breaks="A hook on a conditioner's inner module no longer fires.",
        tests=(f"{_SWAP}::test_a_hook_put_there_later_fires_too",),
    ),
    Mutant(
        name="couple: an inverse moves its sides in the forward's order",
        file="linfast/accelerate/couple.py",
        old="order = (1, 0) if inverse else (0, 1)",
        new="order = (0, 1)",
        breaks="A two-sided coupling is undone first side first.",
        tests=(_KEPT,),
    ),
    Mutant(
        name="couple: a one-sided inverse's log_det has the forward's sign",
        file="linfast/accelerate/couple.py",
        old="return side.split.put(x, kept, out), -log_det() if inverse else log_det()",
        new="return side.split.put(x, kept, out), log_det()",
        breaks="The inverse adds what the forward added.",
        tests=(_KEPT,),
    ),
    Mutant(
        name="couple: the kernel undoes a reciprocal in the wrong order",
        file="linfast/accelerate/couple.py",
        old='order="shift_first" if undo else "scale_first",  # m / s + t undoes (m - t) s',
        new='order="scale_first",',
        breaks="With the kernels a Glow block's m / s + t scales its shift too.",
        tests=(_KERNELS,),
    ),
    Mutant(
        name="FrEIA: an arctan is taken with pi's digits and not the library's",
        file="linfast/accelerate/freia.py",
        old='ScaleMap("arctan", block.clamp * _ATAN * math.pi / 2)',
        new='ScaleMap("arctan", block.clamp)',
        breaks="The kernel's map differs from FrEIA's 0.636 by a part in a thousand.",
        tests=(_KERNELS,),
    ),
    Mutant(
        name="FrEIA: subnets one and two are exchanged",
        file="linfast/accelerate/freia.py",
        old='(("first", ("subnet2",)), ("second", ("subnet1",)))',
        new='(("first", ("subnet1",)), ("second", ("subnet2",)))',
        breaks="Each side of a GLOW block is moved by the other's network.",
        tests=(_KEPT,),
    ),
    Mutant(
        name="nflows: the scale lacks its floor",
        file="linfast/accelerate/nflows.py",
        old="return torch.sigmoid(raw + 2) + _FLOOR",
        new="return torch.sigmoid(raw + 2)",
        breaks="The plain form's scale is a thousandth short.",
        tests=(_KEPT,),
    ),
    Mutant(
        name="zuko: the default slope is another",
        file="linfast/accelerate/zuko.py",
        old="_SLOPE = 1e-3",
        new="_SLOPE = 1e-2",
        breaks="The log-scale's bound is ln 100 where zuko has ln 1000.",
        tests=(_KEPT,),
    ),
    Mutant(
        name="whole layer: two nets side by side share a block",
        file="linfast/accelerate/whole.py",
        old="weight = torch.block_diag(a, b) if layers else torch.cat((a, b))",
        new="weight = torch.cat((torch.cat((a, b), 1), torch.cat((a, b), 1))) if layers else torch.cat((a, b))",
        breaks="Each of two nets sees the other's hidden units.",
        tests=(_KERNELS,),
    ),
    Mutant(
        name="whole layer: the precision asked for is not heard",
        file="linfast/accelerate/whole.py",
        old="resolve_precision(like, None if plan is None else plan.options.precision)",
        new="resolve_precision(like, None)",
        breaks="accelerate(precision=...) changes nothing.",
        tests=(f"{_WHOLE}::test_the_precision_asked_for_reaches_the_launch",),
    ),
    Mutant(
        name="tail: an alternating split takes the wrong features",
        file="linfast/accelerate/tail.py",
        old="    one, two = x.unflatten(1, (-1, 2)).unbind(2)\n",
        new="    two, one = x.unflatten(1, (-1, 2)).unbind(2)\n",
        breaks="Features that stay are moved, and the other way round.",
        tests=(_KEPT,),
    ),
    Mutant(
        name="invert: a chain's inverse has its steps in the forward's order",
        file="linfast/accelerate/invert.py",
        old="steps[::-1] if inverse else steps",
        new="steps",
        breaks="A library's chain is undone first step first.",
        tests=(f"{_INVERT}::test_chains_give_what_they_gave",),
    ),
    Mutant(
        name="recall: the kept half's gradient through the conditioner is lost",
        file="linfast/accelerate/recall.py",
        old="return None, *ctx.recalling.gradients(*grads)",
        new="return None, None, *ctx.recalling.gradients(*grads)[1:]",
        breaks="dx lacks what comes through the conditioner in a rebuilt chain.",
        tests=(f"{_INVERT}::test_chains_give_what_they_gave",),
    ),
    Mutant(
        name="graph: the caller is given the graph's own output",
        file="linfast/accelerate/graph.py",
        old="return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.result)",
        new="return self.result",
        breaks="The next replay overwrites what the last call returned.",
        tests=(f"{_GRAPH}::test_outputs_are_the_callers",),
    ),
    Mutant(
        name="graph: replaced parameters are not noticed",
        file="linfast/accelerate/graph.py",
        old="if captured is None or captured.found != _lies(instance):",
        new="if captured is None:",
        breaks="A graph goes on reading a parameter that the model no longer has.",
        tests=(f"{_GRAPH}::test_weights_written_in_place_are_seen_and_replaced_ones_captured_anew",),
    ),
    Mutant(
        name="graph: a graph is captured inside a freeze with frozen weights",
        file="linfast/accelerate/graph.py",
        old="        stack.enter_context(thawed())\n",
        new="",
        breaks="The graph holds matrices that were derived before the weights changed.",
        tests=(f"{_GRAPH}::test_weights_written_in_place_are_seen_and_replaced_ones_captured_anew",),
    ),
    Mutant(
        name="constant_time: any expanded time counts as one number",
        file="linfast/accelerate/constant_time.py",
        old="if t.ndim != 1 or t.shape[0] < 2 or t.stride(0) != 0:",
        new="if t.ndim != 1 or t.shape[0] < 2:",
        breaks="A batch of different times is embedded as its first.",
        tests=(
            f"{_REFERENCE}::test_one_time_for_the_batch_is_embedded_once",
            f"{_REFERENCE}::test_unet_blocks_of_both_kinds",
        ),
    ),
)
