"""Any traceable module as a graph of cells that can be cut into stages."""

from lamp3d.graph.arithmetic import DeferredWeights, arithmetic
from lamp3d.graph.buffers import preserved_buffers
from lamp3d.graph.cells import Cell, CellGraph, Edge, Stage, refuse_tied_parameters
from lamp3d.graph.shapes import SpecsOnDemand, ValueSpec, infer_specs, laid_out, lay_out_weights, module_device, spec_of
from lamp3d.graph.trace import trace

__all__ = [
    "Cell",
    "CellGraph",
    "DeferredWeights",
    "Edge",
    "SpecsOnDemand",
    "Stage",
    "ValueSpec",
    "arithmetic",
    "infer_specs",
    "laid_out",
    "lay_out_weights",
    "module_device",
    "preserved_buffers",
    "refuse_tied_parameters",
    "spec_of",
    "trace",
]
