"""`contextlab.testing` as a stranger uses it: by pytest, by the command line; and what README says of the laws."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from contextlab import registry
from contextlab.errors import InputError
from contextlab.plugins import load_plugins
from contextlab.tasks.regression import LinearRegression
from contextlab.testing import Component, Law, LawBroken, check, components, laws, parametrize_with_laws
from contextlab.testing.learners import of_task
from tests.cli.conftest import call  # noqa: F401

PLUGIN = '''
import torch
from contextlab.mixers.base import Mixer
from contextlab.registry import register
from contextlab.state import RecurrentState

@register("mixer", "running_mean", cases=({}, {"peek": True}), family="static")
class RunningMean(Mixer):
    """The mean of the tokens so far."""

    parallel_form = "scan"

    def __init__(self, width: int, peek: bool = False) -> None:
        super().__init__(width)
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.peek = peek

    def forward(self, x, state=None, mask=None, keep_state=True):
        ones = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        total, count = (x * ones[..., None]).cumsum(1), ones.cumsum(1)
        if state is not None:
            total, count = total + state["total"][:, None], count + state["count"][:, None]
        read = x.shape[1] + (0 if state is None else state.length)
        after = RecurrentState({"total": total[:, -1].clone(), "count": count[:, -1].clone()}, length=read)
        y = total / count.clamp_min(1)[..., None] * self.weight
        if self.peek:
            y = y + x.roll(-1, 1)
        return y, after if keep_state else None

    def state_nbytes(self, length, batch=1, dtype=torch.float32):
        return batch * (self.width + 1) * dtype.itemsize

    def flops(self, length):
        return 2 * length * self.width
'''

USE = """
import plugin
from contextlab.testing import parametrize_with_laws

@parametrize_with_laws("mixer", "running_mean")
def test_it_keeps_the_laws(law):
    law()
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._entries, "mixer", dict(registry._entries["mixer"]))
    monkeypatch.delitem(sys.modules, "contextlab_plugin_plugin", raising=False)


def test_a_strangers_mixer_is_checked_by_the_command_line(call, plugin: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = call("check", "mixer", "running_mean", "--plugin", str(plugin), "--examples", "8")
    assert code == 1, err
    assert "mixer running_mean, in 2 cases" in out
    assert re.search(r"size +held +state.nbytes is exactly what", out)
    assert re.search(r"causality +broken in 1 of 2 +Outputs do not change", out)
    assert "causality with running_mean[peek=True]" in out
    assert "smallest case found: reading: batch 1, 2 tokens, cut at [1], position 0" in out
    assert f"of {len([law for law in laws('mixer') if 'encoder' not in law.statement])} laws held" in out


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ("y", "Tensor"),
        ("(y, after, None)", r"\(Tensor, RecurrentState, NoneType\)"),
        ("(after, y)", r"\(RecurrentState,"),
    ],
)
def test_a_mixer_that_returns_anything_but_y_and_a_state_is_told_what_is_expected(plugin: Path, returned, told) -> None:
    plugin.write_text(PLUGIN.replace("return y, after if keep_state else None", f"return {returned}"))
    load_plugins([str(plugin)])
    mixer = registry.lookup("mixer", "running_mean").build(width=4)
    with pytest.raises(InputError, match=rf"^RunningMean.forward: expected it to return \(y, state\).*, got {told}"):
        mixer(torch.ones(1, 2, 4))


def test_a_task_whose_learners_have_no_names_is_told_what_is_expected() -> None:
    class Nameless(LinearRegression):
        def learners(self) -> Any:
            return list(super().learners().values())

    with pytest.raises(InputError, match=r"^Nameless.learners\(\): expected a dict from name to learner, got list"):
        of_task("nameless", Nameless())


