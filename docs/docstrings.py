"""How the API reference shows our docstrings: lines of the form `name: text` become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

PARAMETER = re.compile(r"^( *)((?:[*]{0,2}\w+)(?:, [*]{0,2}\w+)*): (?=\S)")


class Parameters(griffe.Extension):
    """Rewrites docstrings as they are loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """The docstring with `- **name**: text` for each line `name: text`, a blank line before the first of them."""
    lines: list[str] = []
    inside = fenced = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        match = None if fenced else PARAMETER.match(line)
        if match and lines and match[2][0].islower() | match[2].startswith("*"):
            if not inside and lines[-1].strip():
                lines.append("")
            inside = True
            line = f"{match[1]}- **{match[2]}**: {line[match.end() :]}"
        elif not line.strip():
            inside = False
        lines.append(line)
    return "\n".join(lines)
