"""The package as others meet it: what `import contextlab` is enough for, and what the wheel holds."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import contextlab

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "contextlab"
PROCESSES = {"contextlab.evaluation.cost_worker", "contextlab.experiments.worker"}  # run with `python -m`

WALK = """
import sys, contextlab
from functools import reduce
for name in sys.argv[1:]:
    reduce(getattr, name.split(".")[1:], contextlab)
"""


def modules() -> list[str]:
    """Every module that a user may name, those that others import least first, so that none is there by chance."""
    parts = [path.relative_to(SOURCES.parent).with_suffix("").parts for path in SOURCES.rglob("*.py")]
    names = {".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts if p[-1] != "__main__"}
    users = ("cli", "experiments", "report", "evaluation", "training", "models")
    return sorted(
        (n for n in names - PROCESSES - {"contextlab"} if "._" not in n),
        key=lambda n: (users[::-1].index(n.split(".")[1]) if n.split(".")[1] in users else -1, n),
    )


def test_importing_contextlab_is_enough_to_name_every_module():
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", WALK, *modules()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_type_checker_knows_the_modules_that_are_imported_when_named():
    top = {name.split(".")[1] for name in modules()} - {"lazy"}
    assert (
        set(re.findall(r"^    from contextlab import (\w+) as \1$", Path(contextlab.__file__).read_text(), re.M)) == top
    )
    assert top <= set(dir(contextlab))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'modles'"):
        contextlab.modles  # noqa: B018
    with pytest.raises(AttributeError, match=r"'contextlab.models' has no attribute 'pretraind'"):
        contextlab.models.pretraind  # noqa: B018


def test_python_m_is_the_command_line():
    asked = [
        subprocess.run([sys.executable, "-m", "contextlab", word], capture_output=True, text=True)
        for word in ("--version", "shwo")
    ]
    assert [each.returncode for each in asked] == [0, 2]
    assert asked[0].stdout == f"contextlab {contextlab.__version__}\n"
    assert "Did you mean 'show'?" in asked[1].stderr


def test_importing_contextlab_does_not_import_torch():
    code = "import sys, contextlab; assert 'torch' not in sys.modules; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_wheel_says_that_it_is_typed(tmp_path):
    build = pytest.importorskip("hatchling.builders.wheel")
    (wheel,) = build.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in held if name.endswith("/METADATA")]
    assert "contextlab/py.typed" in held
    assert "Classifier: Typing :: Typed" in metadata
    ours = {
        str(p.relative_to(SOURCES.parent)) for p in SOURCES.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert ours <= held
