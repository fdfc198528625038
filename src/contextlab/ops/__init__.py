"""The mathematics: pure functions on tensors in the layout [batch, time, heads, dim]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contextlab.lazy import modules_on_demand
from contextlab.ops.atlas import atlas, naive_atlas
from contextlab.ops.backend import backends, choose, use_backend
from contextlab.ops.chunked_loss import chunked_cross_entropy, in_pieces
from contextlab.ops.contextual import cope_attention, naive_cope_attention
from contextlab.ops.convolution import causal_conv, naive_causal_conv
from contextlab.ops.delta import delta_rule, gated_delta_rule, naive_gated_delta_rule
from contextlab.ops.documents import by_document
from contextlab.ops.dplr import dplr_delta_rule, kda, naive_dplr_delta_rule, naive_kda
from contextlab.ops.gla import gla, naive_gla, naive_rwkv6, rwkv6
from contextlab.ops.linear import lightning_attention, linear_attention, naive_simple_gla, retention, simple_gla, ssd
from contextlab.ops.log_linear import fenwick_levels, log_linear_chunk, naive_log_linear_attention
from contextlab.ops.long_convolution import long_convolution, naive_long_convolution
from contextlab.ops.mamba3 import mamba3, naive_mamba3
from contextlab.ops.mesa import mesa, naive_mesa
from contextlab.ops.mlstm import mlstm, naive_mlstm
from contextlab.ops.native_sparse import naive_native_sparse_attention, native_sparse_attention
from contextlab.ops.neighbourhood import neighbourhood_attention
from contextlab.ops.position import (
    RopeScaling,
    alibi_slopes,
    halves_of_pairs,
    pairs_of_halves,
    rope,
    rope_frequencies,
    rope_table,
    rotary_size,
    rotate,
    sinusoidal,
)
from contextlab.ops.position_variants import xpos_attention
from contextlab.ops.scan import linear_scan, naive_linear_scan, naive_selective_scan, selective_scan
from contextlab.ops.slstm import slstm
from contextlab.ops.softmax import naive_softmax_attention, softmax_attention
from contextlab.ops.sparse import (
    block_topk,
    landmark_attention,
    naive_sparse_attention,
    routing_attention,
    topk_attention,
)
from contextlab.ops.titans import naive_titans, titans
from contextlab.ops.ttt import naive_ttt, ttt_linear, ttt_mlp
from contextlab.ops.window import window_attention
from contextlab.ops.window_linear import naive_window_linear_attention, window_linear_attention

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "RopeScaling",
    "alibi_slopes",
    "atlas",
    "backends",
    "block_topk",
    "by_document",
    "causal_conv",
    "choose",
    "chunked_cross_entropy",
    "cope_attention",
    "delta_rule",
    "dplr_delta_rule",
    "fenwick_levels",
    "gated_delta_rule",
    "gla",
    "halves_of_pairs",
    "in_pieces",
    "kda",
    "landmark_attention",
    "lightning_attention",
    "linear_attention",
    "linear_scan",
    "log_linear_chunk",
    "long_convolution",
    "mamba3",
    "mesa",
    "mlstm",
    "naive_atlas",
    "naive_causal_conv",
    "naive_cope_attention",
    "naive_dplr_delta_rule",
    "naive_gated_delta_rule",
    "naive_gla",
    "naive_kda",
    "naive_linear_scan",
    "naive_log_linear_attention",
    "naive_long_convolution",
    "naive_mamba3",
    "naive_mesa",
    "naive_mlstm",
    "naive_native_sparse_attention",
    "naive_rwkv6",
    "naive_selective_scan",
    "naive_simple_gla",
    "naive_softmax_attention",
    "naive_sparse_attention",
    "naive_titans",
    "naive_ttt",
    "naive_window_linear_attention",
    "native_sparse_attention",
    "neighbourhood_attention",
    "pairs_of_halves",
    "retention",
    "rope",
    "rope_frequencies",
    "rope_table",
    "rotary_size",
    "rotate",
    "routing_attention",
    "rwkv6",
    "selective_scan",
    "simple_gla",
    "sinusoidal",
    "slstm",
    "softmax_attention",
    "ssd",
    "titans",
    "topk_attention",
    "ttt_linear",
    "ttt_mlp",
    "use_backend",
    "window_attention",
    "window_linear_attention",
    "xpos_attention",
]
