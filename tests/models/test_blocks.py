"""Blocks: residuals, shared layers, shared keys, shared atoms, each against its formula written anew."""

from __future__ import annotations

import pytest
import torch

from contextlab.errors import InputError
from contextlab.models import LayerSpec, ModelSpec, build_model
from contextlab.testing import laws
from contextlab.testing.models import of_spec

SMALL = {"width": 16, "input_size": 11, "output_size": 7, "read_in": "token", "heads": 2}
TOKENS = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
SHARED = {"mixer": "attention", "kv": "shared"}


def noisy(**options):
    model = build_model(ModelSpec.parse({**SMALL, **options})).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_every_residual_starts_as_the_plain_one():
    plain = build_model(ModelSpec.parse({**SMALL, "depth": 2})).double()
    for kind in ("laurel_rw", "laurel_lr", "laurel"):
        other = build_model(ModelSpec.parse({**SMALL, "depth": 2, "residual": kind})).double()
        missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected
        assert {name.rpartition("residual.")[2] for name in missing} == {
            "laurel_rw": {"weights"},
            "laurel_lr": {"down.weight", "up.weight"},
            "laurel": {"weights", "down.weight", "up.weight"},
        }[kind]
        close(other(TOKENS), plain(TOKENS))


def test_without_skip_connections_a_block_is_its_branches_alone():
    model = noisy(depth=1, residual="none", norm="none", mlp="gelu")
    block, x = model.blocks[0], model.read_in(TOKENS)
    close(model(TOKENS), model.read_out(block.mlp(block.mixer(x)[0])))
    beside = noisy(depth=1, residual="none", norm="none", mlp="gelu", block="parallel")
    block, x = beside.blocks[0], beside.read_in(TOKENS)
    close(beside(TOKENS), beside.read_out(block.mixer(x)[0] + block.mlp(x)))


def test_laurel_weighs_both_branches_and_adds_a_low_rank_map():
    model = noisy(depth=1, residual="laurel", residual_rank=3, norm="none", mlp="none")
    block = model.blocks[0]
    residual = block.mixer_residual
    x = model.read_in(TOKENS)
    a, b = 2 * residual.weights.exp() / residual.weights.exp().sum()
    expected = a * block.mixer(x)[0] + b * (x + x @ (residual.up.weight @ residual.down.weight).T)
    close(model(TOKENS), model.read_out(expected))
    assert residual.down.weight.shape == (3, 16)


def test_a_parallel_block_adds_mixer_and_mlp_to_the_same_input():
    model = noisy(depth=1, block="parallel")
    block = model.blocks[0]
    x = model.read_in(TOKENS)
    normed = block.mixer_norm(x)
    expected = x + block.mixer(normed)[0] + block.mlp(normed)
    close(model(TOKENS), model.read_out(model.read_out_norm(expected)))


def test_layers_that_share_a_name_are_one_layer_with_a_state_for_each_use():
    layers = [{"mixer": "attention", "share": "a"}, "mamba2"]
    shared, apart = noisy(depth=4, layers=layers), noisy(depth=4, layers=["attention", "mamba2"])
    assert shared.blocks[0] is shared.blocks[2]
    assert shared.blocks[1] is not shared.blocks[3]
    one_layer = sum(p.numel() for p in shared.blocks[0].parameters())
    assert shared.parameter_count == apart.parameter_count - one_layer
    assert shared.state_nbytes(30) == apart.state_nbytes(30)
    with pytest.raises(InputError, match="must be described alike"):
        noisy(depth=2, layers=[*layers[:1], {"mixer": "attention", "share": "a", "mlp": "none"}])


