"""Presets: hybrid."""

from __future__ import annotations

from typing import Any

from contextlab.models.presets.row import COUNT, DEPTH, WIDTH, Option, Preset

Fields = dict[str, Any]


def _zamba(every: int, **_: Any) -> Fields:
    ssm = {"mixer": "mamba", "mlp": "none"}
    shared = {"mixer": "attention", "share": "global", "with_input": True}
    return {"layers": [*[ssm] * every, shared], "mlp": "geglu", "position": "none"}


def _hymba(depth: int, window: int, **_: Any) -> Fields:
    whole = (0, depth // 2, depth - 1)
    local = {"mixer": "sliding_window", "options": {"window": window}}
    layers = [
        {
            "mixer": "parallel",
            "options": {"mixers": ["attention" if i in whole else local, "mamba"]},
        }
        for i in range(depth)
    ]
    return {"layers": layers, "mlp": "swiglu"}


def _recurformer(width: int, heads: int, attention_heads: int, **_: Any) -> Fields:
    kept = {"mixer": "attention", "options": {"heads": attention_heads, "head_dim": max(1, width // heads)}}
    layer = {"mixer": "parallel", "options": {"mixers": [kept, "mamba"], "combine": "sum"}}
    return {"layers": [layer], "mlp": "swiglu"}


def _qwen3_next(width: int, heads: int, experts: int, **_: Any) -> Fields:
    size = max(2, width // heads)
    options = {"kv_heads": 1, "qk_norm": True, "output_gate": True, "rope_base": 1e7}
    options["rope_fraction"] = max(2, size // 8 * 2) / size
    delta = {"mixer": "gated_delta_net", "options": {"expand_v": 2}}
    return {
        "layers": [delta, delta, delta, {"mixer": "attention", "options": options}],
        "mlp": {"kind": "moe", "options": {"experts": experts, "top_k": 2, "shared": 1, "ratio": 1.0}},
    }


def _sse_hybrid(partitions: int, every: int, **_: Any) -> Fields:
    sse = {"mixer": "sse", "options": {"partitions": partitions}}
    return {"layers": [*[sse] * (every - 1), "attention"], "mlp": "swiglu"}


HYBRID = (
    Preset(
        "based",
        "hybrid",
        ("2402.18668",),
        "Taylor linear attention and sliding-window attention in turn, each with a SwiGLU MLP.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of both mixers."),
            "key_dim": Option(
                "size of a head's query and key in the linear attention, whose state grows with its square.", 16
            ),
            "window": Option("tokens that the attention sees, the current one counted.", 64),
        },
        {
            "layers": [
                {"mixer": "linear_attention", "options": {"feature_map": "taylor", "key_dim": "$key_dim"}},
                {"mixer": "sliding_window", "options": {"window": "$window"}},
            ],
            "mlp": "swiglu",
        },
    ),
    Preset(
        "griffin",
        "hybrid",
        ("2402.19427",),
        "Two RG-LRU blocks, then one of multi-query sliding-window attention, again and again, each with a gated MLP."
        "\n\nThe paper's MLP is GELU-gated with three times the width; here it is SwiGLU.",
        {
            "width": WIDTH,
            "depth": Option("number of blocks.", 6),
            "heads": Option("heads of the attention, and blocks of the recurrence's gates."),
            "window": Option("tokens that the attention sees, the current one counted.", 64),
        },
        {
            "layers": [
                "rg_lru",
                "rg_lru",
                {"mixer": "sliding_window", "options": {"window": "$window", "kv_heads": 1}},
            ],
            "mlp": "swiglu",
            "mlp_ratio": 3.0,
        },
    ),
    Preset(
        "hymba",
        "hybrid",
        ("2411.13676",),
        "Hymba: attention and Mamba side by side in every layer; "
        "the first, middle and last layers attend to everything."
        "\n\nThe paper's meta tokens and its sharing of keys between neighbours are left out.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the attention."),
            "window": Option("tokens that the other layers' attention sees, the current one counted.", 64),
        },
        _hymba,
    ),
    Preset(
        "jamba",
        "hybrid",
        ("2403.19887",),
        "Jamba: one attention layer to seven of Mamba, without positions, "
        "and a mixture of experts in every other block.",
        {
            "width": WIDTH,
            "depth": Option("number of blocks; eight make one Jamba block.", 8),
            "heads": Option("heads of the attention."),
            "experts": Option("experts of each mixture; each token goes through two.", 16),
        },
        {
            "layers": [
                {"mixer": "mamba", "mlp": {"kind": "swiglu"}},
                {"mixer": "mamba", "mlp": {"kind": "moe", "options": {"experts": "$experts", "top_k": 2}}},
                {"mixer": "mamba", "mlp": {"kind": "swiglu"}},
                {"mixer": "mamba", "mlp": {"kind": "moe", "options": {"experts": "$experts", "top_k": 2}}},
                {"mixer": "attention", "mlp": {"kind": "swiglu"}},
                {"mixer": "mamba", "mlp": {"kind": "moe", "options": {"experts": "$experts", "top_k": 2}}},
                {"mixer": "mamba", "mlp": {"kind": "swiglu"}},
                {"mixer": "mamba", "mlp": {"kind": "moe", "options": {"experts": "$experts", "top_k": 2}}},
            ],
            "position": "none",
        },
    ),
    Preset(
        "kimi_linear",
        "hybrid",
        ("2510.26692",),
        "Kimi Linear: three layers of Kimi delta attention to one of latent attention without positions."
        "\n\nThe paper's mixtures of experts are left out: every MLP is SwiGLU.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of both mixers."),
        },
        {
            "layers": ["kda", "kda", "kda", {"mixer": "mla", "options": {"rope_dim": 0}}],
            "mlp": "swiglu",
            "position": "none",
        },
    ),
    Preset(
        "mamba2_hybrid",
        "hybrid",
        ("2406.07887",),
        "Mamba-2-Hybrid: of the sublayers 43% are Mamba-2, 7% attention without positions and 50% MLPs.",
        {
            "width": WIDTH,
            "depth": Option("number of blocks of a mixer and an MLP; seven make the proportions exact.", 7),
            "heads": Option("heads of both mixers."),
            "short_conv": Option("width of the causal convolution in the Mamba blocks; 0 for none.", 4, COUNT),
        },
        {
            "layers": [
                {"mixer": "mamba2", "options": {"short_conv": "$short_conv"}},
                {"mixer": "mamba2", "options": {"short_conv": "$short_conv"}},
                {"mixer": "mamba2", "options": {"short_conv": "$short_conv"}},
                "attention",
                {"mixer": "mamba2", "options": {"short_conv": "$short_conv"}},
                {"mixer": "mamba2", "options": {"short_conv": "$short_conv"}},
                {"mixer": "mamba2", "options": {"short_conv": "$short_conv"}},
            ],
            "position": "none",
        },
    ),
    Preset(
        "mambaformer",
        "hybrid",
        ("2402.04248",),
        "Mamba-2 and attention in turn, a Mamba block first in place of positions; no MLPs."
        "\n\nThe paper's block is attention followed by Mamba, after one initial Mamba: an odd depth 2 n "
        "+ 1 gives n of them.",
        {
            "width": WIDTH,
            "depth": Option("number of mixers, the first Mamba counted.", 5),
            "heads": Option("heads of both mixers."),
            "short_conv": Option("width of the causal convolution in the Mamba blocks; 0 for none.", 4, COUNT),
        },
        {
            "layers": [{"mixer": "mamba2", "options": {"short_conv": "$short_conv"}}, "attention"],
            "mlp": "none",
            "position": "none",
        },
    ),
    Preset(
        "qwen3_next",
        "hybrid",
        ("2505.09388", "2412.06464"),
        "The shape of Qwen3-Next: three gated delta nets to one gated attention, and mixtures of many small experts."
        "\n\nThe attention has normalised queries and keys, turns a quarter of each head and gates its "
        "output; every token goes"
        " through two experts and a shared one. Qwen3-Next's delta nets have twice as many value heads as "
        "key heads; here the"
        " values are twice as large.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of both mixers."),
            "experts": Option("experts of each mixture.", 16),
        },
        _qwen3_next,
    ),
    Preset(
        "recurformer",
        "hybrid",
        ("2410.12850",),
        "RecurFormer: in every layer some attention heads are replaced by linear recurrent ones (Mamba)."
        "\n\nThe paper replaces heads of a trained model; here the model is trained so from the start.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads, as which the size of one is counted."),
            "attention_heads": Option("heads that stay attention.", 1),
        },
        _recurformer,
    ),
    Preset(
        "samba",
        "hybrid",
        ("2406.07522",),
        "Mamba and sliding-window attention in turn, each followed by a SwiGLU MLP.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the attention."),
            "window": Option("tokens that the attention sees, the current one counted.", 64),
        },
        {"layers": ["mamba", {"mixer": "sliding_window", "options": {"window": "$window"}}], "mlp": "swiglu"},
    ),
    Preset(
        "sse_hybrid",
        "hybrid",
        ("2507.16577",),
        "SSE-H: sparse state expansion, and softmax attention in the last of every few blocks.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of both mixers."),
            "partitions": Option("of the state."),
            "every": Option("blocks of which one is attention."),
        },
        _sse_hybrid,
    ),
    Preset(
        "zamba",
        "hybrid",
        ("2405.16712",),
        "Zamba: Mamba layers, and after every few of them one and the same block of attention and MLP."
        "\n\nThe shared block reads the embedded input beside the hidden vector. In the paper its answer "
        "is added to what the"
        " next Mamba layer reads; here it joins the residual stream.",
        {
            "width": WIDTH,
            "depth": Option("number of layers, the uses of the shared block counted.", 7),
            "heads": Option("heads of the attention, which works at twice the width."),
            "every": Option("Mamba layers before each use of the shared block.", 6),
        },
        _zamba,
    ),
)
