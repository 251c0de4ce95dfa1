"""The rows of ONNX Runtime's own operators (domain com.microsoft)."""

from __future__ import annotations

from qcompiler.graph.operators.row import row

DOMAIN = "com.microsoft"
_PAST = "past_key:past(key) past_value:past(value)"
_PRESENT = "present_key:present(past_key) present_value:present(past_value)"
_ANGLES = "cos_cache:angle sin_cache:angle"
_POOLED = "X x_scale:scale(X) x_zero_point:zero(X) y_scale:scale(Y) y_zero_point:zero(Y)"
_BOTH = "A A_scale:scale(A) A_zero_point:zero(A) B B_scale:scale(B) B_zero_point:zero(B)"

RUNTIME = tuple(row(DOMAIN, *fields) for fields in (
    # floats
    ("BiasGelu", "A B:bias", "C", "half"),
    ("FastGelu", "X bias:bias", "Y", "half"),
    ("Gelu", "X", "Y", "half"),
    ("QuickGelu", "X", "Y", "half"),
    ("RotaryEmbedding", f"input position_ids:index {_ANGLES}", "output", "half"),
    ("FusedMatMul", "A B:weight", "Y", "product bilinear half"),
    ("FusedGemm", "A B:weight C:bias", "Y", "product"),
    ("FusedConv", "X W:weight B:bias Z", "Y", "product convolution rows"),
    ("MoE", "input router_probs fc1_experts_weights:weight fc1_experts_bias:bias fc2_experts_weights:weight"
     " fc2_experts_bias:bias fc3_experts_weights:weight fc3_experts_bias:bias", "output"),
    ("EmbedLayerNormalization", "input_ids:index segment_ids:index word_embedding:weight position_embedding:weight"
     " segment_embedding:weight gamma:gain beta:shift mask:mask position_ids:index", "output mask_index embedding_sum"),
    ("SimplifiedLayerNormalization", "X scale:gain", "Y inv_std_var:statistic", "norm half"),
    ("SkipLayerNormalization", "input skip gamma:gain beta:shift bias:bias",
     "output mean:statistic inv_std_var:statistic input_skip_bias_sum", "norm half"),
    ("SkipSimplifiedLayerNormalization", "input skip gamma:gain bias:bias",
     "output mean:statistic inv_std_var:statistic input_skip_bias_sum", "norm half"),

    # attention
    ("Attention", "input weights:weight bias:bias mask_index:mask past:past attention_bias:mask"
     " past_sequence_length:setting", "output present:present(past)", "attention half"),
    ("DecoderAttention", "query:query key:key q_weight:weight kv_weight:weight bias:bias key_padding_mask:mask"
     " key_cache:past(key) value_cache:past static_kv:setting use_past:setting has_layer_state:setting"
     " has_key_padding_mask:setting",
     "output new_key_cache:present(key_cache) new_value_cache:present(value_cache)", "attention"),
    ("DecoderMaskedMultiHeadAttention", f"query:query key:key value:value mask_index:mask attention_bias:mask {_PAST}"
     " past_sequence_length:setting beam_width:setting cache_indirection:index bias:bias", f"output {_PRESENT} qk",
     "attention"),
    ("DecoderMaskedSelfAttention", "input weights:weight bias:bias mask_index:mask past:past attention_bias:mask"
     " past_sequence_length:setting beam_width:setting cache_indirection:index", "output present:present(past)",
     "attention"),
    ("GroupQueryAttention", f"query:query key:key value:value {_PAST} seqlens_k:setting total_sequence_length:setting"
     f" {_ANGLES} position_ids:index attention_bias:mask head_sink k_scale:scale(past_key) v_scale:scale(past_value)"
     " q_norm_weight:gain k_norm_weight:gain", f"output {_PRESENT} output_qk", "attention half"),
    ("LongformerAttention", "input weight:weight bias:bias mask:mask global_weight:weight global_bias:bias global:mask",
     "output", "attention"),
    ("MultiHeadAttention", f"query:query key:key value:value bias:bias key_padding_mask:mask attention_bias:mask"
     f" {_PAST} past_sequence_length:setting cache_indirection:index", f"output {_PRESENT} qk", "attention half"),
    ("PackedAttention", "input weights:weight bias:bias token_offset:setting cumulative_sequence_length:setting"
     " attention_bias:mask", "output", "attention"),
    ("PackedMultiHeadAttention", "query:query key:key value:value bias:bias token_offset:setting"
     " cumulative_sequence_length:setting attention_bias:mask", "output", "attention"),
    ("PagedAttention", "query:query key:key value:value key_cache:past(key) value_cache:past(value)"
     f" cumulative_sequence_length:setting past_seqlens:setting block_table:index {_ANGLES} slot_mapping:index"
     " head_sink q_norm_weight:gain k_norm_weight:gain k_scale:scale(key_cache) v_scale:scale(value_cache)"
     " attention_metadata:setting",
     "output key_cache_out:present(key_cache) value_cache_out:present(value_cache)", "attention"),
    ("SparseAttention", f"query:query key:key value:value {_PAST} block_row_indices:index block_col_indices:index"
     f" total_sequence_length:setting key_total_sequence_lengths:setting {_ANGLES}", f"output {_PRESENT}", "attention"),

    # products by codes
    ("DynamicQuantizeMatMul", "A B:weight b_scale:scale(B) b_zero_point:zero(B) bias:bias", "Y", "product rounds"),
    ("GemmFloat8", "A B:weight C:bias scaleA:scale(A) scaleB:scale(B) scaleY:scale(Y)", "Y", "product"),
    ("MatMulBlockQuantizedFp4Weight", "A B:weight weight_scale:scale(B) weight_scale_2 input_scale bias:bias", "Y",
     "product rows opaque"),
    ("MatMulBlockQuantizedFp8Weight", "A B:weight b_scale:scale(B) a_scale bias:bias", "Y", "product rows"),
    ("MatMulBnb4", "A B:weight absmax:scale(B)", "Y", "product half"),
    ("MatMulIntegerToFloat", "A B:weight a_scale:scale(A) b_scale:scale(B) a_zero_point:zero(A) b_zero_point:zero(B)"
     " bias:bias", "Y", "product"),
    ("MatMulNBits", "A B:weight scales:scale(B) zero_points:zero(B) g_idx:index bias:bias", "Y",
     "product rows rounds half"),
    ("QGemm", "A a_scale:scale(A) a_zero_point:zero(A) B:weight b_scale:scale(B) b_zero_point:zero(B) C:bias"
     " y_scale:scale(Y) y_zero_point:zero(Y)", "Y", "product"),
    ("QLinearConv", "x x_scale:scale(x) x_zero_point:zero(x) w:weight w_scale:scale(w) w_zero_point:zero(w)"
     " y_scale:scale(y) y_zero_point:zero(y) B:bias", "y", "product convolution rows"),
    ("QOrderedMatMul", "A scale_A:scale(A) B:weight scale_B:scale(B) scale_Y:scale(Y) bias:bias C scale_C:scale(C)",
     "Y", "product opaque"),

    # other operators on codes
    ("QuantizeLinear", "x y_scale:scale(y) y_zero_point:zero(y)", "y:code", "quantizes elementwise"),
    ("DequantizeLinear", "x:code x_scale:scale(x) x_zero_point:zero(x)", "y", "decodes elementwise"),
    ("GatherBlockQuantized", "data:weight indices:index scales:scale(data) zero_points:zero(data)", "output",
     "picks half"),
    ("DynamicQuantizeLSTM", "X W:weight R:weight B:bias sequence_lens:setting initial_h initial_c P W_scale:scale(W)"
     " W_zero_point:zero(W) R_scale:scale(R) R_zero_point:zero(R)", "Y Y_h Y_c", "rounds"),
    ("QAttention", "input weight:weight bias:bias input_scale:scale(input) weight_scale:scale(weight) mask_index:mask"
     " input_zero_point:zero(input) weight_zero_point:zero(weight) past:past", "output present:present(past)",
     "attention"),
    ("QEmbedLayerNormalization", "input_ids:index segment_ids:index word_embedding_quant:weight"
     " position_embedding_quant:weight segment_embedding:weight gamma_quant:gain beta_quant:shift mask:mask"
     " word_embedding_scale:scale(word_embedding_quant) position_embedding_scale:scale(position_embedding_quant)"
     " segment_embedding_scale:scale(segment_embedding) gamma_scale:scale(gamma_quant) beta_scale:scale(beta_quant)"
     " word_embedding_zero_point:zero(word_embedding_quant)"
     " position_embedding_zero_point:zero(position_embedding_quant)"
     " segment_embedding_zero_point:zero(segment_embedding) gamma_zero_point:zero(gamma_quant)"
     " beta_zero_point:zero(beta_quant)", "layernorm_out mask_index_out", "opaque"),
    ("QLinearAdd", f"{_BOTH} C_scale:scale(C) C_zero_point:zero(C)", "C", "elementwise"),
    ("QLinearMul", f"{_BOTH} C_scale:scale(C) C_zero_point:zero(C)", "C", "elementwise"),
    ("QLinearAveragePool", _POOLED, "Y"),
    ("QLinearGlobalAveragePool", _POOLED, "Y"),
    ("QLinearConcat", "Y_scale:scale(Y) Y_zero_point:zero(Y) * input input_scale:scale(input)"
     " input_zero_point:zero(input)", "Y"),
    ("QLinearLeakyRelu", "X X_scale:scale(X) X_zero_point:zero(X) Y_scale:scale(Y) Y_zero_point:zero(Y)", "Y",
     "elementwise"),
    ("QLinearSigmoid", "X X_scale:scale(X) X_zero_point:zero(X) Y_scale:scale(Y) Y_zero_point:zero(Y)", "Y",
     "elementwise"),
    ("QLinearSoftmax", "X X_scale:scale(X) x_zero_point:zero(X) y_scale:scale(Y) y_zero_point:zero(Y)", "Y"),
    ("QLinearWhere", "condition:mask X x_scale:scale(X) x_zero_point:zero(X) Y y_scale:scale(Y) y_zero_point:zero(Y)"
     " z_scale:scale(Z) z_zero_point:zero(Z)", "Z", "elementwise"),
    ("QMoE", "input router_probs fc1_experts_weights:weight fc1_scales:scale(fc1_experts_weights) fc1_experts_bias:bias"
     " fc2_experts_weights:weight fc2_scales:scale(fc2_experts_weights) fc2_experts_bias:bias"
     " fc3_experts_weights:weight fc3_scales:scale(fc3_experts_weights) fc3_experts_bias:bias"
     " fc1_zero_points:zero(fc1_experts_weights) fc2_zero_points:zero(fc2_experts_weights)"
     " fc3_zero_points:zero(fc3_experts_weights) router_weights fc1_global_scale fc2_global_scale fc1_act_scale"
     " fc2_act_scale fc1_act_block_scale fc2_act_block_scale", "output", "opaque"),
    ("QOrderedAttention", "input scale_input:scale(input) scale_Q_gemm scale_K_gemm scale_V_gemm Q_weight:weight"
     " K_weight:weight V_weight:weight scale_Q_weight:scale(Q_weight) scale_K_weight:scale(K_weight)"
     " scale_V_weight:scale(V_weight) Q_bias:bias K_bias:bias V_bias:bias scale_QKT_gemm scale_QKT_softmax"
     " scale_values_gemm:scale(output) mask_index:mask past:past attention_bias:mask", "output", "attention opaque"),
    ("QOrderedGelu", "X scale_X:scale(X) scale_Y:scale(Y)", "Y", "elementwise opaque"),
    ("QOrderedLayerNormalization", "X scale_X:scale(X) scale:gain B:shift scale_Y:scale(Y)", "Y", "opaque"),
    ("QOrderedLongformerAttention", "input scale_input:scale(input) weight:weight scale_weight:scale(weight) bias:bias"
     " scale_bias:scale(bias) scale_qkv_gemm mask:mask global_weight:weight scale_global_weight:scale(global_weight)"
     " global_bias:bias scale_global_gemm global:mask scale_output:scale(output)", "output", "attention opaque"),
    ("QuantizeWithOrder", "input scale_input:scale(output)", "output:code", "quantizes opaque"),
    ("DequantizeWithOrder", "input:code scale_input:scale(input)", "output", "decodes opaque"),
))  # fmt: skip
