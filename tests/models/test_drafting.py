"""A model that drafts for itself: exactly the tokens of plain decoding, and fewer readings of all layers."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model
from contextlab.errors import InputError
from contextlab.models import DraftSpec, Model, ModelSpec, generate_drafted
from contextlab.policies import build_policy

SIZES = {"width": 16, "depth": 4, "heads": 2, "input_size": 11, "output_size": 11, "read_in": "token"}
PROMPT = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))


def of(mixer: str, **options: object) -> dict[str, object]:
    return {"mixer": mixer, "options": options}


SPECS = {
    "attention": {},
    "convolved": {"layers": [of("attention", short_conv=3)], "position": "learned", "max_length": 31},
    "windows": {"layers": [of("sliding_window", window=4), "forgetting_attention"]},
    "delta": {"layers": ["gated_delta_net", of("mla", rank=6, rope_dim=4)]},
    "state space": {"layers": ["mamba2", "rg_lru"]},
    "ids": {"layers": [of("ngram", n=2), "log_linear_attention"]},
    "looped": {"loops": 2, "depth": 2, "input_injection": True, "layers": ["attention", "gla"]},
    "shared": {"layers": ["attention", {"mixer": "attention", "kv": "shared"}, {"mixer": "gla", "with_input": True},
                          {"mixer": "attention", "skip": 0.5}]},
}  # fmt: skip


def noisy(**options: object) -> Model:
    """Whose read-out is sure of some tokens, and whose layers each change the answer."""
    torch.manual_seed(0)
    model = build_model(ModelSpec.parse({**SIZES, **options})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    return model


@pytest.mark.parametrize("name", SPECS)
def test_the_tokens_are_those_of_plain_decoding(name):
    model = noisy(**SPECS[name])
    total = model.spec.depth * model.spec.loops
    plain = model.generate(PROMPT, 13)
    kept = drafted = 0
    for layers, ahead, rows in ((1, 2, 1), (total - 1, 4, 1), (total // 2, 3, 3)):
        found = generate_drafted(model, PROMPT[:rows], 13, {"layers": layers, "ahead": ahead})
        assert torch.equal(found.tokens, plain[:rows])
        assert found.accepted + found.passes == 12
        assert found.per_pass == 12 / found.passes
        kept, drafted = kept + found.accepted, drafted + found.drafted
    assert 0 < kept < drafted, "some drafts are right, some are not"


def test_layers_that_check_are_read_once_for_all_that_is_drafted():
    model, calls = noisy(), {0: [], 3: []}
    with torch.no_grad():
        for block in model.blocks[2:]:  # which add nothing, so that the first two are always right
            for parameter in (block.mixer.out_proj.weight, block.mlp.out_proj.weight):
                parameter.zero_()
    for number, seen in calls.items():
        model.blocks[number].register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].shape[1]))
    found = generate_drafted(model, PROMPT[:1], 12, DraftSpec(layers=2, ahead=4))
    assert calls == {0: [9, *[1] * 11], 3: [9, 5, 5, 1]}
    assert (found.drafted, found.accepted, found.passes) == (8, 8, 3)
    assert found.acceptance == 1
    assert found.per_pass == pytest.approx(11 / 3)


def test_rows_may_be_padded_and_few_tokens_asked_for():
    model, place = noisy(**SPECS["delta"]), torch.arange(9)
    mask = torch.stack([place >= 0, place >= 4, place < 5])
    found = model.generate(PROMPT, 10, mask=mask, draft={"layers": 2})
    assert torch.equal(found, model.generate(PROMPT, 10, mask=mask))
    for few in (0, 1, 2):
        less = generate_drafted(model, PROMPT, few, {"layers": 2}, mask=mask)
        assert torch.equal(less.tokens, found[:, :few])
        assert less.drafted == 0


def test_what_cannot_draft_is_refused():
    model = noisy()
    for options, draft, words in (
        ({}, {"layers": 4}, "draft.layers: 4 of 4 layers; 1 to 3 can draft for all"),
        ({}, {"layers": 2, "ahead": 0}, "draft.ahead: "),
        ({}, {"layers": 2, "aheads": 2}, "draft.aheads: unknown key"),
        ({"depth": 1}, {"layers": 1}, "a model of one layer has none that could draft"),
        ({"exit": {}}, {"layers": 2}, r"tokens leave this model early already \(exit\)"),
        ({"read_in": "vector"}, {"layers": 2}, "this model reads vectors"),
        ({"layers": ["fnet"]}, {"layers": 2}, r"block 0 \(FNet\) reads both ways"),
    ):
        with pytest.raises(InputError, match=words):
            generate_drafted(noisy(**options) if options else model, PROMPT, 4, draft)
    with pytest.raises(InputError, match="generate: expected a prompt"):
        model.generate(PROMPT[:, :0], 4, draft={"layers": 2})
    with pytest.raises(InputError, match="leave out draft, or temperature"):
        model.generate(PROMPT, 4, temperature=1.0, generator=torch.Generator(), draft={"layers": 2})
    with build_policy("streaming_llm").attach(model), pytest.raises(InputError, match="a policy is attached"):
        model.generate(PROMPT, 4, draft={"layers": 2})
    with torch.no_grad():
        model.blocks[3].mlp.out_proj.weight.fill_(float("nan"))
    with pytest.raises(InputError) as plain:
        model.generate(PROMPT, 4)
    with pytest.raises(InputError) as drafted:
        model.generate(PROMPT, 4, draft={"layers": 2})
    assert str(drafted.value) == str(plain.value)
