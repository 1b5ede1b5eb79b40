"""accelerate: makes existing models' modules run on linfast's ops, in place. docs/design.md describes the files."""

from . import reference_g, reference_linear, reference_unet
from .adapter import add
from .engine import DEFECTS, accelerate, restore
from .libraries import freia, glasflow, memcnn, nflows, normflows, zuko, zuko_masked
from .libraries.plain import register_adapter
from .mlp import MLP, find_mlp
from .report import Report, Row

for _library in (reference_g, reference_linear, reference_unet, freia, glasflow, memcnn, nflows, normflows, zuko):
    add(*_library.ADAPTERS)
add(*zuko_masked.ADAPTERS)

__all__ = ["DEFECTS", "MLP", "Report", "Row", "accelerate", "find_mlp", "register_adapter", "restore"]
