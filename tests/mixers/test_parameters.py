"""The parameters of each mixer's first case at width 48: another default of a projection, bias or gate shows here.

The figures are those of the code; what each is made of, the mixers' own tests say. Whoever changes one on purpose
changes it here, too.
"""

from __future__ import annotations

import pytest

import contextlab.mixers  # noqa: F401  it registers them
from contextlab import registry

COUNTS = {
    "atlas": 10020, "attention": 9216, "block_local": 9216, "carope_attention": 9412, "clex_attention": 9360,
    "complex_attention": 9264, "cope_attention": 9312, "core_context": 9216, "delta_net": 9996,
    "disentangled_attention": 12336, "encoder_attention": 9216, "encoder_linear_attention": 9216,
    "fan_attention": 10968, "fnet": 0,
    "forgetting_attention": 9412, "gali_attention": 9216, "gated_delta_net": 12500, "gated_window": 9216, "gla": 10404,
    "gru": 16416,
    "hgrn": 9264, "hgrn2": 9264, "hierarchical_memory": 16272, "hyena": 22304, "infini_attention": 9220,
    "kda": 12352, "landmark": 9220, "lawcat": 13344, "lightning_attention": 11568, "linear_attention": 9216,
    "linformer": 11456,
    "lizard": 10421, "lm2": 23808, "log_linear_attention": 15648, "lstm": 21120, "mamba": 16224, "mamba2": 15452,
    "mamba3": 15352,
    "merged_attention": 9216, "mesa_net": 10052, "min_gru": 6912, "min_lstm": 9216, "mla": 13008, "mlgru": 9216,
    "mlstm": 9656, "moba": 9216, "multi_scale_window": 9216, "neighbourhood_attention": 9216, "ngram": 4608,
    "nsa": 20208, "parallel": 30700, "performer": 9216, "ponet": 13824, "recurrent_memory": 11952,
    "retention": 18432, "rg_lru": 8448, "rodimus": 42400, "routing": 9360, "rwkv6": 21168, "rwkv7": 15984,
    "s4d": 7584, "sentinel": 18672, "shaped_attention": 4620, "sigmoid_window": 9216, "sliding_window": 9216,
    "slstm": 14304, "sse": 13308, "supra": 9312, "titans": 12696, "titans_mac": 24108,
    "token_shift": 2352, "topk_attention": 9216, "transformer_xl": 9216, "ttt_linear": 10188, "ttt_mlp": 14412,
    "window_linear": 10372,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_mixer_has_so_many_parameters(name: str) -> None:
    entry = registry.lookup("mixer", name)
    assert sum(p.numel() for p in entry.build(width=48, **entry.cases[0]).parameters()) == COUNTS[name]


def test_every_mixer_is_counted() -> None:
    assert set(COUNTS) == {entry.name for entry in registry.entries("mixer")}