def test_a_strangers_mixer_is_tested_by_pytest(plugin: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(plugin.parent))
    (plugin.parent / "test_plugin.py").write_text(USE)
    outcomes = {}

    class Watch:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call":
                outcomes[report.nodeid.partition("[")[2][:-1]] = report.outcome

    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(plugin.parent), str(plugin.parent)], [Watch()])
    assert code == pytest.ExitCode.TESTS_FAILED
    held = [law.name for law in laws("mixer") if "encoder" not in law.statement and law.name != "options"]
    assert {f"running_mean: {law}" for law in held} < set(outcomes)
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    assert "running_mean[peek=True]: causality" in failed
    assert all("peek" in name for name in failed)


def test_wrong_names_are_refused_with_the_nearest(call) -> None:  # noqa: F811
    code, _, err = call("check", "mixer", "atention")
    assert code == 2
    assert "did you mean 'attention'" in err
    code, _, err = call("check", "mixr", "attention")
    assert code == 2
    assert "unknown kind of component 'mixr'; did you mean 'mixer'" in err
    with pytest.raises(InputError, match="unknown law of task 'sed'; did you mean 'seed'"):
        parametrize_with_laws("task", leave_out=("sed",))


def test_without_hypothesis_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import contextlab.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ResourceError: contextlab.testing needs hypothesis: pip install 'contextlab[testing]'" in done.stderr


def test_every_law_has_a_name_and_one_line_that_says_what_holds() -> None:
    for kind in ("mixer", "mlp", "model", "task", "learner", "policy"):
        assert laws(kind)
        for law in laws(kind):
            assert law.statement.endswith(".")
            assert len(law.statement) <= 90
            assert "\n" not in law.statement


def test_a_law_that_a_component_keeps_only_at_times_is_told_as_such() -> None:
    calls = []

    def once(component: Component, number: int) -> None:
        calls.append(number)
        assert len(calls) != 3

    with pytest.raises(LawBroken, match="not deterministic"):
        Law("mixer", "fickle", "It holds.", once, {"number": st.integers(0, 5)})(Component("mixer", "x", object))


def test_the_smallest_number_that_breaks_a_law_is_found() -> None:
    def small(component: Component, number: int) -> None:
        assert torch.rand(()) < 1
        if number >= 17:
            raise ValueError("too\nlarge")

    law = Law("mixer", "small", "It holds.", small, {"number": st.integers(0, 1000)})
    with pytest.raises(LawBroken) as caught:
        law(Component("mixer", "x", object, {"a": 1}), examples=100)
    case = "number: 17, parameters of seed 0"
    words = f"mixer x[a=1] breaks the law 'small': ValueError: too large (smallest case found: {case})"
    assert str(caught.value) == words
    with pytest.raises(ValueError, match="too"):
        raise caught.value.__cause__


def test_a_law_of_like_cases_is_tried_on_its_share_of_them() -> None:
    tried: list[float] = []

    def check_one(component: Component, x: float) -> None:
        tried.append(x)

    half = Law("mixer", "half", "", check_one, {"x": st.floats(0, 1)}, share=0.5)
    half(Component("mixer", "any", object))
    assert len(tried) == math.ceil(settings().max_examples / 2)
    tried.clear()
    half(Component("mixer", "any", object), examples=9)
    assert len(tried) == 9  # as many as were asked for


def test_an_error_in_ones_own_file_is_told_once_with_its_line(call, tmp_path: Path) -> None:  # noqa: F811
    wrong = PLUGIN.replace("total, count = (x * ones", "raise RuntimeError('sizes')\n        total, count = (x * ones")
    wrong = wrong.replace('    """The mean of the tokens so far."""\n', "")
    (tmp_path / "plugin.py").write_text(wrong)
    line = wrong.splitlines().index("        raise RuntimeError('sizes')") + 1
    code, out, err = call("check", "mixer", "running_mean", "--plugin", str(tmp_path / "plugin.py"), "--examples", "2")
    assert code == 1, err
    assert " ".join(out.split()).count(f"RuntimeError: sizes, at line {line} of plugin.py") == 1
    assert "running_mean has no docstring" in out
    assert "causality" in out.partition("RuntimeError")[0].rpartition("\n\n")[2], "the laws that it breaks"


