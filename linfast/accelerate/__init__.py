"""accelerate: make the modules of existing models run on linfast's ops, in place.

    identity.py  who a module is, and whether anyone changed it       mlp.py     recognising MLPs
    adapter.py   what an adapter says; the list of them               tail.py    the affine tail
    swap.py      changing an object's class, and back                 plain.py   register_adapter
    verify.py    comparing with the original first                    report.py  the report
    run.py       accelerate and restore       invert.py  memory="invert", with recall.py
    graph.py     cuda_graph=True              constant_time.py  a time known for the whole batch

Every other file is one library: its formulas, how an instance is recognised, what runs instead.
"""

from . import (
    chains,
    freia,
    memcnn,
    nflows,
    normflows,
    reference,
    reference_g,
    reference_sampling,
    reference_song,
    reference_unet,
    zuko,
)
from .adapter import add
from .mlp import MLP, find_mlp
from .plain import register_adapter
from .report import Report, Row
from .run import DEFECTS, accelerate, restore

add(*reference.ADAPTERS, *reference_g.ADAPTERS, reference_sampling.ADAPTER)
add(*reference_unet.ADAPTERS, *reference_song.ADAPTERS)
add(normflows.ADAPTER, *nflows.ADAPTERS, *freia.ADAPTERS, zuko.ADAPTER, *memcnn.ADAPTERS)
add(*chains.ADAPTERS)

__all__ = ["DEFECTS", "MLP", "Report", "Row", "accelerate", "find_mlp", "register_adapter", "restore"]
