"""Named models. Each preset is a function that returns a ModelSpec and nothing more."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from contextlab.models.spec import LayerSpec, ModelSpec
from contextlab.registry import register


@register("model", "transformer", papers=("1706.03762", "2104.09864"))
def transformer(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, short_conv: NonNegativeInt = 0
) -> ModelSpec:
    """Softmax attention with rotary positions and a GELU MLP in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: attention heads.
    short_conv: width of the causal convolution over q, k and v (Primer, 2109.08668); 0 for none.
    """
    layer = LayerSpec(mixer="attention", options={"short_conv": short_conv} if short_conv else {})
    return ModelSpec(width=width, depth=depth, heads=heads, layers=(layer,))


@register("model", "linear_transformer", papers=("2006.16236",))
def linear_transformer(width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4) -> ModelSpec:
    """Normalised linear attention (elu + 1) and a GELU MLP in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: attention heads.
    """
    return ModelSpec(width=width, depth=depth, heads=heads, layers=(LayerSpec(mixer="linear_attention"),))


@register("model", "lightning", papers=("2401.04658", "2307.14995"))
def lightning(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, short_conv: NonNegativeInt = 4
) -> ModelSpec:
    """Lightning linear attention with a constant decay per head, and a SwiGLU MLP in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: attention heads.
    short_conv: width of the causal convolution before q, k and v; 0 for none, as in the paper.
    """
    layer = LayerSpec(mixer="lightning_attention", options={"short_conv": short_conv})
    return ModelSpec(width=width, depth=depth, heads=heads, layers=(layer,), mlp="swiglu")


@register("model", "retnet", papers=("2307.08621",))
def retnet(width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4) -> ModelSpec:
    """Multi-scale retention and a GELU MLP in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: retention heads.
    """
    return ModelSpec(width=width, depth=depth, heads=heads, layers=(LayerSpec(mixer="retention"),))


@register("model", "mamba2", papers=("2405.21060",))
def mamba2(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, short_conv: NonNegativeInt = 4
) -> ModelSpec:
    """Mamba-2 blocks only, without MLPs and without positions.

    width: size of a token's vector.
    depth: number of blocks.
    heads: SSM heads.
    short_conv: width of the causal convolution before the state; 0 for none.
    """
    return ModelSpec(
        width=width,
        depth=depth,
        heads=heads,
        layers=(LayerSpec(mixer="mamba2", options={"short_conv": short_conv}),),
        mlp="none",
        position="none",
    )


@register("model", "delta_net", papers=("2406.06484",))
def delta_net(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, short_conv: NonNegativeInt = 4
) -> ModelSpec:
    """Delta rule with a short convolution, and a SwiGLU MLP in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the delta rule.
    short_conv: width of the causal convolution before the state; 0 for none.
    """
    return ModelSpec(
        width=width,
        depth=depth,
        heads=heads,
        layers=(LayerSpec(mixer="delta_net", options={"short_conv": short_conv}),),
        mlp="swiglu",
        position="none",
    )


@register("model", "gated_delta_net", papers=("2412.06464",))
def gated_delta_net(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, short_conv: NonNegativeInt = 4
) -> ModelSpec:
    """Gated delta rule with a short convolution, and a SwiGLU MLP in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the delta rule.
    short_conv: width of the causal convolution before the state; 0 for none.
    """
    return ModelSpec(
        width=width,
        depth=depth,
        heads=heads,
        layers=(LayerSpec(mixer="gated_delta_net", options={"short_conv": short_conv}),),
        mlp="swiglu",
        position="none",
    )


@register("model", "mambaformer", papers=("2402.04248",))
def mambaformer(
    width: PositiveInt = 64, depth: PositiveInt = 5, heads: PositiveInt = 4, short_conv: NonNegativeInt = 4
) -> ModelSpec:
    """Mamba-2 and attention in turn, a Mamba block first in place of positions; no MLPs.

    The paper's block is attention followed by Mamba, after one initial Mamba: an odd depth 2 n + 1 gives n of them.

    width: size of a token's vector.
    depth: number of mixers, the first Mamba counted.
    heads: heads of both mixers.
    short_conv: width of the causal convolution in the Mamba blocks; 0 for none.
    """
    layers = (LayerSpec(mixer="mamba2", options={"short_conv": short_conv}), LayerSpec(mixer="attention"))
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp="none", position="none")


@register("model", "samba", papers=("2406.07522",))
def samba(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, window: PositiveInt = 64
) -> ModelSpec:
    """Mamba and sliding-window attention in turn, each followed by a SwiGLU MLP.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the attention.
    window: tokens that the attention sees, the current one counted.
    """
    layers = (
        LayerSpec(mixer="mamba"),
        LayerSpec(mixer="sliding_window", options={"window": window}),
    )
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp="swiglu")


@register("model", "mamba", papers=("2312.00752",))
def mamba(
    width: PositiveInt = 64, depth: PositiveInt = 4, state_size: PositiveInt = 16, short_conv: NonNegativeInt = 4
) -> ModelSpec:
    """A stack of Mamba blocks without MLPs.

    width: size of a token's vector.
    depth: number of blocks.
    state_size: values of the state in each channel.
    short_conv: width of the causal convolution before the scan; 0 for none.
    """
    layers = (LayerSpec(mixer="mamba", options={"state_size": state_size, "short_conv": short_conv}),)
    return ModelSpec(width=width, depth=depth, heads=1, layers=layers, mlp="none", position="none")


@register("model", "griffin", papers=("2402.19427",))
def griffin(
    width: PositiveInt = 64, depth: PositiveInt = 6, heads: PositiveInt = 4, window: PositiveInt = 64
) -> ModelSpec:
    """Two RG-LRU blocks, then one of multi-query sliding-window attention, again and again, each with a gated MLP.

    The paper's MLP is GELU-gated with three times the width; here it is SwiGLU.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the attention, and blocks of the recurrence's gates.
    window: tokens that the attention sees, the current one counted.
    """
    local = LayerSpec(mixer="sliding_window", options={"window": window, "kv_heads": 1})
    layers = (LayerSpec(mixer="rg_lru"), LayerSpec(mixer="rg_lru"), local)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp="swiglu", mlp_ratio=3.0)


@register("model", "gla", papers=("2312.06635",))
def gla(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, short_conv: NonNegativeInt = 0
) -> ModelSpec:
    """Gated linear attention with a SwiGLU MLP in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the linear attention.
    short_conv: width of the causal convolution before the state; 0 for none, as in the paper.
    """
    layers = (LayerSpec(mixer="gla", options={"short_conv": short_conv}),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp="swiglu", position="none")


@register("model", "hgrn2", papers=("2404.07904",))
def hgrn2(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, short_conv: NonNegativeInt = 0
) -> ModelSpec:
    """HGRN2 with a SwiGLU MLP in every block; the forget gates' lower bound grows with depth from 0 towards 1.

    The paper learns the bounds; here block l of L has l / L.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the recurrence.
    short_conv: width of the causal convolution before the state; 0 for none, as in the paper.
    """
    layers = tuple(
        LayerSpec(mixer="hgrn2", options={"lower_bound": block / depth, "short_conv": short_conv})
        for block in range(depth)
    )
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp="swiglu", position="none")


@register("model", "rwkv6", papers=("2404.05892",))
def rwkv6(width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4) -> ModelSpec:
    """RWKV-6's time mixing with a squared-ReLU MLP in every block; its channel mixing's token shift is left out.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the time mixing.
    """
    layers = (LayerSpec(mixer="rwkv6"),)
    return ModelSpec(
        width=width, depth=depth, heads=heads, layers=layers, mlp="relu2", mlp_ratio=3.5, norm="layer", position="none"
    )


@register("model", "xlstm", papers=("2503.13427",))
def xlstm(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, short_conv: NonNegativeInt = 0
) -> ModelSpec:
    """xLSTM 7B's block: mLSTM with a SwiGLU MLP.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the mLSTM.
    short_conv: width of the causal convolution before q and k; 0 for none, as in the paper.
    """
    layers = (LayerSpec(mixer="mlstm", options={"short_conv": short_conv}),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp="swiglu", position="none")


@register("model", "based", papers=("2402.18668",))
def based(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, window: PositiveInt = 64
) -> ModelSpec:
    """Taylor linear attention and sliding-window attention in turn, each with a SwiGLU MLP.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of both mixers; the state of the linear attention grows with the cube of a head's size.
    window: tokens that the attention sees, the current one counted.
    """
    layers = (
        LayerSpec(mixer="linear_attention", options={"feature_map": "taylor"}),
        LayerSpec(mixer="sliding_window", options={"window": window}),
    )
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp="swiglu")


@register("model", "looped_transformer", papers=("2311.12424",))
def looped_transformer(
    width: PositiveInt = 64, depth: PositiveInt = 1, heads: PositiveInt = 4, loops: PositiveInt = 12
) -> ModelSpec:
    """One small transformer applied again and again, with the embedded input added before each loop.

    width: size of a token's vector.
    depth: number of blocks in the loop.
    heads: attention heads.
    loops: times that the stack is applied.
    """
    return ModelSpec(width=width, depth=depth, heads=heads, layers=(LayerSpec(mixer="attention"),), loops=loops)


@register("model", "lstm", papers=("1409.2329",))
def lstm(width: PositiveInt = 64, depth: PositiveInt = 2) -> ModelSpec:
    """A stack of LSTM layers with residual connections and no MLPs: the old baseline.

    width: size of a token's vector.
    depth: number of layers.
    """
    return ModelSpec(width=width, depth=depth, heads=1, layers=(LayerSpec(mixer="lstm"),), mlp="none", position="none")
