"""Looking for papers by words: BM25 of SQLite's full-text index, which forgives a wrong letter."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

from contextlab.errors import InputError
from contextlab.papers.index import Paper, papers

FIELDS = {"name": 6.0, "title": 4.0, "contributes": 2.0, "claim": 1.0, "area": 2.0, "parts": 2.0}
"""What is searched, and what a word in it weighs."""
COMMON = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be by can does do for from has have how i in into is it its of on or than that the their
    them this to was what when where which while who why will with""",
    )
)
"""Words of a question that say nothing of its subject."""


@dataclass(frozen=True)
class Hit:
    """A paper found, and how well it fits: BM25, larger is better."""

    paper: Paper
    score: float


@dataclass(frozen=True)
class Found:
    """What a search gave. read_as: words that no paper has, and those that they were taken for."""

    hits: tuple[Hit, ...]
    read_as: dict[str, str]


def search(text: str, *, most: int = 10) -> Found:
    """The papers whose name, title, contribution, claim, area or components fit the words of `text` best, best first.

    Words are compared by their stems (Porter's), and each that no paper has is read as the nearest that some paper has.

    most: papers that are given.

    Raises InputError where `text` has no word to look for.
    """
    asked = [word for word in _words(text) if word not in COMMON]
    if not asked:
        raise InputError(f"search: expected words that a paper may have, got {text[:80]!r}")
    table, known = _index()
    read_as: dict[str, str] = {}
    wanted = []
    for word in dict.fromkeys(asked):
        if not table.execute("SELECT 1 FROM papers WHERE papers MATCH ? LIMIT 1", (f'"{word}"',)).fetchone():
            near = get_close_matches(word, [each for each in known if abs(len(each) - len(word)) < 3], n=1, cutoff=0.75)
            if not near:
                continue
            read_as[word] = near[0]
        wanted.append(read_as.get(word, word))
    if not wanted:
        return Found((), read_as)
    weights = ", ".join(map(str, FIELDS.values()))
    query = " OR ".join(f'"{word}"' for word in wanted)
    rows = table.execute(
        f"SELECT rowid, -bm25(papers, {weights}) AS score FROM papers WHERE papers MATCH ? ORDER BY score DESC LIMIT ?",
        (query, most),
    ).fetchall()
    entries = papers()
    return Found(tuple(Hit(entries[row - 1], score) for row, score in rows), read_as)


@cache
def _index() -> tuple[sqlite3.Connection, frozenset[str]]:
    """The full-text index, whose row n is the n-th paper, and every word in it."""
    table = sqlite3.connect(":memory:", check_same_thread=False)
    table.execute(f"CREATE VIRTUAL TABLE papers USING fts5({', '.join(FIELDS)}, tokenize='porter unicode61')")
    rows = [
        (each.name, each.title, each.contributes, each.claim, each.area, " ".join(each.components)) for each in papers()
    ]
    marks = ", ".join("?" * len(FIELDS))
    table.executemany(f"INSERT INTO papers VALUES ({marks})", rows)
    return table, frozenset(word for row in rows for cell in row for word in _words(cell) if len(word) > 2)


def _words(text: str) -> list[str]:
    """The words of a text as the index cuts them: runs of letters and digits, in small letters."""
    return re.findall(r"[^\W_]+", text.lower())
