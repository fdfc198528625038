"""`contextlab papers`."""

from __future__ import annotations

import json

from contextlab.papers import STATUSES, areas, papers


def test_areas_add_up(call):
    code, out, _ = call("papers")
    assert code == 0
    assert all(area.name in out for area in areas())
    assert next(line.split()[1] for line in out.splitlines() if line.split()[:1] == ["all"]) == str(len(papers()))


def test_filters_list_papers(call):
    code, out, _ = call("papers", "--area", "kv-cache", "--json")
    assert code == 0
    assert [each["id"] for each in json.loads(out)] == [each.id for each in papers(area="kv-cache")]
    code, out, _ = call("papers", "--area", "kv-cache", "--since", "2025")
    assert code == 0
    assert all(each.id in out for each in papers(area="kv-cache", since=2025))


def test_search_shows_and_forgives(call):
    code, out, _ = call("papers", "search", "evcit kv cache", "--most", "3")
    assert code == 0
    assert "no paper has 'evcit': read as 'evict'" in out
    code, out, _ = call("papers", "search", "evict kv cache", "--most", "3", "--json")
    assert len(json.loads(out)) == 3


def test_show_tells_status_and_commands(call):
    code, out, _ = call("papers", "show", "1706.03762")
    assert code == 0
    assert "Attention Is All You Need" in out
    assert "contextlab show mixer attention" in out
    code, out, _ = call("papers", "show", "1706.03762", "--json")
    assert json.loads(out)["commands"]


def test_cite_and_digest_are_plain_text(call, tmp_path):
    code, out, _ = call("papers", "cite", "1706.03762")
    assert code == 0
    assert out.startswith("@misc{vaswani2017attention,\n")
    page = tmp_path / "page.md"
    assert call("papers", "digest", "--area", "kv-cache", "--out", str(page))[0] == 0
    assert page.read_text().startswith("# ")
    code, _, err = call("papers", "digest", "--area", "kv-cache", "--out", str(page))
    assert code == 2
    assert "page.md: is there already; remove it or choose another name" in err


def test_what_is_not_known_is_one_line(call):
    for arguments in (
        ("--area", "kvcache"),
        ("--status", "done"),
        ("show", "1706.0377"),
        ("cite", "nope nope"),
        ("search", "the"),
    ):
        code, _, err = call("papers", *arguments)
        assert code == 2, arguments
        assert err.count("\n") == 1, err


def test_help_names_every_status(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call("papers", "--help")
    assert code == 0
    assert all(status in out for status in STATUSES)
