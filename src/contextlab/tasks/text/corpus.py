"""Documents of text on this machine, each in the training or in the test part."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.tasks.text.codec import Codec

Part = Literal["train", "test"]
PYTHON = "python"
"""The corpus that every machine has: the sources of Python's standard library."""
TEST_SHARE = 10
"""One document in so many is held out."""
NOT_PROSE = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
"""Folders that are left out of the standard library: other packages, and tests, which hold broken text on purpose."""


class Corpus:
    """The documents of one part, as ids one after another.

    names: the documents' paths, relative to the corpus. tokens: [N] uint8 or int32. starts: [documents + 1] int64,
    where each begins, and N. lines: [L] int64, where each line begins.
    """

    def __init__(self, names: list[str], tokens: Tensor, starts: Tensor, lines: Tensor) -> None:
        self.names = names
        self.tokens, self.starts, self.lines = tokens, starts, lines
        self._elsewhere: dict[str, Corpus] = {}

    def to(self, device: torch.device | str) -> Corpus:
        """The same on a device; kept there."""
        if torch.device(device) == self.tokens.device:
            return self
        key = str(device)
        if key not in self._elsewhere:
            moved = (each.to(device) for each in (self.tokens, self.starts, self.lines))
            self._elsewhere[key] = Corpus(self.names, *moved)
        return self._elsewhere[key]

    @property
    def longest(self) -> int:
        """Ids of the longest document."""
        return int(self.starts.diff().max())

    def windows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Where `count` windows of `length` ids begin, [count]: each within a document, all places equally likely."""
        room = (self.starts.diff() - length + 1).clamp_min(0).cumsum(0)
        total = int(room[-1])
        if total < 1:
            raise InputError(
                f"no document has {length} tokens; the longest has {self.longest}: choose a smaller length"
            )
        pick = torch.randint(total, (count,), generator=generator, device=self.tokens.device)
        document = torch.searchsorted(room, pick, right=True)
        before = torch.where(document > 0, room[document - 1], 0)
        return self.starts[document] + pick - before

    def line_start(self, at: Tensor) -> Tensor:
        """Where the line begins that holds the id at each place of `at`: int64, of any shape, which the answer has."""
        return self.lines[torch.searchsorted(self.lines, at, right=True) - 1]


def check_corpus(corpus: str, length: int, part: Part, codec: Codec) -> None:
    """Refuse a corpus that cannot be read, or holds no document of `length` ids."""
    found = load(corpus, part, codec)
    if found.longest < length:
        raise InputError(
            f"corpus {corpus!r}: its longest {part} document has {found.longest} tokens, and prompts take {length}: "
            f"choose a length of at most {found.longest}, or longer texts"
        )


@lru_cache(maxsize=8)
def load(corpus: str, part: Part, codec: Codec) -> Corpus:
    """The documents of a corpus in one part, encoded; kept, so that a file is read once.

    corpus: "python", or the path of a text file or of a folder. Of a folder, every text file below it is a document
    (files that are no UTF-8 are left out, copies of a document too), held out by a hash of its path in the folder. Of
    a single file, the last tenth is held out.
    """
    names, texts = [], []
    for name, text, own in _documents(corpus):
        if own == part:
            names.append(name)
            texts.append(text)
    if not texts:
        raise InputError(
            f"corpus {corpus!r}: no {part} documents; about one file in {TEST_SHARE} is held out, by a hash of its "
            "path: give a folder with more text files"
        )
    return _encoded(names, texts, codec)


@lru_cache(maxsize=4)
def _documents(corpus: str) -> tuple[tuple[str, str, Part], ...]:
    """(name, text, part) of every document."""
    if corpus == PYTHON:
        return tuple(_folder(corpus, Path(sysconfig.get_paths()["stdlib"]), "*.py", NOT_PROSE))
    path = Path(corpus).expanduser()
    if path.is_dir():
        return tuple(_folder(corpus, path, "*", ()))
    if not path.exists():
        raise InputError(f"corpus {corpus!r}: no such file or folder; 'python' is the standard library's sources")
    text = _text(path)
    if text is None:
        raise InputError(f"corpus {corpus!r}: not a text file (it is not UTF-8, or holds NUL bytes)")
    if not text.strip():
        raise InputError(f"corpus {corpus!r}: the file is empty")
    cut = text.find("\n", len(text) - len(text) // TEST_SHARE - 1) + 1
    if not 0 < cut < len(text):
        raise InputError(f"corpus {corpus!r}: too short to hold out its last tenth at the end of a line")
    return (path.name, text[:cut], "train"), (f"{path.name} (end)", text[cut:], "test")


def _folder(corpus: str, folder: Path, pattern: str, without: tuple[str, ...]) -> Iterator[tuple[str, str, Part]]:
    seen: set[str] = set()
    for path in sorted(folder.rglob(pattern)):
        name = path.relative_to(folder).as_posix()
        if set(name.split("/")[:-1]) & set(without) or not path.is_file():
            continue
        text = _text(path)
        if text and not text.isspace() and text not in seen:
            seen.add(text)
            yield name, text, part_of(name)
    if not seen:
        raise InputError(f"corpus {corpus!r}: the folder holds no text files")


def part_of(name: str) -> Part:
    """The part of a document, from a hash of its path: the same on every machine and at any time."""
    return "test" if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % TEST_SHARE == 0 else "train"


def _text(path: Path) -> str | None:
    """The text of a file, with newlines as \\n, or None when it is none. Raises InputError when it cannot be read."""
    try:
        data = path.read_bytes()
        return None if b"\0" in data else data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise InputError(f"corpus file {str(path)!r} cannot be read ({error.strerror})") from None


def _encoded(names: list[str], texts: list[str], codec: Codec) -> Corpus:
    if codec.is_bytes:
        parts = [text.encode() for text in texts]
        tokens = np.frombuffer(b"".join(parts), dtype=np.uint8).copy()
        sizes = [len(each) for each in parts]
        starts = np.cumsum([0, *sizes])
        after_newline = np.flatnonzero(tokens == ord("\n")) + 1
        lines = np.union1d(starts[:-1], after_newline[after_newline < len(tokens)])
        return Corpus(names, torch.from_numpy(tokens), torch.from_numpy(starts), torch.from_numpy(lines))
    ids: list[int] = []
    begins, line_begins = [0], []
    for text in texts:
        for line in codec.encode_all(text.splitlines(keepends=True)):  # by lines: it is known where each begins
            line_begins.append(len(ids))
            ids += line
        begins.append(len(ids))
    return Corpus(
        names, torch.tensor(ids, dtype=torch.int32), torch.tensor(begins), torch.tensor(sorted(set(line_begins)))
    )
