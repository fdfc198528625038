"""Models: the stack keeps the mixers' laws, and its counts are true."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import contextlab.testing.models
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec, build_model
from contextlab.testing import LawBroken, laws, parametrize_with_laws
from contextlab.testing.models import of_spec

SMALL = {"width": 16, "input_size": 11, "output_size": 7, "read_in": "token"}
SPECS = {
    "learned": ModelSpec(**SMALL, depth=2, position="learned", max_length=64),
    "sinusoidal": ModelSpec(**SMALL, depth=2, position="sinusoidal"),
    "alibi": ModelSpec(**SMALL, depth=2, position="alibi", mlp="relu2", norm="layer"),
    "loops": ModelSpec(**SMALL, depth=2, loops=3, layers=["mamba2", "attention"]),
    "laurel": ModelSpec(**SMALL, depth=2, residual="laurel", block="parallel"),
    "atoms": ModelSpec(**SMALL, depth=3, atoms=2),
    "moe": ModelSpec(**SMALL, depth=2, mlp={"kind": "moe", "options": {"experts": 3, "top_k": 2}}, loops=2),
    "shared keys and layers": ModelSpec(
        **SMALL,
        depth=5,
        loops=2,
        layers=[
            {"mixer": "attention", "options": {"kv_heads": 2}},
            {"mixer": "gla", "share": "a"},
            {"mixer": "attention", "kv": "shared"},
            {"mixer": "gla", "share": "a"},
            {"mixer": "mamba2", "with_input": True},
        ],
    ),
    "tied": ModelSpec(**{**SMALL, "output_size": 11}, depth=1, tied=True),
}


LAWS = {law.name: law for law in laws("model")}


@parametrize_with_laws("model")
def test_named_models_keep_the_laws(law):
    law()


@pytest.mark.parametrize("law", [name for name in LAWS if name != "options"])
@pytest.mark.parametrize("name", SPECS)
def test_all_that_a_spec_can_say_keeps_the_laws(name, law):
    LAWS[law](of_spec(name, SPECS[name]))


@pytest.mark.parametrize(
    "changes",
    [
        {"loops": 1}, {"loops": 2}, {"input_injection": False}, {"block": "parallel"}, {"residual": "none"},
        {"residual": "laurel"}, {"residual": "laurel_rw"}, {"norm": "layer"}, {"norm": "none"}, {"norm_eps": 0.1},
        {"position": "sinusoidal"}, {"depth": 3}, {"mlp": "none"}, {"mlp": "swiglu"}, {"layers": ["attention"]},
        {"layers": [{"mixer": "attention", "share": "a"}]}, {"tied": True, "output_size": 11},
    ],
    ids=str,
)  # fmt: skip
def test_a_stack_of_another_description_is_found_out(changes):
    """The model is built by one spec and held to another."""
    told = ModelSpec(**SMALL, depth=2, loops=3, layers=["attention", "gru"])
    component = of_spec("other", told.model_copy())
    built = of_spec("told", ModelSpec.parse({**told.model_dump(), **changes})).build
    LAWS["description"](component)
    with pytest.raises(LawBroken, match="description"):
        LAWS["description"](dataclasses.replace(component, make=built))


def test_a_model_that_loops_is_not_one_that_does_not():
    looped, once = build_model(SPECS["loops"]), build_model(SPECS["loops"], loops=1)
    once.load_state_dict(looped.state_dict())
    tokens = torch.arange(10)[None]
    assert (looped(tokens) - once(tokens)).abs().max() > 1e-2


def test_broken_models_are_found_out():
    class Hot(Model):
        """Is sure of answers that it has not learned."""

        def forward(self, inputs, mask=None):
            return 20 * super().forward(inputs, mask)

    class Forgets(Model):
        """Drops the state."""

        def read(self, inputs, state=None, mask=None):
            return super().read(inputs, None, mask)

    class ReadsPadding(Model):
        """Takes padding for tokens."""

        def read(self, inputs, state=None, mask=None):
            return super().read(inputs, state, None)

    spec = ModelSpec(**SMALL, depth=1)
    for broken, law in ((Forgets, "pieces"), (ReadsPadding, "padding"), (Hot, "description")):
        with pytest.raises(LawBroken, match=law):
            LAWS[law](dataclasses.replace(of_spec("broken", spec), make=lambda broken=broken: broken(spec).double()))


def test_a_read_out_that_starts_too_large_is_found_out(monkeypatch):
    def loud(*arguments, **options):
        model = build_model(*arguments, **options)
        with torch.no_grad():
            model.read_out.weight.mul_(4)
        return model

    monkeypatch.setattr(contextlab.testing.models, "build_model", loud)
    with pytest.raises(LawBroken, match=r"not tied, it is .* log V"):
        LAWS["fresh loss"](of_spec("loud", SPECS["learned"]))


def test_flops_of_matrix_products_match_pytorchs_counter():
    spec = ModelSpec(**SMALL, depth=2, heads=2, mlp="swiglu")
    model = build_model(spec)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 32, dtype=torch.int64))
    # PyTorch's plain form multiplies the masked half of the scores too; a causal model needs only the other.
    masked = spec.depth * 4 * spec.width * (32 * 32 - 32 * 33 // 2)
    assert model.flops(32) == counter.get_total_flops() - masked


def test_the_same_seed_builds_the_same_model_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second, other = build_model(SPECS["loops"]), build_model(SPECS["loops"]), build_model(SPECS["loops"], seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.read_in.weight, other.read_in.weight)


def test_loops_share_their_parameters_and_keep_a_state_each():
    looped, once = build_model(SPECS["loops"]), build_model(SPECS["loops"], loops=1)
    assert looped.parameter_count == once.parameter_count
    assert looped.state_nbytes(8) == 3 * once.state_nbytes(8)


def test_tied_weights_are_one_tensor():
    model = build_model(SPECS["tied"])
    assert model.read_out.weight is model.read_in.weight


def test_generate_is_greedy_decoding_of_the_whole_sequence():
    model = build_model({**SMALL, "output_size": 11, "depth": 2, "layers": ["gated_delta_net", "attention"]})
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(2))
    written = model.generate(tokens, 6)
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, tokens[:, 5:])
    draws = [model.generate(tokens, 4, temperature=1.0, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    with pytest.raises(InputError, match=r"needs a torch\.Generator"):
        model.generate(tokens, 4, temperature=1.0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_follow_the_softmax_of_the_logits_over_the_temperature(temperature):
    """Of the first token and of the one after it: 20,000 draws."""
    model = build_model({**SMALL, "output_size": 11, "depth": 1})
    prompt = torch.tensor([[1, 2, 3]])
    draws = model.generate(
        prompt.expand(20_000, -1), 2, temperature=temperature, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        first = (model(prompt)[0, -1] / temperature).softmax(-1)
        pairs = torch.cat([prompt.expand(11, -1), torch.arange(11)[:, None]], 1)
        second = first[:, None] * (model(pairs)[:, -1] / temperature).softmax(-1)
    for expected, drawn in ((first, draws[:, 0]), (second.flatten(), 11 * draws[:, 0] + draws[:, 1])):
        count = drawn.bincount(minlength=len(expected))
        chi2 = ((count - 20_000 * expected).square() / (20_000 * expected)).sum().item()
        free = len(expected) - 1
        assert chi2 < free + 5 * (2 * free) ** 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "layers: expected at least one mixer"),
        ({"position": "learned"}, "max_length: learned positions need it"),
        ({"tied": True, "read_in": "vector"}, "only a model that reads tokens"),
        ({"tied": True, "read_in": "token", "input_size": 3, "output_size": 4}, "must be equal to share weights"),
        ({"heads": 5}, "width 64 is not divisible by 5 heads; the nearest that divides it is 4"),
        ({"depth": 0}, "depth: input should be greater than 0"),
        ({"depht": 2}, "depht: unknown key; did you mean 'depth'?"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(InputError) as caught:
        ModelSpec.parse(changes)
    assert message in str(caught.value)


def test_wrong_inputs_are_refused():
    model = build_model(SPECS["learned"])
    with pytest.raises(InputError, match="expected token ids"):
        model(torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match="does not fit max_length 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    vectors = build_model("transformer", width=16, input_size=3, output_size=1)
    with pytest.raises(InputError, match=r"expected vectors \[B, T, 3\]"):
        vectors(torch.zeros(2, 4, 5))
    with pytest.raises(InputError, match="input_size and output_size must be set"):
        build_model("transformer")
    with pytest.raises(InputError, match="did you mean 'width'"):
        build_model("transformer", widht=16)


def test_states_of_another_model_are_refused():
    model, other = build_model(SPECS["loops"]), build_model(SPECS["learned"])
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    _, state = other.read(tokens)
    with pytest.raises(InputError, match="expected a ModelState of 6 layers, got one of 2"):
        model.read(tokens, state)
    _, state = model.read(tokens)
    with pytest.raises(InputError, match="the state has 2 rows, x has 3"):
        model.read(torch.zeros(3, 1, dtype=torch.int64), state)
    with pytest.raises(InputError, match="expected a ModelState of 6 layers, got RecurrentState"):
        model.read(tokens, state.layers[0])


def test_nan_in_inference_is_named_with_its_layer():
    model = build_model({"width": 16, "depth": 3, "layers": ["mamba2", "attention"], "input_size": 3, "output_size": 1})
    x = torch.randn(2, 5, 3)
    bad = x.clone()
    bad[1, 2, 0] = torch.nan
    with torch.no_grad():
        model.read(x)
        with pytest.raises(InputError, match="the input holds NaN or infinity, first in row 1 at token 2"):
            model.read(bad)
        weight = model.blocks[1].mixer.qkv_proj.weight
        kept = weight.clone()
        weight[0, 0] = torch.inf
        with pytest.raises(InputError, match=r"parameter 'blocks\.1\.mixer\.qkv_proj\.weight' holds NaN"):
            model.read(x)
        weight.copy_(kept)
        model.blocks[2].mlp.up.weight.fill_(3e38)
        with pytest.raises(InputError, match=r"block 2 \(Mamba2\) gives NaN or infinity, first in row 0 at token 0"):
            model.read(x)


def test_encoders_are_pooled_and_keep_no_state():
    spec = {
        "width": 16,
        "depth": 2,
        "layers": ["encoder_attention"],
        **{k: SMALL[k] for k in ("input_size", "read_in")},
    }
    model = build_model({**spec, "output_size": 4, "pool": "mean"}).double()
    tokens = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    assert model(tokens).shape == (3, 4)
    mask = torch.arange(9)[None] >= torch.tensor([[4], [0], [0]])
    torch.testing.assert_close(model(tokens, mask)[:1], model(tokens[:1, 4:]), rtol=0, atol=1e-9)
    assert 0 < model.flops(8) < model.flops(16)
    with pytest.raises(InputError, match="a pooled read-out answers whole sequences"):
        model.read(tokens)
    with pytest.raises(InputError, match=r"block 0 \(EncoderAttention\) reads both ways"):
        build_model({**spec, "output_size": 4}).read(tokens)
    with pytest.raises(InputError, match="'fnet' reads both ways and would see the answers"):
        ModelSpec.parse({"layers": ["attention", "fnet"]}).for_task(None)
