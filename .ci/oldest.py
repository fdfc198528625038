"""The lowest releases that pyproject.toml allows, a constraint a line: python .ci/oldest.py > FILE.

torch is as in constraints.txt: its lower releases come for Linux with CUDA only, which no test needs.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRA = "test"


def lowest(requirements: list[str], extras: dict[str, list[str]]) -> Iterator[str]:
    """name==release of each; our own extras among them are followed."""
    for requirement in requirements:
        parts = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?(?:>=([\w.]+).*)?", requirement)
        if parts is None:
            raise SystemExit(f"pyproject.toml: {requirement!r}: expected NAME>=LOWEST, with a highest behind it or not")
        name, groups, floor = parts.groups()
        if name == "contextlab":
            for extra in groups.split(","):
                yield from lowest(extras[extra], extras)
        elif floor is None:
            raise SystemExit(f"pyproject.toml: {requirement!r} has no lowest release; write {name}>=...")
        else:
            yield f"{name}=={floor}"


project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
found = lowest([*project["dependencies"], *extras[EXTRA]], extras)
torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
print("\n".join(torch if line.startswith("torch==") else line for line in found))
