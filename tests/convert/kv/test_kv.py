"""Conversions of keys and values: exact where they can be, and the published formulas where they cannot."""

from __future__ import annotations

import pytest
import torch

from contextlab.convert import Calibration, build_conversion
from contextlab.convert.kv.window import attention_weights, lazy_shares
from contextlab.convert.mixing import output_errors
from contextlab.errors import InputError

from ..teachers import same, teacher, tokens


def data(length: int = 25) -> Calibration:
    return Calibration.of_tokens(tokens(length, batch=8, seed=3))


@torch.no_grad()
def with_equal_heads(model, groups):
    """The model with the first key and value of each group of heads in the place of the others'."""
    for block in model.blocks:
        mixer = block.mixer
        size, start = mixer.head_dim, mixer.heads * mixer.head_dim
        for name, tensor in mixer.state_dict().items():
            if name.startswith("qkv_proj") or name == "conv.weight":
                for part in tensor[start:].unflatten(0, (2, groups, -1, size)).flatten(0, 1):
                    part.copy_(part[:1].expand_as(part))
    return model


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{}, {"short_conv": 3, "bias": True}, {"qk_norm": True, "output_gate": True}])
def test_gqa_of_equal_heads_is_exact(groups, options):
    model = with_equal_heads(teacher(**options), groups)
    made = build_conversion("gqa", kv_heads=groups)(model).model
    same(model, made, 1e-12)
    assert made.state_nbytes(16) - model.state_nbytes(16) < 0
    kept = [each.blocks[0].mixer.kv_heads for each in (made, model)]
    assert kept == [groups, 4]


def test_gqa_averages_the_heads_of_a_group():
    model = teacher(mixer="sliding_window", window=4)
    made = build_conversion("gqa", kv_heads=2, layers=[1])(model).model
    q, k, v = model.blocks[1].mixer.qkv_proj.weight.view(3, 4, 4, 16)
    new = made.blocks[1].mixer.qkv_proj.weight
    expected = [q.flatten(0, 1), *(torch.cat(((x[0] + x[1]) / 2, (x[2] + x[3]) / 2)) for x in (k, v))]
    torch.testing.assert_close(new, torch.cat(expected))
    assert torch.equal(made.blocks[0].mixer.qkv_proj.weight, model.blocks[0].mixer.qkv_proj.weight)
    assert [layer.options.get("kv_heads") for layer in made.spec.pattern()] == [None, 2]


@pytest.mark.parametrize(
    ("position", "options"),
    [
        ("none", {}),
        ("learned", {"kv_heads": 2}),
        ("rope", {"kv_heads": 1}),
        ("rope", {"kv_heads": 1, "rope_fraction": 0.5, "rope_base": 50.0}),
        ("rope", {"kv_heads": 1, "head_dim": 8, "rope_scaling": {"kind": "p_rope", "keep": 0.5}}),
    ],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_mla_of_full_rank_is_exact(position, options, calibrated):
    model = teacher(position=position, **options)
    converted = build_conversion("mla")(model, data() if calibrated else None)
    same(model, converted.model, 1e-9)
    assert all(line.error < 1e-9 for line in converted.lines)


@torch.no_grad()
def test_mla_is_exact_where_the_heads_keys_differ_by_a_turn_and_a_size_of_each_pair():
    model = teacher()
    for block in model.blocks:
        k = block.mixer.qkv_proj.weight[16:32].view(4, 4, 16)
        z = torch.complex(k[0, 0::2], k[0, 1::2])
        for head, factor in enumerate((1.0, 0.5 + 1j, -2.0, 0.3j)):
            turned = z * torch.tensor([factor, factor**2]).reshape(2, 1)
            k[head, 0::2], k[head, 1::2] = turned.real, turned.imag
    same(model, build_conversion("mla")(model).model, 1e-9)


@torch.no_grad()
def test_mla_keeps_the_best_directions():
    """Of white inputs, what is lost of scaled keys and values is the rest of the singular values (Eckart-Young)."""
    model = teacher(position="none", depth=1)
    old = model.blocks[0].mixer.qkv_proj.weight
    made = build_conversion("mla", rank=5)(model).model.blocks[0].mixer
    got = (made.kv_up.weight @ made.kv_down.weight).view(4, 2, 4, 16).transpose(0, 1).flatten(1, 2)
    k, v = old[16:32], old[32:]
    balance = v.square().mean().sqrt() / k.square().mean().sqrt()
    lost = torch.cat((balance * (got[0] - k), got[1] - v)).square().sum()
    rest = torch.linalg.svdvals(torch.cat((balance * k, v)))[5:].square().sum()
    torch.testing.assert_close(lost, rest)


def test_mla_counts_what_the_data_show():
    model, seen = teacher(position="none"), data()
    white, fitted = (build_conversion("mla", rank=6)(model, None if each is None else each) for each in (None, seen))
    errors = [output_errors(model, each.model, [0, 1], seen) for each in (white, fitted)]
    assert sum(errors[1].values()) < sum(errors[0].values())


def test_mla_holds_one_latent_and_one_rotary_key_a_token():
    model = teacher()
    made = build_conversion("mla", rank=6)(model).model
    assert made.state_nbytes(4096) / model.state_nbytes(4096) == pytest.approx((6 + 4) / (2 * 16), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "short_conv": 3}, {"position": "alibi"}])