def test_a_policy_may_hold_the_queries_that_it_looks_at(monkeypatch) -> None:
    from contextlab.policies import SnapKV

    class Watchful(SnapKV):
        observe = 16

    monkeypatch.setitem(registry._entries, "policy", dict(registry._entries["policy"]))
    registry.register("policy", "watchful")(Watchful)
    (component,) = components("policy", "watchful")
    (law,) = [law for law in laws("policy") if law.name == "budget of 50%"]
    law(component)
    monkeypatch.setattr(Watchful, "slots", lambda self, layer, length, *more: length)  # all are kept
    with pytest.raises(LawBroken, match=r"with a budget of 50% it holds \d+ bytes after 30, allowed"):
        law(component)


def test_check_tells_of_every_law_and_case() -> None:
    found = list(check("learner", "copier", examples=2))
    assert len(found) == len(laws("learner")) * len(components("learner", "copier"))
    assert all(each.broken is None for each in found)


def test_the_readme_counts_the_laws() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    counted = {words.lower(): int(n) for n, words in re.findall(r"(\d+)\s+laws\s+of\s+(\w+)", text)}
    kinds = {"mixers": "mixer", "mlps": "mlp", "models": "model", "tasks": "task", "learners": "learner"}
    assert counted == {
        words: len(laws(kind)) for words, kind in {**kinds, "policies": "policy", "probes": "probe"}.items()
    }


def test_an_option_that_changes_nothing_is_found_out(monkeypatch) -> None:
    from contextlab.mixers.recurrent.gru_lstm import Gru

    class Idle(Gru):
        def __init__(self, width: int, strength: float = 1.0, kind: Literal["a", "b"] = "a") -> None:
            super().__init__(width)
            self.scale = torch.nn.Parameter(torch.ones(3))
            self.kind, self.strength = kind, strength

        def forward(self, x: torch.Tensor, *rest: Any) -> Any:
            y, state = super().forward(x, *rest)
            return y * self.scale.mean() * (self.strength if self.kind == "b" else 1.0), state

    class Deaf(Idle):
        def forward(self, x: torch.Tensor, *rest: Any) -> Any:
            y, state = Gru.forward(self, x, *rest)
            return y * self.scale.mean(), state

    law = next(law for law in laws("mixer") if law.name == "options")

    def held(factory: type, broken: str | None = None) -> None:
        monkeypatch.setitem(registry._entries["mixer"], "idle", registry.Entry("mixer", "idle", factory))
        component = components("mixer", "idle")[0]
        if broken is None:
            law(component)
        else:
            with pytest.raises(LawBroken, match=f"another value of {broken} changes nothing"):
                law(component)

    held(Idle, "strength, kind")
    Idle.options_beside_others = {"strength": "counts beside kind b", "kind": "counts beside another strength"}
    held(Idle)
    held(Deaf, "strength, kind")
    Deaf.options_without_effect = {"strength": "kept for old files", "kind": "kept for old files"}
    held(Deaf)


def test_a_task_that_says_too_much_or_too_little_of_chance_is_found_out(monkeypatch) -> None:
    from contextlab.tasks.copying import Copy

    law = next(law for law in laws("task") if law.name == "chance")

    def held(answers: int, accuracy: float, broken: str | None = None) -> None:
        class Told(Copy):
            def chance(self) -> dict[str, float]:
                return {"cross_entropy": math.log(answers), "accuracy": accuracy}

        monkeypatch.setitem(registry._entries["task"], "told", registry.Entry("task", "told", Told))
        component = components("task", "told")[0]
        if broken is None:
            law(component)
        else:
            with pytest.raises(LawBroken, match=broken):
                law(component)

    answers = round(math.exp(Copy().chance()["cross_entropy"]))
    held(answers, 1 / answers)
    held(answers - 1, 1 / (answers - 1), f"{answers} answers are asked for, chance stands for {answers - 1}")
    held(answers, 2 / answers, f"is not 1 in {answers}")
