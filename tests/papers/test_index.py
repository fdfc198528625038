"""The index of papers: its entries, its two-way pointers to components, and what it refuses."""

from __future__ import annotations

import pydoc
import shlex

import pytest
from typer.testing import CliRunner

import contextlab.papers.index as index
from contextlab import registry
from contextlab.cli.commands import app
from contextlab.cli.shared import load_components
from contextlab.errors import InputError
from contextlab.experiments import recipes
from contextlab.papers import Paper, areas, find, papers, read_area, verdicts
from contextlab.strict_yaml import parse_yaml

ENTRY = {
    "id": "2401.00001",
    "name": "Thing",
    "title": "A thing",
    "authors": "Ann Example and others",
    "year": 2024,
    "contributes": "It adds a thing.",
    "claim": "Twice as good.",
    "status": "implemented",
    "components": ["mixer attention"],
}


def one(**changes):
    return {key: value for key, value in (ENTRY | changes).items() if value is not None}


def area_text(*entries):
    import yaml

    return yaml.safe_dump({"title": "Things", "about": "About things.", "papers": list(entries)})


def test_an_entry_is_read_with_its_area():
    area = read_area(area_text(one()), "papers/things.yaml")
    assert area.papers == (Paper(**ENTRY, area="things"),)
    assert area.papers[0].commands == ("contextlab show mixer attention",)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": "24011.1"}, "arXiv id"),
        ({"id": "2413.00001"}, "year: 2024, where 2413.00001"),
        ({"year": 2023}, "year: 2023, where 2401.00001 is of 01/2024"),
        ({"titel": "x"}, "titel: unknown key; did you mean 'title'?"),
        ({"claim": None}, "claim: required, but missing"),
        ({"status": "implementd"}, "did you mean 'implemented'?"),
        ({"status": "planned"}, "status: planned, though components or run say what runs"),
        ({"components": None}, "status: implemented, though neither components nor run"),
        ({"status": "partly"}, "missing: expected what does not run here"),
        ({"missing": "much"}, "missing: it is for papers that run in part, where this one is implemented"),
        ({"status": "out of scope", "components": None}, "reason: it is for papers that are out of scope"),
        ({"name": ""}, "name: "),
    ],
)
def test_a_malformed_entry_names_file_paper_and_key(changes, told):
    with pytest.raises(InputError) as error:
        read_area(area_text(one(**changes)), "papers/things.yaml")
    assert str(error.value).startswith(f"papers/things.yaml: paper {changes.get('id', ENTRY['id'])}: ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "not valid YAML"),
        ("title: x", "expected a mapping of title, about, papers"),
        ("title: x\nabout: ''\npapers: []", "about: expected text"),
        ("title: x\nabout: y\npapers: {}", "papers: expected a list of papers"),
        ("title: x\nabout: y\npapers: [7]", "paper 0: "),
    ],
)
def test_a_file_that_is_no_area_is_refused_by_name(text, told):
    with pytest.raises(InputError) as error:
        read_area(text, "papers/things.yaml")
    assert str(error.value).startswith("papers/things.yaml: ")
    assert told in str(error.value)


@pytest.fixture
def few(monkeypatch):
    """An index of three papers."""
    entries = [
        one(),
        one(id="2401.00002", name="Other thing", title="Another thing", rows=["001-001"]),
        one(id="doi:10.1000/abc", name="Old", title="An old work", year=1999),
    ]
    area = read_area(area_text(*entries), "papers/things.yaml")
    monkeypatch.setattr(index, "areas", lambda: (area,))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2401.00001", "2401.00001"),
        ("2401.00001v3", "2401.00001"),
        ("arXiv:2401.00001", "2401.00001"),
        ("https://arxiv.org/pdf/2401.00001v2.pdf", "2401.00001"),
        ("thing", "2401.00001"),
        ("another THING", "2401.00002"),
        ("001-001", "2401.00002"),
        ("old work", "doi:10.1000/abc"),
        ("doi:10.1000/abc", "doi:10.1000/abc"),
    ],
)
def test_a_paper_is_found_by_what_people_write(few, text, wanted):
    assert find(text).id == wanted


def test_ambiguous_and_unknown_papers_are_told_with_the_nearest(few):
    with pytest.raises(InputError, match=r"may be 2 papers: 2401.00001 Thing; 2401.00002 Other thing; give the id"):
        find("2401.0000")
    with pytest.raises(InputError, match=r"did you mean 2401.00002"):
        find("2401.00092")
    with pytest.raises(InputError, match=r"did you mean 2401.00001 \(Thing\)"):
        find("thnig")
    with pytest.raises(InputError, match="papers search TEXT"):
        find("qqqqqqqqqqqq")


def test_filters_hold_together_and_refuse_what_is_not_known(few):
    assert [each.id for each in papers(since=2000)] == ["2401.00001", "2401.00002"]
    assert papers(area="things", status="planned") == []
    with pytest.raises(InputError, match="did you mean 'things'"):
        papers(area="thinks")
    with pytest.raises(InputError, match="did you mean 'planned'"):
        papers(status="planed")


def test_the_files_of_the_index_are_strict_yaml():
    for each in index.files("contextlab.papers").iterdir():
        if each.name.endswith(".yaml"):
            parse_yaml(each.read_text(encoding="utf-8"), each.name)


def test_components_point_to_papers_and_papers_to_components():
    load_components(None, tuple(registry.kinds()))
    theirs = {
        (paper, f"{kind} {entry.name}")
        for kind in registry.kinds()
        for entry in registry.entries(kind)
        if entry.factory.__module__.startswith("contextlab.")
        for paper in entry.papers
    }
    ours = {(paper.id, component) for paper in papers() for component in paper.components}
    assert ours == theirs


def test_what_a_paper_says_to_run_can_be_run():
    """Each command exists, takes these options, and names things that exist; what is Python can be imported."""
    runner, names = CliRunner(), {recipe.name for recipe in recipes()}
    for command in dict.fromkeys(command for paper in papers() for command in paper.run):
        if " " not in command:
            assert command.startswith("contextlab.")
            assert pydoc.locate(command) is not None, command
            continue
        program, verb, *rest = shlex.split(command)
        assert program == "contextlab", command
        told = runner.invoke(app, [verb, "--help"])
        assert told.exit_code == 0, command
        for option in (each.partition("=")[0] for each in rest if each.startswith("--")):
            assert option in told.output, command
        if verb in ("run", "learners") and not rest[0].endswith((".yaml", "/")):
            assert rest[0] in names, command


def test_every_paper_stands_once_with_its_rows():
    rows = [row for paper in papers() for row in paper.rows]
    assert len(rows) == len(set(rows))
    assert len({paper.name.lower() for paper in papers()}) == len(papers())
    for area in areas():
        assert area.papers == tuple(papers(area=area.name))


def test_reproduced_and_contradicted_are_earned_by_verdicts():
    known = {record["paper"]: set() for record in verdicts().values()}
    for record in verdicts().values():
        known[record["paper"]].add(record["verdict"])
    assert set(known) <= {paper.id for paper in papers()}
    for paper in papers():
        found = known.get(paper.id, set())
        assert (paper.status == "contradicted") == ("fails" in found), paper.id
        assert (paper.status == "reproduced") == ("holds" in found and "fails" not in found), paper.id
