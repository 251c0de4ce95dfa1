"""Where each node of a model runs: predicted from a target's kernel tables, or measured where its provider starts."""

from qcompiler.placement.measure import measure
from qcompiler.placement.placed import Copy, PlacedNode, Placement, PlacementDifference, compare
from qcompiler.placement.predict import predict

__all__ = ["Copy", "PlacementDifference", "PlacedNode", "Placement", "compare", "measure", "predict"]
