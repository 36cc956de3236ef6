"""The table of known ops: name of the op to its rule. What is not here freezes what it touches."""

from __future__ import annotations

from ockham.surgery import rules_layers as layers
from ockham.surgery import rules_pointwise as pointwise
from ockham.surgery import rules_product as products
from ockham.surgery import rules_recurrent as recurrent
from ockham.surgery import rules_shape as shapes
from ockham.surgery.walk import Rule

MOVEMENT = (
    "permute transpose t numpy_T movedim moveaxis swapaxes swapdims view reshape _unsafe_view view_as reshape_as "
    "flatten unflatten squeeze unsqueeze ravel select slice narrow split split_with_sizes chunk tensor_split unbind "
    "unsafe_split unsafe_chunk roll flip pixel_unshuffle unfold diagonal rot90 "
    "repeat_interleave"
).split()
POOLING = (
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d reflection_pad1d reflection_pad2d replication_pad1d "
    "replication_pad2d"
).split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(pointwise.KEEPS_ZERO | pointwise.LOSES_ZERO, pointwise.unary),
    **dict.fromkeys(pointwise.BINARY, pointwise.binary),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod"), pointwise.softmax),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod",
                     "argmax", "argmin", "any", "all", "max", "min"), pointwise.reduction),
    **dict.fromkeys(MOVEMENT, shapes.movement),
    **dict.fromkeys(("expand", "expand_as", "repeat", "broadcast_to", "tile"), shapes.expansion),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full"), shapes.factory),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), shapes.concatenation),
    **dict.fromkeys(("constant_pad_nd", "pad"), shapes.padding),
    **dict.fromkeys(("pixel_shuffle", "channel_shuffle"), shapes.shuffle),
    "index": shapes.indexing,
    "index_select": shapes.gathering,
    "linear": products.linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), products.matmul),
    **dict.fromkeys(("addmm", "baddbmm"), products.addmm),
    "einsum": products.einsum,
    "scaled_dot_product_attention": products.attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), layers.convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), layers.transposed),
    **dict.fromkeys(("batch_norm", "instance_norm"), layers.batch_norm),
    "group_norm": layers.group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), layers.layer_norm),
    "prelu": layers.prelu,
    "embedding": layers.embedding,
    "_weight_norm": layers.weight_norm,
    **dict.fromkeys(POOLING, layers.pooling),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent.recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell"), recurrent.cell),
    "glu": pointwise.gated,
}

ALWAYS = frozenset("expand expand_as zeros ones full new_zeros new_ones new_full embedding lstm gru rnn_tanh rnn_relu "
                   "lstm_cell gru_cell rnn_tanh_cell".split())
"""Ops whose rule is asked even when no input carries labels."""
