"""The page of all claims."""

from __future__ import annotations

import re

import pytest

from contextlab.claims import claim_files, claims_page, page
from contextlab.papers import find

RECORD = {
    "verdict": "fails",
    "seeds": 3,
    "cost": {"processor_seconds": 90.0, "whole": True},
    "outcomes": [
        {"said": "a less b", "value": 0.5, "low": 0.25, "high": 0.75, "at_least": 0.125, "holds": True},
        {"said": "c less d", "value": 2.0, "low": None, "high": None, "at_most": 1.0, "holds": None},
        {"said": "e less f", "value": None, "low": None, "high": None, "at_most": 1.0, "holds": None},
        {"said": "g less h", "value": 3.0, "low": 3.0, "high": 3.0, "at_most": 1.0, "holds": False},
    ],
}


@pytest.fixture
def text(tmp_path, monkeypatch):
    first = next(iter(claim_files()))
    monkeypatch.setattr(page, "published", lambda claim: None)
    monkeypatch.setattr(page, "decided", lambda claim, folder: RECORD if claim.name == first else None)
    return claims_page(tmp_path / "claims.html").read_text()


def test_the_page_tells_every_claim_with_its_paper_and_is_whole(text):
    for name in claim_files():
        assert f"contextlab claims run {name}" in text
    for paper in re.findall(r'href="https://arxiv.org/abs/([^"]+)"', text):
        assert find(paper).title.split("$")[0][:20] in text
    assert not re.search(r'src="|@import|url\(', text)  # nothing is loaded


def test_verdicts_are_counted_and_outcomes_drawn(text):
    assert "1 fails" in text
    assert f"{len(claim_files()) - 1} not tested" in text
    assert "<b>0.5</b> (0.25 to 0.75), asked at least 0.125" in text
    assert "<b>2</b> (? to ?), asked at most 1" in text
    assert ">1.5</td>" in text
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == 3  # of what has a value


def test_an_interval_lies_where_its_numbers_do():
    told = {"value": 0.5, "low": 0.25, "high": 0.75, "at_least": 0.125, "holds": True}
    drawn = str(page._drawn(told, 0.125, True))
    x = float(re.search(r'<line x1="([\d.]+)" y1="0"', drawn)[1])
    low, high = map(float, re.search(r'<line x1="([\d.]+)" y1="11" x2="([\d.]+)"', drawn).groups())
    dot = float(re.search(r'cx="([\d.]+)"', drawn)[1])
    assert 0 < x < low < dot < high < page.WIDTH
    assert dot == pytest.approx((low + high) / 2, abs=0.1)
    assert (low - x) / (high - low) == pytest.approx(0.25, abs=0.01)
    assert f'<rect x="{x}" y="0" width="{round(page.WIDTH - x, 1)}"' in drawn  # at least: to the right
