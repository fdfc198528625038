from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from contextlab.errors import InputError
from contextlab.mixers import Attention, ForgettingAttention, Mixer, SlidingWindow, build_mixer
from contextlab.mixers.softmax.shared import SharedKeys
from contextlab.ops.position import alibi_slopes, pairs_of_halves, rope
from contextlab.ops.softmax import naive_softmax_attention
from contextlab.state import KVState


def x_like(length: int, batch: int = 2, width: int = 16) -> torch.Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 1},
        {"position": "alibi"},
        {"position": "none"},
        {"rope_fraction": 0.5, "rope_base": 100.0},
        {"position": "xpos", "rope_fraction": 0.5, "xpos_scale": 20.0},
    ],
    ids=str,
)
def test_attention_is_projections_positions_and_the_op(options: dict[str, Any]) -> None:
    mixer = Attention(16, heads=2, **options).double()
    x = x_like(6)
    q, k, v = mixer.qkv_proj(x).split([16, mixer.kv_heads * 8, mixer.kv_heads * 8], -1)
    q, k, v = (t.unflatten(-1, (-1, 8)) for t in (q, k, v))
    slopes = alibi_slopes(2) if options.get("position") == "alibi" else None
    if options.get("position", "rope") in ("rope", "xpos"):
        turn = {"base": options.get("rope_base", 10000.0), "fraction": options.get("rope_fraction", 1.0)}
        q, k = rope(q, torch.arange(6), **turn), rope(k, torch.arange(6), **turn)
    if options.get("position") == "xpos":  # the powers of the paper's algorithm 1
        fade = torch.tensor([0.4 / 1.4] * 2 + [0.9 / 1.4] * 2 + [1.0] * 4, dtype=torch.float64)
        power = fade ** (torch.arange(6)[:, None, None] / options["xpos_scale"])
        q, k = q * power, k / power
    expected = mixer.out_proj(naive_softmax_attention(q, k, v, slopes=slopes).flatten(2))
    torch.testing.assert_close(mixer(x)[0], expected)


def test_agrees_with_llama() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, vocab_size=8)
    config._attn_implementation = "eager"
    theirs = llama.LlamaAttention(config, 0).double()
    ours = Attention(16, heads=4, kv_heads=2).double()
    with torch.no_grad():
        turned = (theirs.q_proj.weight, theirs.k_proj.weight)
        q, k = (pairs_of_halves(w.unflatten(0, (-1, 4)).mT, 4).mT.flatten(0, 1) for w in turned)
        ours.qkv_proj.weight.copy_(torch.cat([q, k, theirs.v_proj.weight]))
        ours.out_proj.weight.copy_(theirs.o_proj.weight)
    x = x_like(9)
    embeddings = llama.LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, embeddings, mask)[0]
    torch.testing.assert_close(ours(x)[0], expected, atol=1e-6, rtol=0)  # their angles are float32


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_window_that_holds_everything_is_attention(sinks: int) -> None:
    window = SlidingWindow(16, window=12, sinks=sinks).double()
    full = Attention(16).double()
    full.load_state_dict(window.state_dict())
    x = x_like(12)
    torch.testing.assert_close(window(x)[0], full(x)[0])
    longer = x_like(13)
    # The one token that leaves the window is the first, which a sink keeps.
    assert torch.allclose(window(longer)[0], full(longer)[0]) == (sinks > 0)


def test_a_window_forgets_and_sinks_do_not() -> None:
    x = x_like(20)
    changed = x.clone()
    changed[:, 0] += 1
    for sinks, same in ((0, True), (1, False)):
        mixer = SlidingWindow(16, window=4, sinks=sinks).double()
        before, after = mixer(x)[0], mixer(changed)[0]
        assert torch.equal(before[:, 4:], after[:, 4:]) == same
        assert not torch.allclose(before[:, 3], after[:, 3])


def test_bytes_of_the_state() -> None:
    attention, window = Attention(16, kv_heads=1), SlidingWindow(16, window=10, sinks=2)
    assert attention.state_nbytes(32) == 32 * 2 * 4 * 4 + 8
    assert attention.state_nbytes(4096, batch=2) > 100 * attention.state_nbytes(32)
    assert window.state_nbytes(5) == window.state_nbytes(10**6) == 11 * (2 * 16 * 4 + 8) + 8


def test_flops_count_what_the_mask_lets_through() -> None:
    matrices = 4 * 16 * 16
    assert Attention(16).flops(10) == 2 * 10 * matrices + 4 * 16 * 55
    assert SlidingWindow(16, window=3).flops(10) == 2 * 10 * matrices + 4 * 16 * (1 + 2 + 3 * 8)
    assert SlidingWindow(16, window=3, sinks=1).flops(10) == 2 * 10 * matrices + 4 * 16 * (1 + 2 + 3 + 4 * 7)


