"""The rows of ONNX's own operators."""

from __future__ import annotations

from qcompiler.graph.operators.row import row

STANDARD = tuple(row("", *fields) for fields in (
    # moving data
    ("Cast", "input", "output", "moves whole ordered elementwise homogeneous"),
    ("Concat", "inputs:past * inputs", "concat_result:present(inputs)", "moves joins"),
    ("DepthToSpace", "input", "output", "moves whole homogeneous"),
    ("Expand", "input shape:setting", "output", "moves whole homogeneous"),
    ("Flatten", "input", "output", "moves whole ordered homogeneous propagates"),
    ("Gather", "data indices:index", "output", "moves picks homogeneous propagates"),
    ("GatherElements", "data indices:index", "output", "moves picks homogeneous"),
    ("GatherND", "data indices:index", "output", "moves picks homogeneous"),
    ("Identity", "input", "output", "moves whole ordered elementwise homogeneous propagates"),
    ("Reshape", "data shape:setting", "reshaped", "moves whole ordered homogeneous propagates"),
    ("ScatterElements", "data indices:index updates", "output", "joins"),
    ("ScatterND", "data indices:index updates", "output", "joins"),
    ("Slice", "data starts:setting ends:setting axes:setting steps:setting", "output", "moves homogeneous propagates"),
    ("SpaceToDepth", "input", "output", "moves whole homogeneous"),
    ("Split", "input split:setting", "outputs", "moves homogeneous"),
    ("Squeeze", "data axes:setting", "squeezed", "moves whole ordered homogeneous propagates"),
    ("TensorScatter", "past_cache:past update write_indices:index", "present_cache:present(past_cache)", "joins"),
    ("Tile", "input repeats:setting", "output", "moves whole homogeneous"),
    ("Transpose", "data", "transposed", "moves whole homogeneous propagates"),
    ("Trilu", "input k:setting", "output", "moves homogeneous"),
    ("Unsqueeze", "data axes:setting", "expanded", "moves whole ordered homogeneous propagates"),
    ("Shape", "data", "shape:setting", "measures"),
    ("Size", "data", "size:setting", "measures"),

    # numbers one by one
    ("Add", "A B", "C", "elementwise"),
    ("Div", "A B", "C", "elementwise homogeneous"),
    ("Mul", "A B", "C", "elementwise homogeneous bilinear"),
    ("Relu", "X", "Y", "elementwise homogeneous"),
    ("Sub", "A B", "C", "elementwise"),
    ("MaxPool", "X", "Y Indices:index", "homogeneous propagates"),

    # sums and other reductions
    ("CumSum", "x axis:setting", "y", "accumulates"),
    ("ReduceL1", "data axes:setting", "reduced", "reduction accumulates"),
    ("ReduceL2", "data axes:setting", "reduced", "reduction accumulates"),
    ("ReduceLogSum", "data axes:setting", "reduced", "reduction accumulates"),
    ("ReduceLogSumExp", "data axes:setting", "reduced", "reduction accumulates"),
    ("ReduceMax", "data axes:setting", "reduced", "reduction"),
    ("ReduceMean", "data axes:setting", "reduced", "reduction accumulates"),
    ("ReduceMin", "data axes:setting", "reduced", "reduction"),
    ("ReduceProd", "data axes:setting", "reduced", "reduction accumulates"),
    ("ReduceSum", "data axes:setting", "reduced", "reduction accumulates"),
    ("ReduceSumSquare", "data axes:setting", "reduced", "reduction accumulates"),

    # products, and what else has weights of its own
    ("MatMul", "A B:weight", "Y", "product bilinear"),
    ("Gemm", "A B:weight C:bias", "Y", "product"),
    ("Einsum", "* Inputs:weight", "Output", "product"),
    ("Conv", "X W:weight B:bias", "Y", "product convolution rows"),
    ("ConvTranspose", "X W:weight B:bias", "Y", "product convolution rows"),
    ("DeformConv", "X W:weight offset:setting B:bias mask:mask", "Y", "convolution rows"),
    ("RNN", "X W:weight R:weight B:bias sequence_lens:setting initial_h", "Y Y_h"),
    ("GRU", "X W:weight R:weight B:bias sequence_lens:setting initial_h", "Y Y_h"),
    ("LSTM", "X W:weight R:weight B:bias sequence_lens:setting initial_h initial_c P", "Y Y_h Y_c"),

    # norms and attention
    ("LayerNormalization", "X Scale:gain B:shift", "Y Mean:statistic InvStdDev:statistic", "norm"),
    ("RMSNormalization", "X scale:gain", "Y", "norm"),
    ("Attention", "Q:query K:key V:value attn_mask:mask past_key:past(K) past_value:past(V) nonpad_kv_seqlen:setting",
     "Y present_key:present(past_key) present_value:present(past_value) qk_matmul_output", "attention"),
    ("RotaryEmbedding", "X cos_cache:angle sin_cache:angle position_ids:index", "Y"),

    # codes
    ("QuantizeLinear", "x y_scale:scale(y) y_zero_point:zero(y)", "y:code", "quantizes elementwise"),
    ("DequantizeLinear", "x:code x_scale:scale(x) x_zero_point:zero(x)", "y", "decodes elementwise"),
    ("DynamicQuantizeLinear", "x", "y:code y_scale:scale(y) y_zero_point:zero(y)", "quantizes"),
    ("MatMulInteger", "A B:weight a_zero_point:zero(A) b_zero_point:zero(B)", "Y", "product"),
    ("ConvInteger", "x w:weight x_zero_point:zero(x) w_zero_point:zero(w)", "y", "product convolution rows"),
    ("QLinearMatMul", "a a_scale:scale(a) a_zero_point:zero(a) b:weight b_scale:scale(b) b_zero_point:zero(b)"
     " y_scale:scale(y) y_zero_point:zero(y)", "y", "product"),
    ("QLinearConv", "x x_scale:scale(x) x_zero_point:zero(x) w:weight w_scale:scale(w) w_zero_point:zero(w)"
     " y_scale:scale(y) y_zero_point:zero(y) B:bias", "y", "product convolution rows"),

    # numbers by chance
    ("Bernoulli", "input", "output", "random"),
    ("Multinomial", "input", "output", "random"),
    ("RandomNormal", "", "output", "random"),
    ("RandomNormalLike", "input", "output", "random"),
    ("RandomUniform", "", "output", "random"),
    ("RandomUniformLike", "input", "output", "random"),

    # ONNX Runtime writes this one in the standard domain
    ("SimplifiedLayerNormalization", "X scale:gain", "Y inv_std_var:statistic", "norm half"),
))  # fmt: skip
