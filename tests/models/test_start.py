"""A model that starts from a trained one: what is carried over, what is new, and what the grown and shrunk answer."""

from __future__ import annotations

import pytest
import torch

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec, build_model
from contextlab.models.changes import ReplaceSpec, changed_blocks, chosen_layers
from contextlab.models.start import plan_start, start_model
from contextlab.models.start_plan import gathered

SPEC = ModelSpec(width=16, depth=3, heads=4, read_in="token", input_size=11, output_size=11)
TOKENS = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))


def trained(spec: ModelSpec = SPEC, seed: int = 1) -> Model:
    """A model whose every tensor is unlike what any other draws, in float64."""
    model = build_model(spec, seed=seed).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def changed(**changes) -> ModelSpec:
    return ModelSpec.parse({**SPEC.model_dump(), **changes})


def test_the_same_spec_is_the_same_model_and_the_source_stays():
    source = trained()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    started = start_model(SPEC, source, seed=5)
    assert torch.equal(started.model(TOKENS), source(TOKENS))
    assert started.new == started.dropped == ()
    assert set(started.carried) == set(before)
    with torch.no_grad():
        for parameter in started.model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())


MIXERS = [entry.name for entry in registry.entries("mixer")
          if entry.factory.__module__.startswith("contextlab.") and entry.name not in ("parallel",)]  # fmt: skip


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_grows_by_blocks_that_start_as_the_identity_or_is_refused(mixer):
    """Block expansion leaves the function as it is (2401.02415), whatever the mixer; the plan knows beforehand."""
    base = {**SPEC.model_dump(), "depth": 1, "width": 32, "layers": [mixer]}
    try:
        source = trained(ModelSpec.parse(base))
    except InputError:
        pytest.skip("cannot stand in a plain model of this size")
    grown = ModelSpec.parse({**base, "depth": 2})
    try:
        plan = plan_start(grown, source.spec, "zero")
    except InputError as error:
        assert "(out_proj)" in str(error)
        with pytest.raises(InputError, match=r"\(out_proj\)"):
            start_model(grown, source, "zero")
        return
    started = start_model(grown, source, "zero")
    assert started.plan == plan
    assert started.plan.zeroed
    tokens = TOKENS[:, :8]
    torch.testing.assert_close(started.model(tokens), source(tokens), rtol=0, atol=1e-9)


def test_stacked_blocks_are_copies_in_order():
    source = trained()
    started = start_model(changed(depth=5), source, "copied")
    own, theirs = started.model.state_dict(), source.state_dict()
    for index, old in enumerate([0, 1, 2, 0, 1]):
        for name in (name for name in theirs if name.startswith(f"blocks.{old}.")):
            assert torch.equal(own[name.replace(f"blocks.{old}.", f"blocks.{index}.")], theirs[name])
    assert started.new == ()


def test_a_fresh_block_is_drawn_by_the_seed():
    source = trained()
    one, same, other = (start_model(changed(depth=4), source, seed=seed).model.state_dict() for seed in (3, 3, 4))
    name = "blocks.3.mixer.qkv_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert torch.equal(one["blocks.2.mixer.qkv_proj.weight"], source.state_dict()["blocks.2.mixer.qkv_proj.weight"])


