"""Where each node of a model runs: predicted from a target's kernel tables, or measured where its provider starts."""

from qcompiler.placement.measure import measure
from qcompiler.placement.placed import Copy, Difference, PlacedNode, Placement, compare
from qcompiler.placement.predict import predict

__all__ = ["Copy", "Difference", "PlacedNode", "Placement", "compare", "measure", "predict"]
