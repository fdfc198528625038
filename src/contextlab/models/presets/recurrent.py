"""Presets: recurrent, state space, test-time."""

from __future__ import annotations

from typing import Any

from contextlab.models.presets.row import COUNT, DEPTH, WIDTH, Option, Preset

Fields = dict[str, Any]


def _ttt(inner: str, **_: Any) -> Fields:
    return {"layers": [f"ttt_{inner}"], "mlp": "swiglu", "position": "none"}


def _titans(window: int, memory: str, **_: Any) -> Fields:
    local: Fields = {"mixer": "sliding_window", "options": {"window": window}}
    layers: dict[str, list[Any]] = {
        "context": [{"mixer": "titans_mac", "options": {"segment": window}}],
        "gate": [{"mixer": "parallel", "options": {"mixers": [local, "titans"], "combine": "gate"}}],
        "layer": ["titans", local],
    }
    return {"layers": layers[memory], "mlp": "swiglu"}


RECURRENT = (
    Preset(
        "atlas",
        "test-time",
        ("2505.23735",),
        "ATLAS with a SwiGLU MLP in every block: a memory that learns from a window of tokens by Muon's steps.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the memory."),
            "window": Option("tokens whose errors make one step."),
            "muon_steps": Option(
                "Newton-Schulz iterations of a step; 0 for plain gradients with momentum (OmegaNet).", 5, COUNT
            ),
        },
        {
            "layers": [{"mixer": "atlas", "options": {"window": "$window", "muon_steps": "$muon_steps"}}],
            "mlp": "swiglu",
            "position": "none",
        },
    ),
    Preset(
        "lstm",
        "recurrent",
        ("1409.2329",),
        "A stack of LSTM layers with residual connections and no MLPs: the old baseline.",
        {
            "width": WIDTH,
            "depth": Option("number of layers.", 2),
        },
        {"heads": 1, "layers": ["lstm"], "mlp": "none", "position": "none"},
    ),
    Preset(
        "mamba",
        "state space",
        ("2312.00752",),
        "A stack of Mamba blocks without MLPs.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "state_size": Option("values of the state in each channel.", 16),
            "short_conv": Option("width of the causal convolution before the scan; 0 for none.", 4, COUNT),
        },
        {
            "heads": 1,
            "layers": [{"mixer": "mamba", "options": {"state_size": "$state_size", "short_conv": "$short_conv"}}],
            "mlp": "none",
            "position": "none",
        },
    ),
    Preset(
        "mamba2",
        "state space",
        ("2405.21060",),
        "Mamba-2 blocks only, without MLPs and without positions.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("SSM heads."),
            "short_conv": Option("width of the causal convolution before the state; 0 for none.", 4, COUNT),
        },
        {"layers": [{"mixer": "mamba2", "options": {"short_conv": "$short_conv"}}], "mlp": "none", "position": "none"},
    ),
    Preset(
        "mamba3",
        "state space",
        ("2603.15569",),
        "Mamba-3 with a SwiGLU MLP in every block: trapezoidal writing, a state that turns, no convolution.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the state-space layer."),
            "state_size": Option("size of B and C.", 64),
        },
        {
            "layers": [{"mixer": "mamba3", "options": {"state_size": "$state_size"}}],
            "mlp": "swiglu",
            "position": "none",
        },
    ),
    Preset(
        "mesa_net",
        "test-time",
        ("2506.05233",),
        "MesaNet with a SwiGLU MLP in every block: each layer answers by ridge regression on what it has read.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the mesa layer."),
            "steps": Option("of conjugate gradients.", 30),
        },
        {"layers": [{"mixer": "mesa_net", "options": {"steps": "$steps"}}], "mlp": "swiglu", "position": "none"},
    ),
    Preset(
        "moe_mamba",
        "state space",
        ("2401.04081",),
        "MoE-Mamba: Mamba and a mixture of experts in turn, each token through one expert.",
        {
            "width": WIDTH,
            "depth": Option("number of blocks of both."),
            "experts": Option("experts of each mixture.", 8),
        },
        {
            "heads": 1,
            "layers": ["mamba"],
            "mlp": {"kind": "moe", "options": {"experts": "$experts"}},
            "position": "none",
        },
    ),
    Preset(
        "titans",
        "test-time",
        ("2501.00663",),
        "Titans: a neural memory as context of attention (MAC), beside it (MAG) or before it (MAL)."
        "\n\nOnly memory as context has the paper's persistent tokens.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of both mixers."),
            "window": Option(
                "tokens that the attention sees, the current one counted; of a segment, where the memory is context.",
                64,
            ),
            "memory": Option(
                "as context of the attention, as a gate of the attention in the same layer, "
                "or as a layer before each attention layer.",
                "gate",
                "Literal['context', 'gate', 'layer']",
            ),
        },
        _titans,
    ),
    Preset(
        "ttt",
        "test-time",
        ("2407.04620",),
        "Test-time training with a SwiGLU MLP in every block: "
        "each layer's state is a model that learns while it reads.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the mixer."),
            "inner": Option("the inner model.", "linear", "Literal['linear', 'mlp']"),
        },
        _ttt,
    ),
    Preset(
        "xlstm",
        "recurrent",
        ("2503.13427",),
        "xLSTM 7B's block: mLSTM with a SwiGLU MLP.",
        {
            "width": WIDTH,
            "depth": DEPTH,
            "heads": Option("heads of the mLSTM."),
            "short_conv": Option(
                "width of the causal convolution before q and k; 0 for none, as in the paper.", 0, COUNT
            ),
        },
        {"layers": [{"mixer": "mlstm", "options": {"short_conv": "$short_conv"}}], "mlp": "swiglu", "position": "none"},
    ),
    Preset(
        "xlstm_7_1",
        "recurrent",
        ("2405.04517",),
        "xLSTM[7:1]: seven mLSTM blocks to one of sLSTM, which alone has an MLP after it."
        "\n\nThe paper's mLSTM works inside an up-projection; here it is xLSTM 7B's, at the model's width.",
        {
            "width": WIDTH,
            "depth": Option("number of blocks; eight make one group.", 8),
            "heads": Option("heads of both mixers."),
        },
        {
            "layers": [
                {"mixer": "mlstm", "options": {"short_conv": 4}, "mlp": {"kind": "none"}},
                {"mixer": "slstm", "mlp": {"kind": "geglu"}},
                {"mixer": "mlstm", "options": {"short_conv": 4}, "mlp": {"kind": "none"}},
                {"mixer": "mlstm", "options": {"short_conv": 4}, "mlp": {"kind": "none"}},
                {"mixer": "mlstm", "options": {"short_conv": 4}, "mlp": {"kind": "none"}},
                {"mixer": "mlstm", "options": {"short_conv": 4}, "mlp": {"kind": "none"}},
                {"mixer": "mlstm", "options": {"short_conv": 4}, "mlp": {"kind": "none"}},
                {"mixer": "mlstm", "options": {"short_conv": 4}, "mlp": {"kind": "none"}},
            ],
            "mlp": "none",
            "position": "none",
        },
    ),
)
