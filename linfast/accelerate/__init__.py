"""accelerate: makes existing models' modules run on linfast's ops, in place. docs/design.md describes the files."""

from . import reference_g, reference_linear, reference_unet
from .adapter import add
from .engine import DEFECTS, accelerate, restore
from .libraries import freia, glasflow, memcnn, nflows, normflows, zuko, zuko_masked
from .libraries.plain import register_adapter
from .mlp import MLP, find_mlp
from .report import Report, Row
from .unknown import LAYERS

_REFERENCES = (reference_g, reference_linear, reference_unet)
for _library in (*_REFERENCES, freia, glasflow, memcnn, nflows, normflows, zuko, zuko_masked):
    add(*_library.ADAPTERS)
for _layers in (freia.LAYERS, glasflow.LAYERS, nflows.LAYERS, normflows.LAYERS, zuko.LAYERS):
    LAYERS[_layers.library] = _layers

__all__ = ["DEFECTS", "MLP", "Report", "Row", "accelerate", "find_mlp", "register_adapter", "restore"]
