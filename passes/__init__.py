"""The pass library: one file, one pass. This table lists them, in the order in which a full recipe runs them."""

PASSES = {
    "smooth-quant": "passes.smooth_quant:SmoothQuant",
    "awq": "passes.awq:Awq",
    "split-outliers": "passes.split_outliers:SplitOutliers",
    "mixed-precision": "passes.mixed_precision:MixedPrecision",
    "gptq": "passes.gptq:Gptq",
    "quantize-weights": "passes.quantize_weights:QuantizeWeights",
    "hqq": "passes.hqq:Hqq",
    "nf4": "passes.nf4:Nf4",
    "fp8": "passes.fp8:Fp8",
    "quantize-activations": "passes.quantize_activations:QuantizeActivations",
    "fuse-attention": "passes.fuse_attention:FuseAttention",
    "quantize-kv-cache": "passes.quantize_kv_cache:QuantizeKvCache",
    "convert-float": "passes.convert_float:ConvertFloat",
    "lower-int8": "passes.lower_int8:LowerInt8",
    "lower-dynamic-int8": "passes.lower_dynamic_int8:LowerDynamicInt8",
    "lower-integer-chain": "passes.lower_integer_chain:LowerIntegerChain",
    "lower-fp8": "passes.lower_fp8:LowerFp8",
    "lower-weight-only": "passes.lower_weight_only:LowerWeightOnly",
    "lower-embedding": "passes.lower_embedding:LowerEmbedding",
    "lower-tensorrt": "passes.lower_tensorrt:LowerTensorrt",
}