def test_removed_blocks_are_those_of_a_model_that_skips_them():
    """What is left answers as the source does where its middle block adds nothing."""
    source = trained()
    with torch.no_grad():
        source.blocks[1].mixer.out_proj.weight.zero_()
        source.blocks[1].mlp.out_proj.weight.zero_()
    spec, kept = changed_blocks(SPEC, remove=(1,))
    started = start_model(spec, source, blocks=kept)
    assert (spec.depth, kept) == (2, [0, 2])
    torch.testing.assert_close(started.model(TOKENS), source(TOKENS), rtol=0, atol=1e-12)
    assert started.carried["blocks.1.mlp.up.weight"] == "blocks.2.mlp.up.weight"
    assert all(name.startswith("blocks.1.") for name in started.dropped)
    assert len(started.dropped) == 6
    assert "dropped: blocks.1.mixer_norm.weight, blocks.1.mixer.*" in "; ".join(started.plan.lines())


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"bias": True, "short_conv": 3}])
def test_equal_heads_averaged_are_grouped_queries_exactly(kv_heads, options):
    """Where the heads of a group are equal, their mean is each of them (2305.13245)."""
    source = trained(changed(layers=[{"mixer": "attention", "options": options}]))
    with torch.no_grad():
        for block in source.blocks:
            rows = [block.mixer.qkv_proj.weight]
            if options:
                rows += [block.mixer.qkv_proj.bias, block.mixer.conv.weight, block.mixer.conv.bias]
            for tensor in (each for each in rows if each is not None):
                heads = tensor[16:].unflatten(0, (2, kv_heads, 4 // kv_heads, 4))
                heads.copy_(heads[:, :, :1].expand_as(heads).clone())
    spec, kept = changed_blocks(source.spec, [ReplaceSpec(options={"kv_heads": kv_heads})])
    started = start_model(spec, source, "averaged", blocks=kept)
    torch.testing.assert_close(started.model(TOKENS), source(TOKENS), rtol=0, atol=1e-12)
    assert started.model.state_nbytes(8) < source.state_nbytes(8) * (kv_heads + 1) / 4
    assert started.new == started.dropped == ()


def test_averaged_heads_are_their_mean():
    source = trained()
    spec, kept = changed_blocks(SPEC, [ReplaceSpec(options={"kv_heads": 2})])
    own = start_model(spec, source, "averaged", blocks=kept).model.blocks[2].mixer.qkv_proj.weight
    q, k, v = source.blocks[2].mixer.qkv_proj.weight.split(16)
    assert torch.equal(own[:16], q)
    for rows, theirs in ((own[16:24], k), (own[24:], v)):
        for group in (0, 1):
            first, second = theirs[8 * group : 8 * group + 4], theirs[8 * group + 4 : 8 * group + 8]
            torch.testing.assert_close(rows[4 * group : 4 * group + 4], (first + second) / 2)


def test_a_tied_read_out_and_shared_blocks_are_one_tensor():
    tied = changed(tied=True, read_out_bias=False)
    source = trained(tied)
    apart = start_model(changed(read_out_bias=False), source)
    assert apart.carried["read_out.weight"] == "read_in.weight"
    assert torch.equal(apart.model(TOKENS), source(TOKENS))
    shared = changed(layers=[{"mixer": "attention", "share": "all"}])
    started = start_model(shared, trained())
    assert torch.equal(started.model.blocks[2].mlp.up.weight, trained().blocks[0].mlp.up.weight)
    assert {name.split(".")[1] for name in started.dropped} == {"1", "2"}


def test_other_mixers_keep_the_rest_and_what_options_they_know():
    base = changed(layers=[{"mixer": "attention", "options": {"heads": 2, "rope_base": 500.0}}])
    spec, kept = changed_blocks(base, [ReplaceSpec(layers="0,2", mixer="gated_delta_net")])
    assert [layer.mixer for layer in spec.pattern()] == ["gated_delta_net", "attention", "gated_delta_net"]
    assert [layer.options.get("heads") for layer in spec.pattern()] == [2, 2, 2]
    assert "rope_base" not in spec.pattern()[0].options
    started = start_model(spec, trained(base), blocks=kept)
    assert "blocks.0.mlp.up.weight" in started.carried
    assert all(".mixer." in name for name in (*started.new, *started.dropped))
    assert changed_blocks(base, [ReplaceSpec(mixer="sliding_window", options={"window": 4})])[0].layers[0].options == {
        "heads": 2, "rope_base": 500.0, "window": 4
    }  # fmt: skip


def test_layers_are_chosen_in_words_and_by_numbers():
    assert chosen_layers("all", 3) == [0, 1, 2]
    assert chosen_layers("half", 5) == [0, 2, 4]
    assert chosen_layers("2,0", 3) == chosen_layers([0, 2], 3) == [0, 2]
    assert len(changed_blocks(SPEC, [ReplaceSpec(mixer="gla")])[0].layers) == 1
    assert len(changed_blocks(SPEC, [ReplaceSpec(layers="half", mixer="gla")])[0].layers) == 2


def test_what_is_told_is_short():
    names = [f"blocks.{i}.{part}" for i in (0, 2) for part in ("mixer.a", "mixer.b", "mlp.up.weight")] + ["read_in.w"]
    assert gathered(names) == ["blocks.{0,2}.mixer.*", "blocks.{0,2}.mlp.up.weight", "read_in.w"]
    lines = plan_start(changed(depth=4, position="learned", max_length=8), SPEC, "zero").lines()
    assert lines[0].startswith("carried over: 26 of 29 tensors")
    assert lines[2:] == ["zero at the start: blocks.3.mixer.out_proj.weight, blocks.3.mlp.out_proj.weight",
                         "new: positions.weight"]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"init": "zero"}, "'zero' is for blocks that the source does not have"),
        ({}, {"init": "copied"}, "'copied' is for blocks that the source does not have"),
        ({}, {"init": "averaged"}, "fewer key and value heads, and there are none"),
        ({}, {"init": "zeros"}, "unknown init 'zeros'; did you mean 'zero'?"),
        ({"depth": 4, "residual": "none"}, {"init": "zero"}, "without a residual connection"),
        ({"width": 24}, {}, "nothing of the source fits"),
        ({}, {"blocks": [0, 1]}, "2 places for a model of 3 blocks"),
        ({}, {"blocks": [0, 1, 3]}, "the source has no block 3; expected 0 to 2"),
        ({}, {"blocks": [None] * 3}, "expected at least one"),
        ({"heads": 4, "layers": [{"mixer": "attention", "options": {"kv_heads": 4}}]}, {"init": "averaged"}, "none"),
    ],
)
def test_what_cannot_be_is_one_line(changes, options, message):
    for call in (lambda: plan_start(changed(**changes), SPEC, **options),
                 lambda: start_model(changed(**changes), trained(), **options)):  # fmt: skip
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_blocks_whose_forms_go_by_number_are_not_removed():
    spec = changed(linear=[{"layers": "blocks.1.*", "form": "int"}])
    with pytest.raises(InputError, match=r"remove: the form of 'blocks.1.\*' is given by a block's number"):
        changed_blocks(spec, remove=[0])
    assert changed_blocks(changed(linear=[{"layers": "blocks.*", "form": "int"}]), remove=[0])[1] == [1, 2]


