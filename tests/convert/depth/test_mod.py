"""Routers put in a trained model: which tokens they let through, healing, and what is refused."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model, build_task
from contextlab.convert import build_conversion, shrink
from contextlab.convert.depth.mod import fitted_router, moved_tokens, threshold
from contextlab.errors import InputError
from contextlab.models import ModelSpec, SkipSpec
from contextlab.testing.conversions import calibration, small_model, tokens

SIZES = {"width": 16, "heads": 2, "input_size": 12, "output_size": 12, "read_in": "token", "depth": 4}


def test_tokens_that_a_block_would_move_least_go_past_it():
    model, data = small_model(), calibration()
    made = build_conversion("mod", share=0.25, ahead=99)(model, data)
    assert [layer.skip and layer.skip.share for layer in made.model.spec.pattern()] == [None, 0.25, None]
    assert [line.layer for line in made.lines] == ["blocks.1"]
    made.model.requires_grad_(False)
    (read, far), block = moved_tokens(model, data, [1])[1], made.model.blocks[1]
    assert len(read) == data.tokens
    x = torch.cat([model.blocks[0](model.read_in(p.inputs), None, None, False, None, None)[0] for p, _ in data.batches])
    y = model.blocks[1](x, None, None, False, None, None)[0]
    torch.testing.assert_close(far, ((y - x).norm(dim=-1) / x.norm(dim=-1)).log().flatten())
    design = torch.cat((read, torch.ones(len(read), 1, dtype=torch.float64)), 1)
    best = design @ torch.linalg.lstsq(design, far[:, None]).solution[:, 0]
    score = read @ block.router.weight
    assert torch.corrcoef(torch.stack((best, score)))[0, 1] > 0.999, "the ridge is small"
    through = read @ block.router.choice + block.router.bias > 0
    assert int(through.sum()) == -(-len(read) // 4)
    assert score[through].min() > score[~through].max()
    routed = block(x, None, None, False, None, None)[0]
    cosines = torch.cosine_similarity(routed, y, dim=-1)
    assert made.lines[0].error == pytest.approx(float(1 - cosines.mean().detach()))
    assert made.model(tokens()).isfinite().all()


def test_rounding_chooses_no_token():
    score = torch.tensor([3.0, 2.0, 2.0, 2.0, 2.0 - 1e-9, 1.0, 0.0])
    assert [threshold(score, count) for count in (1, 2, 4, 5, 7)] == [2.5, 2.5, 1.5, 1.5, 0.5]
    one = torch.ones(5, 16, dtype=torch.float64)
    with torch.no_grad():
        router = fitted_router(one, torch.zeros(5, dtype=torch.float64), SkipSpec(share=0.5))
    assert not router.weight.any()
    assert (one[0] @ router.choice + router.bias).tolist() == [1.0]


def test_healing_trains_the_routers_and_what_they_choose_by():
    task = build_task("associative_recall", vocabulary=12, pairs=2, length=8)
    model = build_model({**SIZES, "input_size": task.input_size, "output_size": task.output_size, "depth": 2})
    plain, healed = (shrink(model, "mod:share=0.5", task, prompts=8, heal=heal) for heal in (0, 3))
    for name in ("weight", "choice", "bias"):
        before, after = (getattr(found.model.blocks[1].router, name) for found in (plain, healed))
        assert not torch.equal(before, after), name
    assert healed.healed.status == "finished"
    assert not healed.model.training
    before, after = healed.state[1024]
    assert after == before // 2 + model.blocks[1].mixer.state_nbytes(520) + 8


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ({}, {"every": 9}, "every: the model has 4 blocks, so at most 4, got 9"),
        ({"layers": [{"mixer": "gla", "share": "a"}]}, {}, "mod: blocks.1 shares its weights with others"),
        ({"layers": [{"mixer": "gla", "skip": 0.5}]}, {}, "mod: blocks.1 has a router already"),
        ({"layers": ["fnet"]}, {}, "mod: blocks.1: skip: 'fnet' reads both ways"),
        ({"layers": ["gla", {"mixer": "gla", "with_input": True}]}, {}, "mod: blocks.1: skip: not for a layer"),
        ({"residual": "none"}, {}, "residual 'none' has none"),
    ],
)
def test_what_cannot_have_routers_is_told(spec, options, words):
    with pytest.raises(InputError, match=words):
        build_conversion("mod", **options).plan(ModelSpec.parse({**SIZES, **spec}))
    for share in (0, 1.5):
        with pytest.raises(InputError, match="share: "):
            build_conversion("mod", share=share)


def test_looped_blocks_have_one_router_for_all_their_times():
    model = build_model({**SIZES, "loops": 2}).double().eval()
    made = build_conversion("mod", share=0.5, ahead=0, every=4)(model, calibration()).model
    state = made.read(tokens())[1]
    assert len(state.layers) == 8
    assert state.nbytes <= made.state_nbytes(20, 2, torch.float64)
