"""Every mixer of the package is found, says its family, and has its name at the package's top."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import contextlab.mixers
from contextlab import registry
from contextlab.testing import Component, components

FOLDER = Path(contextlab.mixers.__file__).parent
OURS = [entry for entry in registry.entries("mixer") if entry.factory.__module__.startswith("contextlab.")]


def test_every_mixer_declares_the_family_of_its_folder() -> None:
    for entry in OURS:
        assert entry.family.replace(" ", "_").replace("-", "_") == entry.factory.__module__.split(".")[2], entry.name


def test_every_registered_mixer_can_be_imported_from_the_package() -> None:
    for entry in OURS:
        assert getattr(contextlab.mixers, entry.factory.__name__) is entry.factory
        assert entry.factory.__name__ in contextlab.mixers.__all__


def test_a_new_file_is_found(tmp_path: Path) -> None:
    """A copy of the folder with one more file in it: the mixer is registered though nothing names the file."""
    package = tmp_path / "copy"
    (package / "linear").mkdir(parents=True)
    top = (FOLDER / "__init__.py").read_text()
    found = top[top.index("for _module in") : top.index("def build_mixer")]
    (package / "__init__.py").write_text(
        "from importlib import import_module\nfrom pkgutil import walk_packages\n" + found
    )
    (package / "linear" / "__init__.py").write_text("")
    (package / "linear" / "fresh.py").write_text("print('found')\n")
    done = subprocess.run([sys.executable, "-c", "import copy_"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode  # no such package: the test can fail
    package.rename(tmp_path / "copy_")
    done = subprocess.run([sys.executable, "-c", "import copy_"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "found\n", done.stderr


def test_no_file_looks_like_a_test() -> None:
    assert not list(FOLDER.rglob("test_*.py"))


@pytest.mark.parametrize("component", components("mixer"), ids=lambda each: each.label)
def test_a_mixer_can_be_sent_to_another_process(component: Component) -> None:
    """By pickle, as multiprocessing, joblib and copies of data-parallel models do."""
    mixer, x = component.build(), torch.randn(1, 5, 24)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(mixer))(x)[0], mixer(x)[0])
