"""Multi-head latent attention against transformers' DeepSeek layers, and what its state holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.softmax.latent import LatentAttention
from contextlab.ops.position import rope
from contextlab.ops.softmax import naive_softmax_attention

SIZES: dict[str, Any] = {"heads": 2, "head_dim": 6, "rope_dim": 4, "value_dim": 5, "rank": 7}


def copied(theirs: Any, query_rank: int | None) -> LatentAttention:
    """Our mixer with the weights of a DeepSeek attention layer."""
    ours = LatentAttention(16, query_rank=query_rank, **SIZES).double()
    names = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out_proj": "o_proj"}
    names |= {"q_up": "q_proj"} if query_rank is None else {"q_down": "q_a_proj", "q_norm": "q_a_layernorm"}
    names |= {} if query_rank is None else {"q_up": "q_b_proj"}
    weights = theirs.state_dict()
    ours.load_state_dict({f"{mine}.weight": weights[f"{name}.weight"] for mine, name in names.items()})
    return ours


@pytest.mark.parametrize("query_rank", [None, 9])
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_agrees_with_deepseek(version: str, query_rank: int | None) -> None:
    name = f"deepseek_{version.lower()}"
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    config = getattr(modeling, f"Deepseek{version}Config")(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=query_rank,
        kv_lora_rank=7,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        vocab_size=8,
    )
    config._attn_implementation = "eager"
    theirs = getattr(modeling, f"Deepseek{version}Attention")(config, 0).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = copied(theirs, query_rank)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    embeddings = getattr(modeling, f"Deepseek{version}RotaryEmbedding")(config)(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=embeddings)[0]
    torch.testing.assert_close(ours(x)[0], expected, atol=1e-5, rtol=0)  # their angles are float32


def test_is_attention_over_keys_and_values_made_from_the_latent() -> None:
    mixer = LatentAttention(16, **SIZES).double()
    x, places = torch.randn(2, 6, 16, dtype=torch.float64), torch.arange(6)
    q = mixer.q_up(x).unflatten(-1, (2, 10))
    latent, shared = mixer.kv_down(x).split((7, 4), -1)
    kv = mixer.kv_up(mixer.kv_norm(latent)).unflatten(-1, (2, 11))
    q = torch.cat([q[..., :6], rope(q[..., 6:].contiguous(), places)], -1)
    k = torch.cat([kv[..., :6], rope(shared[:, :, None].contiguous(), places).expand(-1, -1, 2, -1)], -1)
    expected = mixer.out_proj(naive_softmax_attention(q, k, kv[..., 6:]).flatten(2))
    torch.testing.assert_close(mixer(x)[0], expected)


def test_one_token_reads_never_make_the_keys_of_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = LatentAttention(16, **SIZES).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    expected = mixer(x)[0]
    _, state = mixer(x[:, :5])

    def made(*_: Any) -> None:
        raise AssertionError("keys and values of the heads were made")

    monkeypatch.setattr(mixer, "_expanded", made)
    torch.testing.assert_close(mixer(x[:, 5:], state)[0], expected[:, 5:])
    with pytest.raises(AssertionError):
        mixer(x[:, 4:], state)


def test_the_state_is_the_latent_and_one_rotary_key() -> None:
    assert LatentAttention(16, **SIZES).state_nbytes(32, 3) == 3 * (32 * (7 + 4) * 4 + 8)
    # DeepSeek-V2's own sizes: 576 numbers a token, where its 128 heads would keep 40960.
    mla = LatentAttention(32, heads=128, head_dim=128, rope_dim=64, rank=512)
    assert mla.state_nbytes(32) - 8 == 32 * 576 * 4
    assert LatentAttention(32, heads=2).rank == 64
    assert LatentAttention(32, heads=2).rope_dim == 8


def test_half_precision_and_autocast_run() -> None:
    mixer = LatentAttention(16)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        mixer(x[:, :1], state)
    torch.testing.assert_close(y.float(), mixer(x)[0], atol=0.1, rtol=0.1)
    mixer.bfloat16()
    _, state = mixer(x.bfloat16())
    assert state.nbytes == mixer.state_nbytes(5, 2, torch.bfloat16)
    assert mixer(x[:, :1].bfloat16(), state)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_dim": 3}, "rope_dim must be even.*nearest is 4"),
        ({"heads": 5}, "width 16 is not divisible by 5 heads"),
        ({"rank": 0}, "rank"),
        ({"ranks": 4}, "did you mean 'rank'"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_mixer("mla", width=16, **options)
