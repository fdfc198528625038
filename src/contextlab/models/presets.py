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
    """Mamba-2 and sliding-window attention in turn, each followed by a SwiGLU MLP.

    The paper uses the first Mamba; here its successor stands in its place.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of both mixers.
    window: tokens that the attention sees, the current one counted.
    """
    layers = (
        LayerSpec(mixer="mamba2"),
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
