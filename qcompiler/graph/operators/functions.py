"""The rows of qcompiler's own functions, which `qcompiler.functions` writes in standard operators."""

from __future__ import annotations

from qcompiler.graph.operators.row import row

DOMAIN = "qcompiler"

FUNCTIONS = tuple(row(DOMAIN, *fields) for fields in (
    # weights
    ("DequantizeNF4", "codes:code scale:scale(codes)", "y", "decodes typed"),
    ("DequantizeFP4", "codes:code scale:scale(codes)", "y", "decodes typed"),
    ("DequantizeBinary", "bits:code scale:scale(bits)", "W", "decodes typed"),
    ("UnpackBinary", "bits:code", "codes:code"),

    # activations
    ("DynamicQuantizePerToken", "x~", "codes:code scale:scale(codes)", "quantizes"),
    ("DynamicQuantizeFloat8PerToken", "x~", "codes:code scale:scale(codes)", "quantizes"),
    ("DynamicQuantizeFloat8", "x~", "codes:code scale:scale(codes)", "quantizes"),
    ("DequantizePerToken", "codes:code scale:scale(codes)", "y", "decodes typed elementwise"),
    ("SplitOutlierColumns", "x~", "columns:index rest~"),

    # KV-caches
    ("QuantizeCache", "x~ scale~:scale(codes)", "codes:code", "quantizes cache elementwise"),
    ("DynamicQuantizeCache", "x~", "codes:code scale:scale(codes)", "quantizes cache"),
    ("DynamicQuantizeCacheOffset", "x~", "codes:code scale:scale(codes) offset:offset(codes)", "quantizes cache"),
    ("PackInt4", "codes:code", "packed:code", "cache"),
    ("UnpackInt4", "packed:code", "codes:code", "cache typed"),
    ("DequantizeCache", "codes~:code scale:scale(codes)", "x", "decodes cache typed elementwise"),
    ("DequantizeCacheOffset", "codes~:code scale:scale(codes) offset:offset(codes)", "x",
     "decodes cache typed elementwise"),
))  # fmt: skip
