"""All cases by name. Each module here lists its cases in ``CASES``; ``_MODULES`` names them too.

A module is imported when one of its cases is requested, so that ``--compare`` still runs the others on a commit
that lacks something that this module needs.
"""

import argparse
import importlib
from collections.abc import Iterator, Mapping

from ..harness import Case, Size

__all__ = ["CASES", "sizes", "words"]

_MODULES = {
    "ops": ("affine_coupling", "channel_mix", "coupling_mix", "low_rank", "latent_matmul"),
    "network_ops": ("coupling_stack", "masked_autoregressive", "rq_spline"),
    "image_ops": ("depthwise_conv", "group_norm_silu", "conv2d_fused"),
    "flows": ("coupling_flow", "peers", "libraries", "reversible"),
    "models": ("linearizer", "streams", "density", "residual_mlp"),
    "autoregressive": ("autoregressive",),
    "programs": ("programs",),
    "collapse": ("collapse",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


class _Cases(Mapping[str, Case]):
    def __getitem__(self, name: str) -> Case:
        cases: list[Case] = importlib.import_module(f"{__name__}.{_PLACES[name]}").CASES
        return next(case for case in cases if case.name == name)

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


CASES: Mapping[str, Case] = _Cases()


def sizes(case: Case, args: argparse.Namespace) -> list[Size]:
    """The sizes of the case that the command line selects; its batch sizes, if any, replace the case's own."""
    own = case.sizes[args.sizes]
    asked = own if args.batch is None else [{**size, "batch": batch} for size in own for batch in args.batch]
    named = [size for size in asked if args.only in words(size)]
    return list({tuple(size.items()): size for size in named}.values())


def words(size: Size) -> str:
    """The size's values on one line."""
    return " ".join(map(str, size.values()))
