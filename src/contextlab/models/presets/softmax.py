"""Presets: softmax, segment, sparse, static."""

from __future__ import annotations

from typing import Any

from contextlab.models.presets.row import COUNT, DEPTH, HEADS, WIDTH, Option, Preset

Fields = dict[str, Any]


def _transformer(short_conv: int, **_: Any) -> Fields:
    return {"layers": [{"mixer": "attention", "options": {"short_conv": short_conv} if short_conv else {}}]}


def _cross_layer_attention(sharing: int, kv_heads: int | None, **_: Any) -> Fields:
    own = {"mixer": "attention", "options": {} if kv_heads is None else {"kv_heads": kv_heads}}
    return {"layers": [own, *[{"mixer": "attention", "kv": "shared"}] * (sharing - 1)]}


def _yoco(depth: int, window: int, **_: Any) -> Fields:
    local = {"mixer": "sliding_window", "options": {"window": window}}
    lower = depth // 2
    layers = [*[local] * lower, "attention", *[{"mixer": "attention", "kv": "shared"}] * depth]
    return {"layers": layers[:depth], "mlp": "swiglu"}


def _zebra(window: int, group: int, local: str, **_: Any) -> Fields:
    mixer, size = {"window": ("sliding_window", "window"), "blocks": ("block_local", "block")}[local]
    return {"layers": ["attention", *[{"mixer": mixer, "options": {size: window}}] * (group - 1)], "mlp": "swiglu"}


def _simplified_transformer(parallel: bool, **_: Any) -> Fields:
    block = "parallel" if parallel else "sequential"
    return {"layers": ["shaped_attention"], "residual": "none", "block": block}


LLAMA3 = {
    "tiny": (64, 4, 4, 1, 224, False),
    "1b": (2048, 16, 32, 8, 8192, True),
    "8b": (4096, 32, 32, 8, 14336, False),
}
"""size -> width, depth, heads, key heads, hidden width of the MLP, tied."""

QWEN3 = {
    "tiny": (64, 4, 4, 2, 16, 192, False),
    "0.6b": (1024, 28, 16, 8, 128, 3072, True),
    "4b": (2560, 36, 32, 8, 128, 9728, True),
    "8b": (4096, 36, 32, 8, 128, 12288, False),
}
"""size -> width, depth, heads, key heads, size of a head, hidden width of the MLP, tied."""


def _shape(width: int, depth: int, heads: int, hidden: int, tied: bool, options: Fields) -> Fields:
    return {
        "width": width,
        "depth": depth,
        "heads": heads,
        "layers": [{"mixer": "attention", "options": options}],
        "mlp": "swiglu",
        "mlp_ratio": hidden * 1.5 / width,
        "read_in": "token" if tied else "vector",
        "tied": tied,
    }


def _llama3(size: str) -> Fields:
    width, depth, heads, kv_heads, hidden, tied = LLAMA3[size]
    return _shape(width, depth, heads, hidden, tied, {"kv_heads": kv_heads, "rope_base": 500000.0})


def _qwen3(size: str) -> Fields:
    width, depth, heads, kv_heads, head_dim, hidden, tied = QWEN3[size]
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "qk_norm": True, "rope_base": 1000000.0}
    return _shape(width, depth, heads, hidden, tied, options)


def _moba(depth: int, block: int, top_k: int, **_: Any) -> Fields:
    sparse = {"mixer": "moba", "options": {"block": block, "top_k": top_k}}
    return {"layers": [*[sparse] * (depth - 1), "attention"]}


def _ngram_transformer(depth: int, largest: int, **_: Any) -> Fields:
    ngrams = [{"mixer": "ngram", "options": {"n": n}, "mlp": "none"} for n in range(1, largest + 1)]
    layers = ["attention", *ngrams, *["attention"] * max(1, depth - 1 - largest)]
    return {"depth": len(layers), "layers": layers, "read_in": "token"}


