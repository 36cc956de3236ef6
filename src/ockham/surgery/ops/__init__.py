"""The table of known ops: name of the op to its rule. What is not here freezes what it touches."""

from __future__ import annotations

from ockham.surgery.labels import FACTORIES
from ockham.surgery.ops import layers, pointwise
from ockham.surgery.ops import shape as shapes
from ockham.surgery.walk import OperatorRule

MOVEMENT = {
    "permute", "transpose", "t", "numpy_T", "movedim", "moveaxis", "swapaxes", "swapdims", "view", "reshape",
    "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "select", "slice",
    "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk", "roll",
    "flip", "unfold", "diagonal", "rot90", "repeat_interleave", "mT", "mH", "adjoint",
}  # fmt: skip
POOLING = {
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "_adaptive_avg_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_linear1d", "upsample_trilinear3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "grid_sampler", "grid_sampler_2d",
}  # fmt: skip
MIXING = {
    "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "argsort",
    "topk", "cummax", "cummin", "tril", "triu", "kthvalue", "median",
}  # fmt: skip
REDUCTIONS = {
    "sum", "mean", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod", "argmax", "argmin",
    "any", "all", "max", "min", "frobenius_norm",
}  # fmt: skip

RULES: dict[str, OperatorRule] = {
    **dict.fromkeys(pointwise.KEEPS_ZERO | pointwise.LOSES_ZERO, pointwise.unary),
    **dict.fromkeys(pointwise.BINARY, pointwise.binary),
    **dict.fromkeys(MIXING, pointwise.mixing),
    **dict.fromkeys(REDUCTIONS, pointwise.reduction),
    **dict.fromkeys(MOVEMENT, shapes.movement),
    **dict.fromkeys(("expand", "expand_as", "repeat", "broadcast_to", "tile"), shapes.expansion),
    **dict.fromkeys(FACTORIES, shapes.factory),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), shapes.concatenation),
    **dict.fromkeys(("constant_pad_nd", "pad"), shapes.padding),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), shapes.shuffle),
    **dict.fromkeys(("index", "index_put"), shapes.indexing),
    **dict.fromkeys(("index_select", "gather"), shapes.gathering),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy"), shapes.scattering),
    "linear": pointwise.linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot"), pointwise.matmul),
    **dict.fromkeys(("addmm", "baddbmm"), pointwise.addmm),
    "einsum": pointwise.einsum,
    "tensordot": pointwise.tensordot,
    "bilinear": pointwise.bilinear,
    **dict.fromkeys(("cosine_similarity", "cdist"), pointwise.similarity),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), pointwise.grouped_product),
    "scaled_dot_product_attention": pointwise.attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), layers.convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), layers.transposed),
    **dict.fromkeys(("batch_norm", "instance_norm"), layers.batch_norm),
    **dict.fromkeys(("group_norm", "uneven_norm"), layers.group_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layers.layer_norm),
    "prelu": layers.prelu,
    **dict.fromkeys(("embedding", "embedding_bag"), layers.embedding),
    "_weight_norm": layers.weight_norm,
    **dict.fromkeys(("im2col", "col2im"), layers.patches),
    **dict.fromkeys(POOLING, layers.pooling),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), layers.recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell"), layers.cell),
    "glu": pointwise.gated,
}

ALWAYS = frozenset(
    {
        "expand", "expand_as", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "embedding",
        "embedding_bag", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    }
)  # fmt: skip
"""Ops whose rule is asked even when no input carries labels."""
