"""Progress where a person watches: in terminals and notebooks, nothing elsewhere; and what objects show."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import contextlab
from contextlab import progress, threads
from contextlab.errors import InputError
from contextlab.evaluation import evaluate
from contextlab.experiments.progress import Silent, told
from contextlab.spec import Spec
from contextlab.training import TrainSpec, train
from tests.experiments.test_run import one
from tests.training.tiny_training import Sums, Tiny

STEPS = TrainSpec(steps=4, batch=2, log_every=2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def notebook(monkeypatch):
    """A stand-in for IPython in a kernel; the pages that were displayed, the last drawn anew."""
    pages: list[str] = []

    class ZMQInteractiveShell: ...

    def display(page, display_id):
        pages.append(page)
        return SimpleNamespace(update=pages.append)

    module = ModuleType("IPython")
    module.get_ipython = ZMQInteractiveShell
    module.display = SimpleNamespace(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython", module)
    return pages


def test_a_training_shows_a_bar_in_a_terminal_and_nothing_in_a_pipe(monkeypatch, capsys):
    train(Tiny(), Sums(), STEPS)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", watched := Terminal())
    train(Tiny(), Sums(), STEPS)
    assert "4/4" in watched.getvalue()
    monkeypatch.setattr(sys, "stderr", silenced := Terminal())
    train(Tiny(), Sums(), STEPS, progress=False)
    assert silenced.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", asked := io.StringIO())
    train(Tiny(), Sums(), STEPS, progress=True)
    assert "4/4" in asked.getvalue()


def test_a_training_shows_an_element_in_a_notebook(notebook):
    train(Tiny(), Sums(), STEPS)
    assert len(notebook) == 2
    assert '<progress value="4" max="4">' in notebook[-1]
    assert "loss" in notebook[-1]


def test_a_run_and_a_training_take_the_same_function(tmp_path, notebook):
    calls: list[tuple] = []
    done = contextlab.run(one(), out=tmp_path / "run", progress=lambda step, steps, loss: calls.append((step, steps)))
    assert calls
    assert calls[-1][0] == calls[-1][1]
    assert notebook == []
    # A run shows what it found.
    assert repr(done) == f"Run({str(tmp_path / 'run')!r}, finished; trainings: {len(done.records)} finished)"
    page = done._repr_html_()
    assert "<th>accuracy</th>" in page
    assert "report.html" in page
    assert "<li>" in page


def test_what_is_no_progress_is_refused():
    with told(None) as tell:
        assert isinstance(tell, Silent)
    with told(tell) as same:
        assert same is tell
    with pytest.raises(InputError, match="expected True, False, a function of"), told(3):
        pass


def test_bars_tell_phases_and_ends(notebook):
    with progress.bars(True) as bars:
        bars.update("recall.<a>", 1, 4, 0.5)
        bars.phase("recall.<a>", "evaluating")
        bars.done("recall.<a>", "finished", "")
    assert "recall.&lt;a&gt;" in notebook[-1]
    assert '<progress value="1" max="4">' in notebook[-1]
    assert notebook[-1].endswith("finished</div></div>")


def test_a_table_of_results_prints_all_of_its_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    found = evaluate(contextlab.build_learner("averaging"), contextlab.build_task("linear_regression"), prompts=4)
    printed = repr(found)
    assert "..." not in printed.splitlines()[0]
    assert all(column in printed for column in found.columns)
    assert type(found[found["value"] > 0]).__name__ == "DataFrame"


def test_specs_and_trainings_show_themselves_in_notebooks():
    page = TrainSpec(steps=7)._repr_html_()
    assert yaml.safe_load(page.partition("<pre>")[2].partition("</pre>")[0]) == {"steps": 7}
    assert "all defaults" in TrainSpec()._repr_html_()
    assert isinstance(TrainSpec(), Spec)
    shown = train(Tiny(), Sums(), STEPS)._repr_html_()
    assert "finished after 4 steps" in shown
    assert "learning_rate" in shown


def test_spinning_threads_on_a_busy_machine_are_warned_of_once(monkeypatch):
    for name in threads.OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_warned", False)
    monkeypatch.setattr(threads, "_busy", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads.warn_of_spinning(2)
        monkeypatch.setattr(threads, "_busy", lambda: True)
        threads.warn_of_spinning(1)
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
        threads.warn_of_spinning(2)
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.warns(RuntimeWarning, match="torch's 2 threads spin"):
        threads.warn_of_spinning(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads.warn_of_spinning(2)


def test_contextlab_chooses_how_threads_wait_where_it_comes_before_torch(tmp_path):
    """On a machine that is busy by what `/proc` says; nothing is chosen after torch was loaded."""
    code = (
        "import os, pathlib, sys;"
        "[os.environ.pop(n, None) for n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')];"
        "os.getloadavg = lambda: (9.0,) * 3; pathlib.Path.read_text = lambda self, *a: '9 9 9 9/99 1';"
        "sys.modules.update({late}); import contextlab; print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    for late, chosen in (("{}", "passive"), ("{'torch': sys}", "None")):
        done = subprocess.run([sys.executable, "-c", code.replace("{late}", late)], capture_output=True, text=True)
        assert done.stdout.strip() == chosen, done.stderr
