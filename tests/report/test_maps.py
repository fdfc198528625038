"""Interactive maps in a page: what is packed is what was measured, to three digits, and pages stay small."""

from __future__ import annotations

import json

import torch

from contextlab.inspect.viewing import Viewed, ViewedPart, ViewedPrompt
from contextlab.report.maps import looked_maps
from contextlab.report.packing import unpacked


def viewed(title, length=6, prompts=1, heads=2, seed=0):
    """Shares that are drawn, of which causal mixers have none ahead."""
    drawn = torch.randn(prompts, heads, length, length, generator=torch.Generator().manual_seed(seed)).tril()
    maps = list(drawn / drawn.abs().sum(-1, keepdim=True))
    words = ["</script><b>", "\n", *(f"w{place}" for place in range(2, length))]
    shown = [ViewedPrompt(words, [""] * length, {length - 1: ("a", "b")}, list(range(length))) for _ in range(prompts)]
    return Viewed(title, shown, [ViewedPart("layer 0", [f"head {head}" for head in range(heads)], maps)])


def held(page):
    return json.loads(unpacked(page)["maps"])


def test_the_page_holds_shares_in_thousandths():
    one = viewed("task / model")
    page = looked_maps([one])
    (found,) = held(page)
    assert found["title"] == "task / model"
    assert found["prompts"][0]["words"] == one.prompts[0].words
    assert found["prompts"][0]["wanted"] == {"5": ["a", "b"]}
    for head in range(2):
        rows = found["parts"][0]["maps"][0][head]
        for place, row in enumerate(rows):
            assert len(row) <= place + 1
            whole = torch.tensor(row + [0] * (6 - len(row))) / 1000
            torch.testing.assert_close(whole, one.parts[0].maps[0][head, place], rtol=0, atol=5.01e-4)
    assert "</script><b>" not in page
    assert "http" not in page  # nothing is fetched


def test_of_long_prompts_the_first_tokens_are_one():
    one = viewed("long", length=260, heads=1)
    (found,) = held(looked_maps([one]))
    prompt = found["prompts"][0]
    assert prompt["hidden"] == 4
    assert len(prompt["words"]) == 256
    row = found["parts"][0]["maps"][0][0][-1]
    hidden = one.parts[0].maps[0][0, prompt["rows"][-1], :4].abs().sum()
    assert row[0] == round(1000 * hidden.item())
    assert sum(map(abs, row)) > 800


def test_pages_stay_small_by_fewer_tokens_then_prompts_then_models(monkeypatch):
    many = [viewed(f"model {number}", length=48, prompts=2, heads=4, seed=number) for number in range(4)]
    whole = held(looked_maps(many))
    assert [len(each["prompts"]) for each in whole] == [2] * 4
    assert len(whole[0]["prompts"][0]["rows"]) == 48
    sizes = []
    for most in (20_000, 12_000, 5_000):
        monkeypatch.setattr("contextlab.report.maps.MOST_BYTES", most)
        page = looked_maps(many)
        kept = held(page)
        left_out = [each.title for each in many[len(kept) :]]
        assert [each["title"] for each in kept] == [each.title for each in many[: len(kept)]]
        assert (f"{'; '.join(left_out)}. Name one model" in page) == bool(left_out)
        assert len(page) < most + 20_000
        sizes.append((len(kept), len(kept[0]["prompts"]), len(kept[0]["prompts"][0]["rows"])))
    assert sizes[0][:2] == (4, 1)
    assert sizes[1][2] < 40
    assert 0 < sizes[2][0] < 4
