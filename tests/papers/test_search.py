"""Looking for papers by words."""

from __future__ import annotations

import pytest

from contextlab.errors import InputError
from contextlab.papers import papers, search


def test_the_question_of_the_readme_finds_methods_that_evict():
    found = search("evict kv cache while decoding", most=8)
    assert len(found.hits) == 8
    assert (
        sum("cache" in f"{hit.paper.contributes} {hit.paper.claim} {hit.paper.area}".lower() for hit in found.hits) >= 7
    )
    scores = [hit.score for hit in found.hits]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0


def test_every_paper_is_among_the_first_for_its_own_title():
    for paper in papers():
        hits = search(paper.title, most=3).hits
        assert paper.id in {hit.paper.id for hit in hits}, paper.id


def test_a_wrong_letter_is_read_as_the_word_that_was_meant():
    wrong, right = search("quantizaton"), search("quantization")
    assert wrong.read_as == {"quantizaton": "quantization"}
    assert [hit.paper.id for hit in wrong.hits] == [hit.paper.id for hit in right.hits]


def test_words_of_no_paper_find_nothing_and_no_words_are_refused():
    assert search("xqzzxq").hits == ()
    with pytest.raises(InputError, match="expected words"):
        search("of the")


@pytest.mark.parametrize("text", ['"', "a\" OR papers MATCH 'x", "NEAR(", "kv* -cache", "(quantization)"])
def test_signs_of_the_query_language_are_no_commands(text):
    try:
        search(text)
    except InputError as error:
        assert "expected words" in str(error)