def test_a_window_as_long_as_the_text_is_exact(options):
    model = teacher(**options)
    made = build_conversion("window", window=20, sinks=2)(model).model
    same(model, made, 1e-12)
    assert made.state_nbytes(1000) == made.state_nbytes(500)


@torch.no_grad()
def test_laziness_of_even_attention_is_the_share_of_places():
    model = teacher(depth=1)
    model.blocks[0].mixer.qkv_proj.weight[:16] = 0
    share = lazy_shares(model, [0], data(25), window=3, sinks=2)[0]
    assert share == pytest.approx(sum(5 / (t + 1) for t in range(5, 24)) / 19, rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"kv_heads": 2}, {"position": "alibi"}, {"short_conv": 3, "qk_norm": True}])
def test_weights_of_attention_are_those_that_it_reads_by(options):
    mixer = teacher(depth=1, **options).blocks[0].mixer
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    v = mixer._project_in(x, None, None, False)[1].repeat_interleave(4 // mixer.kv_heads, 2)
    y = torch.einsum("bhts,bshd->bthd", attention_weights(mixer, x), v)
    torch.testing.assert_close(mixer.out_proj(y.flatten(2)), mixer(x)[0])


@torch.no_grad()
def test_the_laziest_layers_become_windows():
    model = teacher(depth=3)
    for block, size in zip(model.blocks, (0.0, 0.0, 3.0), strict=True):
        mixer = block.mixer
        mixer.qkv_proj.weight[:32] *= size  # even attention; in the last layer sharp
    mixer = model.blocks[2].mixer
    shares = lazy_shares(model, [0, 1, 2], data(), 3, 1)
    assert shares[0] == pytest.approx(shares[1])
    made = build_conversion("window", window=3, sinks=1, count=1)(model, data()).model
    changed = [layer.mixer == "sliding_window" for layer in made.spec.pattern()]
    assert changed.index(True) == max(shares, key=shares.get)
    assert sum(changed) == 1


@torch.no_grad()
def test_light_transfer_asks_the_last_queries_as_in_the_paper():
    """Its eq. 1 naively: for each of the last queries the attention to the first and to the last tokens of a prompt."""
    model, seen = teacher(depth=3), tokens(24, batch=8, seed=3)
    asked = Calibration.of_tokens(torch.cat((seen, seen[:, :1]), 1))
    shares = lazy_shares(model, [0, 1, 2], asked, window=5, sinks=2, last=3)
    x, state = model.read_in(seen), None
    for i, block in enumerate(model.blocks):
        weights = attention_weights(block.mixer, block.mixer_norm(x)).mean(1)
        total = 0.0
        for query in (21, 22, 23):
            for key in (0, 1, 19, 20, 21, 22, 23):
                total += float(weights[:, query, key].mean()) / 3
        assert shares[i] == pytest.approx(total, rel=1e-9)
        x, state = block(x, None, None, False, x, None)
    assert state is None
    made = build_conversion("light_transfer", window=5, sinks=2, last=3)(model, asked).model
    changed = [i for i, layer in enumerate(made.spec.pattern()) if layer.mixer == "sliding_window"]
    assert changed == [max(shares, key=shares.get)]


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms", "none"])
def test_layers_that_agree_share_exactly(norm):
    """The second layer reads what the first reads, as that adds nothing, behind a norm of other gains."""
    model = teacher(norm=norm)
    first, second = model.blocks
    first.mixer.out_proj.weight.zero_()
    first.mlp.out_proj.weight.zero_()
    rows = first.mixer.qkv_proj.weight[16:].clone()
    if norm == "rms":
        rows *= first.mixer_norm.weight / second.mixer_norm.weight
    second.mixer.qkv_proj.weight[16:] = rows
    converted = build_conversion("share_kv")(model)
    same(model, converted.model, 1e-9)
    assert all(line.error < 1e-12 for line in converted.lines)
    assert converted.model.state_nbytes(16) == model.state_nbytes(16) // 2


def test_positions_are_stretched_and_dropped():
    model = teacher()
    stretched = build_conversion("rope_scaling", factor=2.0)(model).model
    assert stretched.blocks[0].mixer.rope_scaling.factor == 2.0
    with torch.no_grad():
        x = torch.randn(1, 10, 16, dtype=torch.float64)
        spread = torch.zeros(1, 20, 16, dtype=torch.float64)
        spread[:, ::2] = x
        weights = attention_weights(stretched.blocks[0].mixer, spread)[..., ::2, ::2]
        expected = attention_weights(model.blocks[0].mixer, x)
        torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected)  # twice as far, half the turn
        bare = build_conversion("drop_position")(model).model
        assert bare.blocks[0].mixer.rotary == 0
        q, k, v = bare.blocks[0].mixer.qkv_proj(x).unflatten(-1, (3, 4, 4)).unbind(2)
        expected = torch.nn.functional.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
        last = bare.blocks[0].mixer.out_proj(expected.transpose(1, 2).flatten(2))[:, -1]
        torch.testing.assert_close(bare.blocks[0].mixer(x)[0][:, -1], last)


