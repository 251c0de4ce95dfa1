"""The pass library: one file, one pass. This table lists them, in the order in which a full recipe runs them."""

PASSES = {
    "smooth-quant": "passes.smooth_quant:SmoothQuant",
    "quantize-weights": "passes.quantize_weights:QuantizeWeights",
    "quantize-activations": "passes.quantize_activations:QuantizeActivations",
    "lower-int8": "passes.lower_int8:LowerInt8",
    "lower-weight-only": "passes.lower_weight_only:LowerWeightOnly",
}
