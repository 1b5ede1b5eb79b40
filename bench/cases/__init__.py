"""Every case, one file each; a new one is named here and nowhere else.

A file ``NAME.py`` holds ``CASE = Case("NAME", build, sizes)``. It is imported when asked for,
so that ``--compare`` still runs the others on a commit that lacks what one case needs.
"""

import importlib
from collections.abc import Iterator, Mapping

from ..harness import Case

__all__ = ["CASES"]

_NAMES = (
    "affine_coupling",
    "channel_mix",
    "coupling_mix",
    "coupling_stack",
    "low_rank",
    "latent_matmul",
    "depthwise_conv",
    "group_norm_silu",
    "conv2d_fused",
    "coupling_flow",
    "linearizer",
    "collapse",
    "reversible",
)


class _Cases(Mapping[str, Case]):
    def __getitem__(self, name: str) -> Case:
        if name not in _NAMES:
            raise KeyError(name)
        case: Case = importlib.import_module(f"{__name__}.{name}").CASE
        return case

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


CASES: Mapping[str, Case] = _Cases()
