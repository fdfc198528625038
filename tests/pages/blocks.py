"""The code blocks of a page, and what the page says of how they are run.

A page excuses or shortens a block by an HTML comment on the lines before it, which readers of the page do not see:

    <!-- not run: REASON -->                 the whole block is not run
    <!-- not run (make, pip): REASON -->     of a bash block, not the commands that begin with these words
    <!-- run with A for B -->                the test runs the block with A in the place of B, to end in seconds
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"(?P<before>(?:^<!--[^>]*-->\n+)*)^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run(?: \((?P<words>[^)]+)\))?: (?P<reason>[^>]+) -->")
RUN_WITH = re.compile(r"<!-- run with (?P<new>.+?) for (?P<old>.+?) -->")


@dataclass(frozen=True)
class Block:
    """One block of code: its language, its code as the test runs it, and which commands the page excuses."""

    page: Path
    line: int
    language: str
    code: str
    excused: tuple[str, ...] = ()  # first words of commands
    reason: str = ""

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a bash block, in words; a redirection is the last two words."""
        text = self.code.replace("\\\n", " ")
        found = [shlex.split(line, comments=True) for line in text.splitlines()]
        return [words for words in found if words]


def blocks(page: Path) -> list[Block]:
    """The python and bash blocks of a page that are to be run. Raises ValueError for a comment that misfits."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        language, code, before = match["language"], match["code"], match["before"]
        if language not in ("python", "bash"):
            continue
        line = text[: match.start("code")].count("\n")
        for change in RUN_WITH.finditer(before):
            if change["old"] not in code:
                raise ValueError(f"{page}:{line}: nothing to replace: {change['old']!r}")
            code = code.replace(change["old"], change["new"])
        excused: tuple[str, ...] = ()
        reason = ""
        if note := NOT_RUN.search(before):
            reason = note["reason"]
            if note["words"] is None:
                continue
            excused = tuple(word.strip() for word in note["words"].split(","))
        found.append(Block(page, line, language, code, excused, reason))
    return found