@pytest.mark.parametrize("name", ["attention", "sliding_window"])
def test_half_precision_and_autocast_run(name: str) -> None:
    mixer = build_mixer(name, width=16)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        mixer(x, state)
    torch.testing.assert_close(y.float(), mixer(x)[0], atol=0.1, rtol=0.1)
    assert mixer.bfloat16()(x.bfloat16())[1].nbytes == mixer.state_nbytes(5, 2, torch.bfloat16)


@pytest.mark.parametrize("position", ["rope", "xpos"])
def test_positions_far_out_are_as_right_as_near_ones(position: Any) -> None:
    mixer = Attention(16, position=position).float()
    x = torch.randn(1, 8, 16)
    k, v = torch.zeros(1, 0, 4, 4), torch.zeros(1, 0, 4, 4)

    class Far(KVState):
        """No tokens, but a length of a million: `held` gives what was appended only."""

        def held(self) -> tuple[torch.Tensor, torch.Tensor]:
            return self.keys.transpose(1, 2), self.values.transpose(1, 2)

        def append(self, k: torch.Tensor, v: torch.Tensor, mask: Any = None) -> KVState:
            return Far(k.transpose(1, 2), v.transpose(1, 2), self.start, length=self.length + k.shape[1])

    far = Far(k.transpose(1, 2), v.transpose(1, 2), torch.zeros(1, dtype=torch.int64), length=1_000_000)
    torch.testing.assert_close(mixer(x, far)[0], mixer(x)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "nearest that does is 2"),
        ({"heads": 5}, "nearest that divides it is 4"),
        ({"rope_fraction": 0.1}, "nearest fraction that fits is 0.5"),
        ({"rope_fraction": 1.5}, "rope_fraction"),
        ({"heads": 0}, "heads"),
        ({"position": "ropes"}, "did you mean 'rope'"),
        ({"windows": 3}, "unknown option"),
        ({"xpos_scale": 64.0}, "xpos_scale is for position='xpos', but position is 'rope'"),
        ({"position": "xpos", "xpos_scale": 8.0}, "xpos_scale"),
        ({"position": "xpos", "rope_scaling": {"kind": "linear"}}, "rope_scaling does not change how xpos decays"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_mixer("attention", width=16, **options)
    assert "\n" not in str(caught.value)


def test_build_mixer_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'attention'"):
        build_mixer("atention", width=16)
    with pytest.raises(InputError, match="window"):
        build_mixer("sliding_window", width=16, window=0)
    assert isinstance(build_mixer("sliding_window", width=16, window=3), Mixer)


def test_a_layer_that_shares_keys_reads_them_as_xpos_does() -> None:
    options: dict[str, Any] = {"position": "xpos", "xpos_scale": 16.0, "kv_heads": 2}
    below, above = Attention(16, **options).double(), SharedKeys(16, **options).double()
    with torch.no_grad():
        above.qkv_proj.weight.copy_(below.qkv_proj.weight[:16])
        above.out_proj.weight.copy_(below.out_proj.weight)
    y, state = below(x_like(30))
    assert state is not None
    torch.manual_seed(0)
    x = x_like(5)
    y, after = below(x, state)
    torch.testing.assert_close(above(x, after)[0], y)


def test_decoding_after_a_long_context_does_not_copy_it() -> None:
    mixer = Attention(64)
    token = torch.randn(1, 1, 64)
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 8000, 64))
        copied, in_place = [], []
        for _ in range(15):
            started = time.process_time()
            mixer(token, state.detach())  # a detached state must copy before it writes
            copied.append(time.process_time() - started)
            started = time.process_time()
            _, state = mixer(token, state)
            in_place.append(time.process_time() - started)
    assert statistics.median(in_place) < statistics.median(copied)


@pytest.mark.parametrize("output_gate", [False, True])
def test_forgetting_attention_by_its_definition(output_gate: bool) -> None:
    mixer = ForgettingAttention(16, heads=2, output_gate=output_gate).double()
    x = x_like(11)
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (3, 2, 8)).unbind(2)
    log_f = torch.nn.functional.logsigmoid(mixer.forget_proj(x))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    for i in range(11):
        for j in range(11):
            scores[:, :, i, j] += log_f[:, j + 1 : i + 1].sum(1) if j <= i else -torch.inf
    y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
    if mixer.gate_proj is not None:
        y = y * mixer.gate_proj(x).sigmoid()
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_forgetting_attention_keeps_its_sum_in_half_precision(autocast: bool) -> None:
    mixer = ForgettingAttention(16)
    x = torch.randn(2, 600, 16)
    expected = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        half, given = (mixer, x) if autocast else (mixer.bfloat16(), x.bfloat16())
        y, state = half(given)
        assert state is not None
        half(given[:, :1], state)
    torch.testing.assert_close(y.float(), expected, atol=0.03, rtol=0.03)
    if not autocast:
        assert state.nbytes == mixer.state_nbytes(600, 2, torch.bfloat16)
