"""The keys of the metadata that qcompiler writes, each with who writes it, who reads it, and how long it lives.

Everything here is saved with the model. What one pass decides for a later one is no metadata: it travels in `Changes`.
"""

from __future__ import annotations

PREFIX = "qcompiler."

# ----------------------------------------------------------------------------------------------------------- of nodes

PROVENANCE = "qcompiler.provenance"
"""Which passes touched a node, comma separated, in order. Every pass, through `inherit`; read by diff and drawings."""
PART_OF = "qcompiler.part_of"
"""The name of the layer that a product belongs to. `split-outliers`; such a product is no layer of its own."""
BITS = "qcompiler.bits"
"""Of a DequantizeLinear whose codes have fewer bits than the type that stores them. Written with the codes."""
CACHE_SOURCE = "qcompiler.cache_source"
"""Of the quantizer of a cache: the input that the scales of a stored past are computed from. `quantize-kv-cache`."""

# ----------------------------------------------------------------------------------------------------------- of models

RECIPE = "qcompiler.recipe"
"""The resolved recipe in YAML. The driver; read by `debug` and `inspect`."""
TARGET = "qcompiler.target"
"""The name of the target. The driver; read by `placement`."""
SESSION_OPTIONS = "qcompiler.session_options"
"""A JSON object of session config entries ({"session.qdqisint8allowed": "1"}). The driver; for `load_session`."""
DISABLED_OPTIMIZERS = "qcompiler.disabled_optimizers"
"""A JSON list of names of graph transformers that must not run. The driver; for `load_session`."""