def test_a_global_layer_reads_the_embedded_input_too():
    layers = [{"mixer": "attention", "with_input": True, "share": "global"}]
    model = noisy(depth=2, layers=layers, position="none")
    first, second = model.blocks
    assert first.body is second.body
    assert first.out_proj is not second.out_proj
    x = embedded = model.read_in(TOKENS)
    for block in (first, second):
        y, _ = first.body.mixer(first.body.mixer_norm(torch.cat([x, embedded], -1)))
        y = first.body.mlp(first.body.mlp_norm(first.body.narrow(y)))
        x = x + y @ block.out_proj.weight.T
    close(model(TOKENS), model.read_out(model.read_out_norm(x)))


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_shared_keys_are_those_of_the_layer_below(kv_heads):
    """A layer that shares keys equals attention whose key and value weights, norm and input are the other layer's."""
    options = {"kv_heads": kv_heads, "qk_norm": True}
    model = noisy(depth=2, layers=[{"mixer": "attention", "options": options}, SHARED], mlp="none")
    below, above = model.blocks
    x = model.read_in(TOKENS)
    read = below.mixer_norm(x)
    y, _ = below.mixer(read)
    h = x + y
    # Attention with the queries' weights of the one and the keys' of the other, run on both inputs side by side.
    q = above.mixer.q_norm(above.mixer.qkv_proj(above.mixer_norm(h)).unflatten(-1, (2, 8)))
    groups = kv_heads or 2
    _, k, v = below.mixer.qkv_proj(read).unflatten(-1, (-1, 8)).split((2, groups, groups), 2)
    k = below.mixer.k_norm(k)
    q, k = (rotated(z) for z in (q, k))
    k, v = (z.repeat_interleave(2 // groups, 2) for z in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
    expected = h + mixed @ above.mixer.out_proj.weight.T
    close(model(TOKENS), model.read_out(model.read_out_norm(expected)))


def rotated(z):
    angle = torch.arange(9, dtype=torch.float64)[:, None] * 10000 ** -(torch.arange(4, dtype=torch.float64) / 4)
    turned = (
        torch.view_as_complex(z.unflatten(-1, (4, 2)).contiguous())
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


def test_shared_keys_halve_the_state():
    own = noisy(depth=4)
    shared = noisy(depth=4, layers=["attention", SHARED])
    assert shared.state_nbytes(100) * 2 == own.state_nbytes(100)


def test_projections_are_sums_of_the_atoms_that_all_layers_share():
    model = noisy(depth=6, atoms=2)
    q, out = model.blocks[3].mixer.qkv_proj, model.blocks[3].mixer.out_proj
    expected = sum(c * atom for c, atom in zip(q.coefficients[1], model.atoms.k, strict=True))
    close(q.weight[16:32], expected)
    close(out.weight, torch.einsum("s,soi->oi", out.coefficients[0], model.atoms.out))
    own = noisy(depth=6)
    coefficients = 6 * 4 * 2
    assert model.parameter_count == own.parameter_count - (6 - 2) * 4 * 16 * 16 + coefficients
    torch.func.functional_call(model, dict(model.named_parameters()), (TOKENS,)).sum().backward()
    assert model.atoms.q.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [SHARED]}, "layer 0 reads shared keys, but no attention layer below it makes its own"),
        ({"layers": ["mamba2", {"mixer": "mamba2", "kv": "shared"}]}, "only a layer of mixer 'attention'"),
        (
            {"layers": ["attention", {**SHARED, "options": {"kv_heads": 1}}]},
            "layer 1 reads the keys of layer 0, so its kv_heads cannot be 1",
        ),
        ({"mlp": "glu"}, "mlp: unknown mlp 'glu'; did you mean 'gelu'?"),
        ({"mlp": {"kind": "moe", "options": {"expert": 3}}}, "did you mean 'experts'?"),
        ({"mlp": {"kind": "none", "options": {"ratio": 3}}}, "an MLP of kind 'none' has none"),
        ({"residual": "laural"}, "did you mean 'laurel'?"),
    ],
)
def test_impossible_blocks_are_refused(changes, message):
    with pytest.raises(InputError) as caught:
        ModelSpec.parse(changes)
    assert message in str(caught.value)


def test_atoms_need_attention_layers_of_one_shape():
    with pytest.raises(InputError, match="no layer of mixer 'attention'"):
        noisy(atoms=2, layers=["mamba2"])
    with pytest.raises(InputError, match="must agree in width, heads"):
        noisy(atoms=2, layers=["attention", LayerSpec(mixer="attention", options={"kv_heads": 1})])


def test_positions_are_given_to_the_mixers_that_know_them():
    layers = ["attention", {"mixer": "sliding_window", "options": {"window": 4}}, "mla", "gru"]
    model = build_model(ModelSpec.parse({**SMALL, "depth": 4, "layers": layers, "position": "xpos"}))
    assert [getattr(block.mixer, "position", None) for block in model.blocks][:2] == ["xpos", "rope"]


@pytest.mark.parametrize("more", [{}, {"block": "parallel"}, {"residual": "laurel", "loops": 2, "position": "learned"}])
def test_a_block_without_a_mixer_is_its_mlp_and_keeps_the_laws_of_models(more):
    layers = [{"mixer": "none"}, "attention", {"mixer": "none", "mlp": "none"}]
    sizes = {"width": 12, "depth": 3, "heads": 2, "input_size": 11, "output_size": 11, "read_in": "token"}
    component = of_spec("none", ModelSpec.parse({**sizes, "max_length": 40, "layers": layers, **more}))
    for law in laws("model"):
        if law.name != "options":
            law(component)
    alone = build_model({**sizes, "layers": ["attention"], "depth": 1, "max_length": 40, **more})
    assert component.build().state_nbytes(9) == alone.state_nbytes(9)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"layers": [{"mixer": "none", "options": {"heads": 2}}]}, "mixer: 'none' has no options"),
        ({"layers": [{"mixer": "none", "with_input": True}]}, "mixer: 'none' has no options, no keys and no with_inp"),
        ({"layers": ["none"], "residual": "none"}, "residual: 'none' leaves nothing of a token"),
        ({"layers": ["non"]}, "unknown mixer 'non'; did you mean 'none'?"),
    ],
)
def test_a_mixer_that_is_none_takes_no_options(spec, message):
    with pytest.raises(InputError) as found:
        ModelSpec.parse(spec)
    assert message in str(found.value)