SOFTMAX = (
    Preset(
        "cross_layer_attention",
        "softmax",
        ("2405.12981",),
        "A transformer in which groups of neighbouring layers read one set of keys and values (CLA).",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": HEADS,
            "sharing": Option("layers in a group; 2 is the paper's CLA2, which halves the state.", 2),
            "kv_heads": Option("key and value heads, a divisor of heads; default heads.", None, "PositiveInt | None"),
        },
        _cross_layer_attention,
    ),
    Preset(
        "infini_transformer",
        "segment",
        ("2404.07143",),
        "A transformer with Infini-attention: attention within segments, and a memory of those before, in every block.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": HEADS,
            "segment": Option("tokens of a segment.", 64),
        },
        {"layers": [{"mixer": "infini_attention", "options": {"segment": "$segment"}}]},
    ),
    Preset(
        "llama3",
        "softmax",
        ("2407.21783",),
        "The shape of Llama 3: grouped-query attention, RoPE with a large base, SwiGLU, RMS norm.",
        {
            "size": Option(
                '"1b" and "8b" are those of Llama 3.2 1B and Llama 3 8B; "tiny" has their proportions at width 64.',
                "tiny",
                "Literal['tiny', '1b', '8b']",
            ),
        },
        _llama3,
    ),
    Preset(
        "looped_transformer",
        "softmax",
        ("2311.12424",),
        "One small transformer applied again and again, with the embedded input added before each loop.",
        {
            "width": WIDTH,
            "depth": Option("number of blocks in the loop.", 1),
            "heads": HEADS,
            "loops": Option("times that the stack is applied.", 12),
        },
        {"layers": ["attention"], "loops": "$loops"},
    ),
    Preset(
        "masa",
        "softmax",
        ("2508.04581",),
        "A transformer whose attention projections are sums of a few matrices that all layers share (MASA).",
        {
            "width": WIDTH,
            "depth": Option("number of blocks.", 6),
            "heads": HEADS,
            "atoms": Option(
                "shared matrices for each of Q, K, V and O; "
                "a third of the depth is the paper's 66.7% fewer parameters.",
                2,
            ),
        },
        {"atoms": "$atoms"},
    ),
    Preset(
        "moba",
        "sparse",
        ("2502.13189",),
        "A transformer whose queries read only the best blocks of what was read (MoBA), but for the last layer's.",
        {
            "width": WIDTH,
            "depth": Option("number of blocks; the last one attends to everything, as in the paper's hybrid."),
            "heads": HEADS,
            "block": Option("tokens of a block.", 64),
            "top_k": Option("blocks that a query reads.", 3),
        },
        _moba,
    ),
    Preset(
        "moeut",
        "softmax",
        ("2405.16039",),
        "MoEUT: a universal transformer, the same few layers again and again, with sigma-MoE feed-forward layers."
        "\n\nThe paper's attention has experts too; here it is plain. Its norms stand where `norm` puts them.",
        {
            "width": WIDTH,
            "group": Option("layers in the group that is repeated.", 2),
            "heads": HEADS,
            "loops": Option("times that the group is applied.", 2),
            "experts": Option("experts of each mixture.", 8),
            "top_k": Option("experts that each token goes through.", 2),
        },
        {
            "depth": "$group",
            "layers": ["attention"],
            "mlp": {
                "kind": "moe",
                "options": {
                    "experts": "$experts",
                    "top_k": "$top_k",
                    "router": "sigmoid",
                    "activation": "relu",
                    "balance": "entropy",
                    "ratio": 1.0,
                },
            },
            "loops": "$loops",
            "input_injection": False,
        },
    ),
    Preset(
        "ngram_transformer",
        "static",
        ("2401.12973",),
        "A transformer of tokens whose second and following layers are n-gram heads of order 1 to `largest`.",
        {
            "width": WIDTH,
            "depth": Option("number of blocks; those beyond the n-gram heads are attention."),
            "heads": HEADS,
            "largest": Option("order of the longest n-gram that is looked up.", 2),
        },
        _ngram_transformer,
    ),
    Preset(
        "qwen3",
        "softmax",
        ("2505.09388",),
        "The shape of Qwen3: grouped-query attention with normalised queries and keys, RoPE, SwiGLU, RMS norm.",
        {
            "size": Option(
                'of the dense models; "tiny" has their proportions at width 64.',
                "tiny",
                "Literal['tiny', '0.6b', '4b', '8b']",
            ),
        },
        _qwen3,
    ),
    Preset(
        "segment_memory",
        "segment",
        ("2502.06049", "2405.06067", "2401.03462", "2207.06881", "1901.02860"),
        "A transformer that reads segment by segment and hands a memory on: LM2, HMT, sentinels, RMT, Transformer-XL.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": HEADS,
            "segment": Option("tokens of a segment.", 64),
            "memory": Option(
                "the mixer that keeps it.",
                "lm2",
                "Literal['lm2', 'hierarchical_memory', 'sentinel', 'recurrent_memory', 'transformer_xl']",
            ),
        },
        {"layers": [{"mixer": "$memory", "options": {"segment": "$segment"}}]},
    ),
    Preset(
        "simplified_transformer",
        "softmax",
        ("2311.01906",),
        "Simplified transformer blocks (SAS, SAS-P): shaped attention, no values or projections, no skip connections.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the attention, a divisor of width."),
            "parallel": Option("run the MLP beside the attention (SAS-P) in place of after it.", True, "bool"),
        },
        _simplified_transformer,
    ),
    Preset(
        "transformer",
        "softmax",
        ("1706.03762", "2104.09864"),
        "Softmax attention with rotary positions and a GELU MLP in every block.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": HEADS,
            "short_conv": Option(
                "width of the causal convolution over q, k and v (Primer, 2109.08668); 0 for none.", 0, COUNT
            ),
        },
        _transformer,
    ),
    Preset(
        "yoco",
        "softmax",
        ("2405.05254",),
        "You only cache once: the lower half reads through a window, the upper half shares one set of keys and values."
        "\n\nThe keys are made from the input of the upper half's first layer, whose norm takes the place "
        "of the paper's own.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the attention."),
            "window": Option("tokens that the lower half sees, the current one counted.", 64),
        },
        _yoco,
    ),
    Preset(
        "zebra",
        "softmax",
        ("2312.08618",),
        "Grouped local-global attention: in each group of layers "
        "the first sees everything, the others a neighbourhood.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the attention."),
            "window": Option("tokens that the local layers see, the current one counted; or of a block.", 64),
            "group": Option("layers in a group."),
            "local": Option(
                "the last `window` tokens, or the block of `window` tokens and the one before it.",
                "window",
                "Literal['window', 'blocks']",
            ),
        },
        _zebra,
    ),
)