@pytest.mark.parametrize(
    ("replace", "remove", "message"),
    [
        ([{"layers": "0,3", "mixer": "gla"}], (), "replace.layers: 3 is not among the 3 layers; expected 0 to 2"),
        ([{"layers": "odd", "mixer": "gla"}], (), "expected all, half or numbers such as 0,2, got str 'odd'"),
        ([{"layers": [1], "mixer": "gla"}], (1,), "block 1 is removed; leave it out here or there"),
        ([], (0, 1, 2), "all 3 blocks; at least one must stay"),
        ([], (5,), "remove: 5 is not among the 3 blocks"),
        ([{"layers": [], "mixer": "gla"}], (), "expected all, half or numbers such as 0,2, got none"),
        ([{"layers": "all"}], (), "expected mixer (a registered name) or options"),
        ([{"mixer": "glaa"}], (), "did you mean 'gla'?"),
        ([{"options": {"kv_head": 1}}], (), "did you mean 'kv_heads'?"),
    ],
)
def test_blocks_that_are_not_there_are_one_line(replace, remove, message):
    with pytest.raises(InputError) as caught:
        changed_blocks(SPEC, [ReplaceSpec.parse(each) for each in replace], remove)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_kept_in_a_linear_form_is_not_told_as_it_was():
    spec = changed(linear=[{"layers": "blocks.1.*", "form": "low_rank", "options": {"rank": 2}}])
    started = start_model(spec, trained())
    told = [line for line in started.plan.lines() if "nearest" in line]
    assert len(told) == 1
    assert told[0].startswith("not as they are but as the nearest low_rank:rank=2: blocks.1.mixer.*")
    assert plan_start(spec, SPEC).lines() == started.plan.lines()
    assert not [line for line in start_model(SPEC, trained()).plan.lines() if "nearest" in line]
