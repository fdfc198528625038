"""Presets: linear, delta."""

from __future__ import annotations

from typing import Any

from contextlab.models.presets.row import COUNT, DEPTH, HEADS, WIDTH, Option, Preset

Fields = dict[str, Any]


def _hgrn2(depth: int, short_conv: int, **_: Any) -> Fields:
    layers = [
        {"mixer": "hgrn2", "options": {"lower_bound": block / depth, "short_conv": short_conv}}
        for block in range(depth)
    ]
    return {"layers": layers, "mlp": "swiglu", "position": "none"}


LINEAR = (
    Preset(
        "delta_net",
        "delta",
        ("2406.06484",),
        "Delta rule with a short convolution, and a SwiGLU MLP in every block.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the delta rule."),
            "short_conv": Option("width of the causal convolution before the state; 0 for none.", 4, COUNT),
        },
        {
            "layers": [{"mixer": "delta_net", "options": {"short_conv": "$short_conv"}}],
            "mlp": "swiglu",
            "position": "none",
        },
    ),
    Preset(
        "gated_delta_net",
        "delta",
        ("2412.06464",),
        "Gated delta rule with a short convolution, and a SwiGLU MLP in every block.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the delta rule."),
            "short_conv": Option("width of the causal convolution before the state; 0 for none.", 4, COUNT),
        },
        {
            "layers": [{"mixer": "gated_delta_net", "options": {"short_conv": "$short_conv"}}],
            "mlp": "swiglu",
            "position": "none",
        },
    ),
    Preset(
        "gla",
        "linear",
        ("2312.06635",),
        "Gated linear attention with a SwiGLU MLP in every block.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the linear attention."),
            "short_conv": Option(
                "width of the causal convolution before the state; 0 for none, as in the paper.", 0, COUNT
            ),
        },
        {"layers": [{"mixer": "gla", "options": {"short_conv": "$short_conv"}}], "mlp": "swiglu", "position": "none"},
    ),
    Preset(
        "hgrn2",
        "linear",
        ("2404.07904",),
        "HGRN2 with a SwiGLU MLP in every block; the forget gates' lower bound grows with depth from 0 towards 1."
        "\n\nThe paper learns the bounds; here block l of L has l / L.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the recurrence."),
            "short_conv": Option(
                "width of the causal convolution before the state; 0 for none, as in the paper.", 0, COUNT
            ),
        },
        _hgrn2,
    ),
    Preset(
        "lightning",
        "linear",
        ("2401.04658", "2307.14995", "2405.17381"),
        "Lightning linear attention with a constant decay per head, and a SwiGLU MLP in every block.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": HEADS,
            "short_conv": Option(
                "width of the causal convolution before q, k and v; 0 for none, as in the paper.", 4, COUNT
            ),
        },
        {"layers": [{"mixer": "lightning_attention", "options": {"short_conv": "$short_conv"}}], "mlp": "swiglu"},
    ),
    Preset(
        "linear_transformer",
        "linear",
        ("2006.16236",),
        "Normalised linear attention (elu + 1) and a GELU MLP in every block.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": HEADS,
        },
        {"layers": ["linear_attention"]},
    ),
    Preset(
        "log_linear",
        "linear",
        ("2506.04761",),
        "Log-linear attention with a SwiGLU MLP in every block: a state that grows with the logarithm of the length.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the attention."),
            "chunk": Option("tokens that are read by one quadratic form, a power of two.", 64),
        },
        {
            "layers": [{"mixer": "log_linear_attention", "options": {"chunk": "$chunk"}}],
            "mlp": "swiglu",
            "position": "none",
        },
    ),
    Preset(
        "retnet",
        "linear",
        ("2307.08621",),
        "Multi-scale retention and a GELU MLP in every block.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("retention heads."),
        },
        {"layers": ["retention"]},
    ),
    Preset(
        "rwkv6",
        "linear",
        ("2404.05892",),
        "RWKV-6's time mixing with a squared-ReLU MLP in every block; its channel mixing's token shift is left out.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the time mixing."),
        },
        {"layers": ["rwkv6"], "mlp": "relu2", "mlp_ratio": 3.5, "norm": "layer", "position": "none"},
    ),
    Preset(
        "rwkv7",
        "delta",
        ("2503.14456",),
        "RWKV-7's time mixing with a squared-ReLU MLP in every block."
        "\n\nThe token shift of the MLP and the mixing of the first layer's values into the others are left out.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the time mixing."),
        },
        {"layers": ["rwkv7"], "mlp": "relu2", "norm": "layer", "position": "none"},
    ),
)
