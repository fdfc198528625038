"""What --help and the lists say."""

from __future__ import annotations

import inspect

from contextlab.cli.catalogue import _cells
from contextlab.cli.commands import app
from contextlab.cli.run import run as cli_run
from contextlab.cli.sweep import sweep as cli_sweep


def test_help_shows_all_of_the_docstring(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in app.registered_commands:
        code, out, _ = call(command.name, "--help")
        assert code == 0
        told = "".join(inspect.getdoc(command.callback).split())
        assert told in "".join(out.split()), command.name


def test_a_sweep_takes_every_option_of_a_run():
    def options(command):
        return {name: each.default for name, each in inspect.signature(command).parameters.items()}

    own = {"over": None, "trials": None, "sampler": None, "halving": None}
    assert options(cli_sweep) == options(cli_run) | own


def test_list_without_a_kind_names_the_kinds(call):
    code, _, err = call("list")
    assert code == 2
    assert "recipes" in err
    assert err.count("\n") == 1


def test_the_summary_of_a_recipe_is_a_whole_sentence():
    row = {"name": "garg", "summary": "The functions of Garg et al. (2208.01066): linear. For a GPU."}
    assert _cells("recipe", row)["what it is"] == "The functions of Garg et al. (2208.01066): linear."
