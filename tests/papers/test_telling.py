"""BibTeX entries and digests."""

from __future__ import annotations

import re

import pytest

from contextlab.errors import InputError
from contextlab.papers import Paper, areas, bibtex, digest, papers

PAPER = Paper(
    id="2006.16236",
    name="Linear Transformers",
    title="Transformers are RNNs: 50% of A_B & $O(n_2)$",
    authors="Angelos Katharopoulos and Apoorv Vyas and others",
    year=2020,
    contributes="x",
    claim="y",
    status="planned",
)


def test_a_bibtex_entry_has_the_fields_of_an_arxiv_paper():
    assert bibtex(PAPER) == (
        "@misc{katharopoulos2020transformers,\n"
        "  title = {{Transformers are RNNs: 50\\% of A\\_B \\& $O(n_2)$}},\n"
        "  author = {Angelos Katharopoulos and Apoorv Vyas and others},\n"
        "  year = {2020},\n"
        "  eprint = {2006.16236},\n"
        "  archivePrefix = {arXiv},\n"
        "  url = {https://arxiv.org/abs/2006.16236}\n"
        "}"
    )


def test_what_is_not_on_arxiv_is_cited_by_its_address():
    told = bibtex(PAPER.model_copy(update={"id": "doi:10.1162/neco.1997.9.8.1735"}))
    assert "  doi = {10.1162/neco.1997.9.8.1735},\n  url = {https://doi.org/10.1162/neco.1997.9.8.1735}" in told
    assert "eprint" not in told


def test_every_entry_has_balanced_braces_and_a_plain_key():
    for paper in papers():
        told = bibtex(paper)
        assert told.count("{") == told.count("}"), paper.id
        assert re.match(r"@misc\{[a-z]+\d{4}[a-z0-9]*,\n", told), told


def test_a_digest_tells_all_papers_of_an_area_in_order():
    for area in areas():
        page = digest(area.name)
        heads = re.findall(r"^## (.*) \(\d{4}\)$", page, re.MULTILINE)
        assert heads == [paper.name for paper in area.papers]
        assert page.count("```") % 2 == 0


def test_a_digest_of_new_papers_only():
    area = max(areas(), key=lambda each: len(each.papers))
    newest = max(paper.year for paper in area.papers)
    assert digest(area.name, since=newest).count("\n## ") == sum(paper.year == newest for paper in area.papers)
    with pytest.raises(InputError, match=f"the newest is of {newest}"):
        digest(area.name, since=newest + 1)
    with pytest.raises(InputError, match="did you mean"):
        digest(area.name + "x")
