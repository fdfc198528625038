"""Named models. Each preset is a function that returns a ModelSpec and nothing more."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from contextlab.models.spec import LayerSpec, MlpSpec, ModelSpec
from contextlab.registry import register


@register("model", "transformer", family="softmax", papers=("1706.03762", "2104.09864"))
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


@register("model", "linear_transformer", family="linear", papers=("2006.16236",))
def linear_transformer(width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4) -> ModelSpec:
    """Normalised linear attention (elu + 1) and a GELU MLP in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: attention heads.
    """
    return ModelSpec(width=width, depth=depth, heads=heads, layers=(LayerSpec(mixer="linear_attention"),))


@register("model", "lightning", family="linear", papers=("2401.04658", "2307.14995"))
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
    return ModelSpec(width=width, depth=depth, heads=heads, layers=(layer,), mlp=MlpSpec(kind="swiglu"))


@register("model", "retnet", family="linear", papers=("2307.08621",))
def retnet(width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4) -> ModelSpec:
    """Multi-scale retention and a GELU MLP in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: retention heads.
    """
    return ModelSpec(width=width, depth=depth, heads=heads, layers=(LayerSpec(mixer="retention"),))


@register("model", "mamba2", family="state space", papers=("2405.21060",))
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
        mlp=MlpSpec(kind="none"),
        position="none",
    )


@register("model", "delta_net", family="delta", papers=("2406.06484",))
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
        mlp=MlpSpec(kind="swiglu"),
        position="none",
    )


@register("model", "gated_delta_net", family="delta", papers=("2412.06464",))
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
        mlp=MlpSpec(kind="swiglu"),
        position="none",
    )


@register("model", "mambaformer", family="hybrid", papers=("2402.04248",))
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
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="none"), position="none")


@register("model", "samba", family="hybrid", papers=("2406.07522",))
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
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"))


@register("model", "mamba", family="state space", papers=("2312.00752",))
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
    return ModelSpec(width=width, depth=depth, heads=1, layers=layers, mlp=MlpSpec(kind="none"), position="none")


@register("model", "griffin", family="hybrid", papers=("2402.19427",))
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
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), mlp_ratio=3.0)


@register("model", "gla", family="linear", papers=("2312.06635",))
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
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), position="none")


@register("model", "hgrn2", family="linear", papers=("2404.07904",))
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
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), position="none")


@register("model", "rwkv6", family="linear", papers=("2404.05892",))
def rwkv6(width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4) -> ModelSpec:
    """RWKV-6's time mixing with a squared-ReLU MLP in every block; its channel mixing's token shift is left out.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the time mixing.
    """
    layers = (LayerSpec(mixer="rwkv6"),)
    return ModelSpec(
        width=width,
        depth=depth,
        heads=heads,
        layers=layers,
        mlp=MlpSpec(kind="relu2"),
        mlp_ratio=3.5,
        norm="layer",
        position="none",
    )


@register("model", "xlstm", family="recurrent", papers=("2503.13427",))
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
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), position="none")


@register("model", "based", family="hybrid", papers=("2402.18668",))
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
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"))


@register("model", "looped_transformer", family="softmax", papers=("2311.12424",))
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


@register("model", "lstm", family="recurrent", papers=("1409.2329",))
def lstm(width: PositiveInt = 64, depth: PositiveInt = 2) -> ModelSpec:
    """A stack of LSTM layers with residual connections and no MLPs: the old baseline.

    width: size of a token's vector.
    depth: number of layers.
    """
    return ModelSpec(
        width=width, depth=depth, heads=1, layers=(LayerSpec(mixer="lstm"),), mlp=MlpSpec(kind="none"), position="none"
    )


@register("model", "cross_layer_attention", family="softmax", papers=("2405.12981",))
def cross_layer_attention(
    width: PositiveInt = 64,
    depth: PositiveInt = 4,
    heads: PositiveInt = 4,
    sharing: PositiveInt = 2,
    kv_heads: PositiveInt | None = None,
) -> ModelSpec:
    """A transformer in which groups of neighbouring layers read one set of keys and values (CLA).

    width: size of a token's vector.
    depth: number of blocks.
    heads: attention heads.
    sharing: layers in a group; 2 is the paper's CLA2, which halves the state.
    kv_heads: key and value heads, a divisor of heads; default heads.
    """
    own = LayerSpec(mixer="attention", options={} if kv_heads is None else {"kv_heads": kv_heads})
    layers = (own, *(LayerSpec(mixer="attention", kv="shared") for _ in range(sharing - 1)))
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers)


@register("model", "yoco", family="softmax", papers=("2405.05254",))
def yoco(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, window: PositiveInt = 64
) -> ModelSpec:
    """You only cache once: the lower half reads through a window, the upper half shares one set of keys and values.

    The keys are made from the input of the upper half's first layer, whose norm takes the place of the paper's own.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the attention.
    window: tokens that the lower half sees, the current one counted.
    """
    lower = depth // 2
    local = LayerSpec(mixer="sliding_window", options={"window": window})
    upper = (LayerSpec(mixer="attention"), *(LayerSpec(mixer="attention", kv="shared") for _ in range(depth)))
    layers = ((local,) * lower + upper)[:depth]
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"))


@register("model", "masa", family="softmax", papers=("2508.04581",))
def masa(width: PositiveInt = 64, depth: PositiveInt = 6, heads: PositiveInt = 4, atoms: PositiveInt = 2) -> ModelSpec:
    """A transformer whose attention projections are sums of a few matrices that all layers share (MASA).

    width: size of a token's vector.
    depth: number of blocks.
    heads: attention heads.
    atoms: shared matrices for each of Q, K, V and O; a third of the depth is the paper's 66.7% fewer parameters.
    """
    return ModelSpec(width=width, depth=depth, heads=heads, atoms=atoms)


@register("model", "zebra", family="softmax", papers=("2312.08618",))
def zebra(
    width: PositiveInt = 64,
    depth: PositiveInt = 4,
    heads: PositiveInt = 4,
    window: PositiveInt = 64,
    group: PositiveInt = 4,
    local: Literal["window", "blocks"] = "window",
) -> ModelSpec:
    """Grouped local-global attention: in each group of layers the first sees everything, the others a neighbourhood.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the attention.
    window: tokens that the local layers see, the current one counted; or of a block.
    group: layers in a group.
    local: the last `window` tokens, or the block of `window` tokens and the one before it.
    """
    near = {"window": ("sliding_window", "window"), "blocks": ("block_local", "block")}[local]
    local_layer = LayerSpec(mixer=near[0], options={near[1]: window})
    layers = (LayerSpec(mixer="attention"), *(local_layer for _ in range(group - 1)))
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"))


@register("model", "mamba2_hybrid", family="hybrid", papers=("2406.07887",))
def mamba2_hybrid(
    width: PositiveInt = 64, depth: PositiveInt = 7, heads: PositiveInt = 4, short_conv: NonNegativeInt = 4
) -> ModelSpec:
    """Mamba-2-Hybrid: of the sublayers 43% are Mamba-2, 7% attention without positions and 50% MLPs.

    width: size of a token's vector.
    depth: number of blocks of a mixer and an MLP; seven make the proportions exact.
    heads: heads of both mixers.
    short_conv: width of the causal convolution in the Mamba blocks; 0 for none.
    """
    ssm = LayerSpec(mixer="mamba2", options={"short_conv": short_conv})
    layers = (ssm, ssm, ssm, LayerSpec(mixer="attention"), ssm, ssm, ssm)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, position="none")


@register("model", "moe_mamba", family="state space", papers=("2401.04081",))
def moe_mamba(width: PositiveInt = 64, depth: PositiveInt = 4, experts: PositiveInt = 8) -> ModelSpec:
    """MoE-Mamba: Mamba and a mixture of experts in turn, each token through one expert.

    width: size of a token's vector.
    depth: number of blocks of both.
    experts: experts of each mixture.
    """
    mlp = MlpSpec(kind="moe", options={"experts": experts})
    return ModelSpec(width=width, depth=depth, heads=1, layers=(LayerSpec(mixer="mamba"),), mlp=mlp, position="none")


@register("model", "jamba", family="hybrid", papers=("2403.19887",))
def jamba(
    width: PositiveInt = 64, depth: PositiveInt = 8, heads: PositiveInt = 4, experts: PositiveInt = 16
) -> ModelSpec:
    """Jamba: one attention layer to seven of Mamba, without positions, and a mixture of experts in every other block.

    width: size of a token's vector.
    depth: number of blocks; eight make one Jamba block.
    heads: heads of the attention.
    experts: experts of each mixture; each token goes through two.
    """
    dense, mixture = (MlpSpec(kind="swiglu"), MlpSpec(kind="moe", options={"experts": experts, "top_k": 2}))
    layers = tuple(
        LayerSpec(mixer="attention" if i == 4 else "mamba", mlp=mixture if i % 2 else dense) for i in range(8)
    )
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, position="none")


@register("model", "zamba", family="hybrid", papers=("2405.16712",))
def zamba(width: PositiveInt = 64, depth: PositiveInt = 7, heads: PositiveInt = 4, every: PositiveInt = 6) -> ModelSpec:
    """Zamba: Mamba layers, and after every few of them one and the same block of attention and MLP.

    The shared block reads the embedded input beside the hidden vector. In the paper its answer is added to what the
    next Mamba layer reads; here it joins the residual stream.

    width: size of a token's vector.
    depth: number of layers, the uses of the shared block counted.
    heads: heads of the attention, which works at twice the width.
    every: Mamba layers before each use of the shared block.
    """
    ssm = LayerSpec(mixer="mamba", mlp=MlpSpec(kind="none"))
    layers = (*(ssm for _ in range(every)), LayerSpec(mixer="attention", share="global", with_input=True))
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="geglu"), position="none")


@register("model", "hymba", family="hybrid", papers=("2411.13676",))
def hymba(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, window: PositiveInt = 64
) -> ModelSpec:
    """Hymba: attention and Mamba side by side in every layer; the first, middle and last layers attend to everything.

    The paper's meta tokens and its sharing of keys between neighbours are left out.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the attention.
    window: tokens that the other layers' attention sees, the current one counted.
    """

    def layer(index: int) -> LayerSpec:
        seen: dict[str, object] = {"mixer": "sliding_window", "options": {"window": window}}
        attention = "attention" if index in (0, depth // 2, depth - 1) else seen
        return LayerSpec(mixer="parallel", options={"mixers": [attention, "mamba"]})

    layers = tuple(layer(i) for i in range(depth))
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"))


@register("model", "recurformer", family="hybrid", papers=("2410.12850",))
def recurformer(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, attention_heads: PositiveInt = 1
) -> ModelSpec:
    """RecurFormer: in every layer some attention heads are replaced by linear recurrent ones (Mamba).

    The paper replaces heads of a trained model; here the model is trained so from the start.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads, as which the size of one is counted.
    attention_heads: heads that stay attention.
    """
    kept = {"mixer": "attention", "options": {"heads": attention_heads, "head_dim": max(1, width // heads)}}
    layers = (LayerSpec(mixer="parallel", options={"mixers": [kept, "mamba"], "combine": "sum"}),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"))


@register("model", "moeut", family="softmax", papers=("2405.16039",))
def moeut(
    width: PositiveInt = 64,
    group: PositiveInt = 2,
    heads: PositiveInt = 4,
    loops: PositiveInt = 2,
    experts: PositiveInt = 8,
    top_k: PositiveInt = 2,
) -> ModelSpec:
    """MoEUT: a universal transformer, the same few layers again and again, with sigma-MoE feed-forward layers.

    The paper's attention has experts too; here it is plain. Its norms stand where `norm` puts them.

    width: size of a token's vector.
    group: layers in the group that is repeated.
    heads: attention heads.
    loops: times that the group is applied.
    experts: experts of each mixture.
    top_k: experts that each token goes through.
    """
    options = {"experts": experts, "top_k": top_k, "router": "sigmoid", "activation": "relu", "balance": "entropy"}
    return ModelSpec(
        width=width,
        depth=group,
        heads=heads,
        layers=(LayerSpec(mixer="attention"),),
        mlp=MlpSpec(kind="moe", options={**options, "ratio": 1.0}),
        loops=loops,
        input_injection=False,
    )


@register("model", "llama3", family="softmax", papers=("2407.21783",))
def llama3(size: Literal["tiny", "1b", "8b"] = "tiny") -> ModelSpec:
    """The shape of Llama 3: grouped-query attention, RoPE with a large base, SwiGLU, RMS norm.

    size: "1b" and "8b" are those of Llama 3.2 1B and Llama 3 8B; "tiny" has their proportions at width 64.
    """
    width, depth, heads, kv_heads, hidden, tied = {
        "tiny": (64, 4, 4, 1, 224, False),
        "1b": (2048, 16, 32, 8, 8192, True),
        "8b": (4096, 32, 32, 8, 14336, False),
    }[size]
    layer = LayerSpec(mixer="attention", options={"kv_heads": kv_heads, "rope_base": 500000.0})
    return ModelSpec(
        width=width,
        depth=depth,
        heads=heads,
        layers=(layer,),
        mlp=MlpSpec(kind="swiglu"),
        mlp_ratio=hidden * 1.5 / width,
        read_in="token" if tied else "vector",
        tied=tied,
    )


@register("model", "qwen3", family="softmax", papers=("2505.09388",))
def qwen3(size: Literal["tiny", "0.6b", "4b", "8b"] = "tiny") -> ModelSpec:
    """The shape of Qwen3: grouped-query attention with normalised queries and keys, RoPE, SwiGLU, RMS norm.

    size: of the dense models; "tiny" has their proportions at width 64.
    """
    width, depth, heads, kv_heads, head_dim, hidden, tied = {
        "tiny": (64, 4, 4, 2, 16, 192, False),
        "0.6b": (1024, 28, 16, 8, 128, 3072, True),
        "4b": (2560, 36, 32, 8, 128, 9728, True),
        "8b": (4096, 36, 32, 8, 128, 12288, False),
    }[size]
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "qk_norm": True, "rope_base": 1000000.0}
    return ModelSpec(
        width=width,
        depth=depth,
        heads=heads,
        layers=(LayerSpec(mixer="attention", options=options),),
        mlp=MlpSpec(kind="swiglu"),
        mlp_ratio=hidden * 1.5 / width,
        read_in="token" if tied else "vector",
        tied=tied,
    )


@register("model", "rwkv7", family="delta", papers=("2503.14456",))
def rwkv7(width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4) -> ModelSpec:
    """RWKV-7's time mixing with a squared-ReLU MLP in every block.

    The token shift of the MLP and the mixing of the first layer's values into the others are left out.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the time mixing.
    """
    layers = (LayerSpec(mixer="rwkv7"),)
    return ModelSpec(
        width=width,
        depth=depth,
        heads=heads,
        layers=layers,
        mlp=MlpSpec(kind="relu2"),
        norm="layer",
        position="none",
    )


@register("model", "kimi_linear", family="hybrid", papers=("2510.26692",))
def kimi_linear(width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4) -> ModelSpec:
    """Kimi Linear: three layers of Kimi delta attention to one of latent attention without positions.

    The paper's mixtures of experts are left out: every MLP is SwiGLU.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of both mixers.
    """
    delta = LayerSpec(mixer="kda")
    layers = (delta, delta, delta, LayerSpec(mixer="mla", options={"rope_dim": 0}))
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), position="none")


@register("model", "qwen3_next", family="hybrid", papers=("2505.09388", "2412.06464"))
def qwen3_next(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, experts: PositiveInt = 16
) -> ModelSpec:
    """The shape of Qwen3-Next: three gated delta nets to one gated attention, and mixtures of many small experts.

    The attention has normalised queries and keys, turns a quarter of each head and gates its output; every token goes
    through two experts and a shared one. Qwen3-Next's delta nets have twice as many value heads as key heads; here the
    values are twice as large.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of both mixers.
    experts: experts of each mixture.
    """
    delta = LayerSpec(mixer="gated_delta_net", options={"expand_v": 2})
    size = max(2, width // heads)
    options = {"kv_heads": 1, "qk_norm": True, "output_gate": True, "rope_base": 1e7}
    options["rope_fraction"] = max(2, size // 8 * 2) / size
    attention = LayerSpec(mixer="attention", options=options)
    mixture = MlpSpec(kind="moe", options={"experts": experts, "top_k": 2, "shared": 1, "ratio": 1.0})
    layers = (delta, delta, delta, attention)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=mixture)


@register("model", "xlstm_7_1", family="recurrent", papers=("2405.04517",))
def xlstm_7_1(width: PositiveInt = 64, depth: PositiveInt = 8, heads: PositiveInt = 4) -> ModelSpec:
    """xLSTM[7:1]: seven mLSTM blocks to one of sLSTM, which alone has an MLP after it.

    The paper's mLSTM works inside an up-projection; here it is xLSTM 7B's, at the model's width.

    width: size of a token's vector.
    depth: number of blocks; eight make one group.
    heads: heads of both mixers.
    """
    matrix = LayerSpec(mixer="mlstm", mlp=MlpSpec(kind="none"), options={"short_conv": 4})
    scalar = LayerSpec(mixer="slstm", mlp=MlpSpec(kind="geglu"))
    layers = (matrix, scalar, *(matrix for _ in range(6)))
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="none"), position="none")


@register("model", "titans", family="test-time", papers=("2501.00663",))
def titans(
    width: PositiveInt = 64,
    depth: PositiveInt = 4,
    heads: PositiveInt = 4,
    window: PositiveInt = 64,
    memory: Literal["context", "gate", "layer"] = "gate",
) -> ModelSpec:
    """Titans: a neural memory as context of attention (MAC), beside it (MAG) or before it (MAL).

    Only memory as context has the paper's persistent tokens.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of both mixers.
    window: tokens that the attention sees, the current one counted; of a segment, where the memory is context.
    memory: as context of the attention, as a gate of the attention in the same layer, or as a layer before each
        attention layer.
    """
    if memory == "context":
        inner = LayerSpec(mixer="titans_mac", options={"segment": window})
        return ModelSpec(width=width, depth=depth, heads=heads, layers=(inner,), mlp=MlpSpec(kind="swiglu"))
    local = LayerSpec(mixer="sliding_window", options={"window": window})
    if memory == "gate":
        near = {"mixer": "sliding_window", "options": {"window": window}}
        layers: tuple[LayerSpec, ...] = (
            LayerSpec(mixer="parallel", options={"mixers": [near, "titans"], "combine": "gate"}),
        )
    else:
        layers = (LayerSpec(mixer="titans"), local)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"))


@register("model", "infini_transformer", family="segment", papers=("2404.07143",))
def infini_transformer(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, segment: PositiveInt = 64
) -> ModelSpec:
    """A transformer with Infini-attention: attention within segments, and a memory of those before, in every block.

    width: size of a token's vector.
    depth: number of blocks.
    heads: attention heads.
    segment: tokens of a segment.
    """
    layers = (LayerSpec(mixer="infini_attention", options={"segment": segment}),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers)


@register("model", "log_linear", family="linear", papers=("2506.04761",))
def log_linear(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, chunk: PositiveInt = 64
) -> ModelSpec:
    """Log-linear attention with a SwiGLU MLP in every block: a state that grows with the logarithm of the length.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the attention.
    chunk: tokens that are read by one quadratic form, a power of two.
    """
    layers = (LayerSpec(mixer="log_linear_attention", options={"chunk": chunk}),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), position="none")


@register("model", "mesa_net", family="test-time", papers=("2506.05233",))
def mesa_net(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, steps: PositiveInt = 30
) -> ModelSpec:
    """MesaNet with a SwiGLU MLP in every block: each layer answers by ridge regression on what it has read.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the mesa layer.
    steps: of conjugate gradients.
    """
    layers = (LayerSpec(mixer="mesa_net", options={"steps": steps}),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), position="none")


@register("model", "ttt", family="test-time", papers=("2407.04620",))
def ttt(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, inner: Literal["linear", "mlp"] = "linear"
) -> ModelSpec:
    """Test-time training with a SwiGLU MLP in every block: each layer's state is a model that learns while it reads.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the mixer.
    inner: the inner model.
    """
    layers = (LayerSpec(mixer=f"ttt_{inner}"),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), position="none")


@register("model", "moba", family="sparse", papers=("2502.13189",))
def moba(
    width: PositiveInt = 64,
    depth: PositiveInt = 4,
    heads: PositiveInt = 4,
    block: PositiveInt = 64,
    top_k: PositiveInt = 3,
) -> ModelSpec:
    """A transformer whose queries read only the best blocks of what was read (MoBA), but for the last layer's.

    width: size of a token's vector.
    depth: number of blocks; the last one attends to everything, as in the paper's hybrid.
    heads: attention heads.
    block: tokens of a block.
    top_k: blocks that a query reads.
    """
    sparse = LayerSpec(mixer="moba", options={"block": block, "top_k": top_k})
    layers = (*(sparse for _ in range(depth - 1)), LayerSpec(mixer="attention"))
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers)


@register("model", "mamba3", family="state space", papers=("2603.15569",))
def mamba3(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, state_size: PositiveInt = 64
) -> ModelSpec:
    """Mamba-3 with a SwiGLU MLP in every block: trapezoidal writing, a state that turns, no convolution.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the state-space layer.
    state_size: size of B and C.
    """
    layers = (LayerSpec(mixer="mamba3", options={"state_size": state_size}),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), position="none")


@register("model", "simplified_transformer", family="softmax", papers=("2311.01906",))
def simplified_transformer(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, parallel: bool = True
) -> ModelSpec:
    """Simplified transformer blocks (SAS, SAS-P): shaped attention, no values or projections, no skip connections.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the attention, a divisor of width.
    parallel: run the MLP beside the attention (SAS-P) in place of after it.
    """
    return ModelSpec(
        width=width,
        depth=depth,
        heads=heads,
        layers=(LayerSpec(mixer="shaped_attention"),),
        residual="none",
        block="parallel" if parallel else "sequential",
    )


@register("model", "ngram_transformer", family="static", papers=("2401.12973",))
def ngram_transformer(
    width: PositiveInt = 64, depth: PositiveInt = 4, heads: PositiveInt = 4, largest: PositiveInt = 2
) -> ModelSpec:
    """A transformer of tokens whose second and following layers are n-gram heads of order 1 to `largest`.

    width: size of a token's vector.
    depth: number of blocks; those beyond the n-gram heads are attention.
    heads: attention heads.
    largest: order of the longest n-gram that is looked up.
    """
    ngrams = [LayerSpec(mixer="ngram", options={"n": n}, mlp=MlpSpec(kind="none")) for n in range(1, largest + 1)]
    rest = max(1, depth - 1 - largest)
    layers = (LayerSpec(mixer="attention"), *ngrams, *(LayerSpec(mixer="attention") for _ in range(rest)))
    return ModelSpec(width=width, depth=len(layers), heads=heads, layers=layers, read_in="token")


@register("model", "sse_hybrid", family="hybrid", papers=("2507.16577",))
def sse_hybrid(
    width: PositiveInt = 64,
    depth: PositiveInt = 4,
    heads: PositiveInt = 4,
    partitions: PositiveInt = 4,
    every: PositiveInt = 4,
) -> ModelSpec:
    """SSE-H: sparse state expansion, and softmax attention in the last of every few blocks.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of both mixers.
    partitions: of the state.
    every: blocks of which one is attention.
    """
    sse = LayerSpec(mixer="sse", options={"partitions": partitions})
    layers = (*(sse for _ in range(every - 1)), LayerSpec(mixer="attention"))
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"))


@register("model", "atlas", family="test-time", papers=("2505.23735",))
def atlas(
    width: PositiveInt = 64,
    depth: PositiveInt = 4,
    heads: PositiveInt = 4,
    window: PositiveInt = 4,
    muon_steps: NonNegativeInt = 5,
) -> ModelSpec:
    """ATLAS with a SwiGLU MLP in every block: a memory that learns from a window of tokens by Muon's steps.

    width: size of a token's vector.
    depth: number of blocks.
    heads: heads of the memory.
    window: tokens whose errors make one step.
    muon_steps: Newton-Schulz iterations of a step; 0 for plain gradients with momentum (OmegaNet).
    """
    layers = (LayerSpec(mixer="atlas", options={"window": window, "muon_steps": muon_steps}),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers, mlp=MlpSpec(kind="swiglu"), position="none")


@register(
    "model",
    "segment_memory",
    family="segment",
    papers=("2502.06049", "2405.06067", "2401.03462", "2207.06881", "1901.02860"),
)
def segment_memory(
    width: PositiveInt = 64,
    depth: PositiveInt = 4,
    heads: PositiveInt = 4,
    segment: PositiveInt = 64,
    memory: Literal["lm2", "hierarchical_memory", "sentinel", "recurrent_memory", "transformer_xl"] = "lm2",
) -> ModelSpec:
    """A transformer that reads segment by segment and hands a memory on: LM2, HMT, sentinels, RMT, Transformer-XL.

    width: size of a token's vector.
    depth: number of blocks.
    heads: attention heads.
    segment: tokens of a segment.
    memory: the mixer that keeps it.
    """
    layers = (LayerSpec(mixer=memory, options={"segment": segment}),)
    return ModelSpec(width=width, depth=depth, heads=heads, layers=layers)
