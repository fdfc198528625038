"""Plugins: a file that cannot be imported is told in one line, with its line."""

from __future__ import annotations

import pytest

from contextlab.errors import InputError
from contextlab.plugins import load_plugins


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\nimport no_such_module", "line 2: cannot be imported (ModuleNotFoundError: No module named 'no_such"),
        ("def f(:\n    pass", "line 1: cannot be imported (SyntaxError: "),
        ("def f():\n    return 1 / 0\n\n\nf()", "line 2: cannot be imported (ZeroDivisionError: division by zero)"),
        (
            "from contextlab import register\n\n@register('mixr', 'mine')\ndef mine(): ...",
            "line 3: unknown kind 'mixr'; did you mean 'mixer'?",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(tmp_path, text, told):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError) as caught:
        load_plugins([str(tmp_path / "mine.py")])
    assert f"--plugin {tmp_path / 'mine.py'}, {told}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_or_module_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match=r"mine\.py: no such file"):
        load_plugins([str(tmp_path / "mine.py")])
    with pytest.raises(InputError, match="--plugin no_such_module: cannot be imported"):
        load_plugins(["no_such_module"])