@pytest.mark.parametrize(
    ("name", "given", "options", "message"),
    [
        (
            "gqa",
            {},
            {"kv_heads": 8},
            "kv_heads 8 does not divide the 4 key heads of layer 0; the nearest that does is 2",
        ),
        ("gqa", {}, {"kv_heads": 3}, "kv_heads 3 does not divide the 4 key heads of layer 0; the nearest that does is"),
        ("mla", {}, {"rank": 40}, "rank 40 is more than keys and values of layer 0 have; the most is 16"),
        ("mla", {"qk_norm": True}, {}, "mla: layer 0 has qk_norm, which latent attention has not"),
        ("mla", {"short_conv": 3}, {}, "mla: layer 0 has short_conv"),
        ("mla", {"bias": True}, {}, "mla: layer 0 has biases"),
        ("mla", {"position": "alibi"}, {}, "mla: layer 0 has position 'alibi'"),
        ("mla", {"rope_scaling": {"kind": "ntk", "factor": 2.0}}, {}, "mla: layer 0 has rope_scaling 'ntk'"),
        ("window", {"position": "xpos"}, {}, "window: layer 0 has position 'xpos'"),
        ("window", {}, {"count": 3}, "count 3 is more than the 2 layers that can be converted"),
        ("window", {}, {"count": 1}, "window: count needs data"),
        ("share_kv", {"short_conv": 3}, {}, "share_kv: layer 0 has short_conv"),
        ("share_kv", {}, {"layers": [1]}, "share_kv: only layer 1 can share"),
        ("rope_scaling", {"position": "none"}, {}, "rope_scaling: layer 0 has position 'none'"),
        ("rope_scaling", {}, {"factor": 0.5}, "factor: 0.5 makes contexts shorter"),
        ("rope_scaling", {}, {"kind": "yarn"}, "original_length: yarn needs the tokens of the training"),
        ("drop_position", {"position": "none"}, {}, "drop_position: layer 0 has position 'none'"),
        ("gqa", {}, {"layers": [0, 2]}, "layers: 2 is out of range; the model has layers 0 to 1"),
        ("gqa", {}, {"layers": "some"}, "layers: expected all, half or numbers such as 0,2,4, got 'some'"),
        ("gqa", {}, {"layers": "1,1"}, "layers: expected numbers, each once"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name, given, options, message):
    with pytest.raises(InputError) as error:
        build_conversion(name, **options)(teacher(**given))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_layers_between_are_not_passed_over():
    with pytest.raises(InputError, match="layer 2 would read the keys of layer 1, not of 0"):
        build_conversion("share_kv", layers=[0, 2])(teacher(depth=3))


def test_long_prompts_are_asked_for():
    with pytest.raises(InputError, match="no prompt of the data is longer than the 68 tokens that stay in sight"):
        build_conversion("window", count=1)(teacher(), data())
