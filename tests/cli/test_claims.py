"""`contextlab claims`."""

from __future__ import annotations

import json

import yaml

from contextlab.claims import claim_files
from contextlab.papers import verdicts

from ..claims.conftest import TINY


def test_the_list_names_every_claim(call, tmp_path):
    code, out, _ = call("claims", "list", "--folder", str(tmp_path))
    assert code == 0
    assert all(name in out for name in claim_files())
    code, out, _ = call("claims", "list", "--folder", str(tmp_path), "--json")
    assert {each["claim"]: each["verdict"] for each in json.loads(out)} == {
        name: verdicts()[name]["verdict"] if name in verdicts() else "-" for name in claim_files()
    }


def test_a_claim_of_ones_own_is_run_told_and_kept(call, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(TINY))
    code, out, _ = call("claims", "run", str(file), "--folder", str(tmp_path / "claims"), "--jobs", "1")
    assert code == 0
    assert "Verdict: holds" in out
    assert "at least 0" in out
    assert (tmp_path / "claims" / "mine" / "run" / "report.html").exists()
    code, out, _ = call("claims", "run", str(file), "--folder", str(tmp_path / "claims"), "--json")
    assert json.loads(out)["verdict"] == "holds"


def test_bad_input_is_one_line(call, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump({**TINY, "predicate": [{**TINY["predicate"][0], "at_most": 1.0}]}))
    wrong = (
        (("run",), "a claim's name or --all"),
        (("run", "few-attention-layers-restore-recall", "--all"), "one of them"),
        (("run", "few-attention-layer-restores-recall"), "did you mean 'few-attention-layers-restore-recall'?"),
        (("run", str(broken)), "predicate.0: expected at_least or at_most, one of them"),
        (("run", "transformers-match-least-squares", "--budget", "quik"), "did you mean 'quick'?"),
        (("run", "transformers-match-least-squares", "--budget", "gpu"), "has no form for a GPU"),
    )
    for arguments, told in wrong:
        code, _, err = call("claims", *arguments)
        assert code == 2, arguments
        assert told in err, err
        assert err.count("\n") == 1, err


def test_the_report_is_one_page(call, tmp_path):
    code, _, _ = call("claims", "report", "--out", str(tmp_path / "claims.html"))
    assert code == 0
    text = (tmp_path / "claims.html").read_text()
    assert f"{len(claim_files())} of" not in text  # the script counts
    assert text.count("contextlab claims run") == len(claim_files())


def test_an_interrupted_claim_says_how_to_go_on(call, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("contextlab.claims.run_claim", stop)
    code, _, err = call("claims", "run", "linear-attention-descends", "--folder", str(tmp_path))
    assert code == 130
    assert err == "interrupted; the same command goes on where it was\n"
