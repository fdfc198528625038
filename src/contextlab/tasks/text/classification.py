"""Byte-level text classification and retrieval of Long Range Arena, on text of this machine."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.naive_bayes import BYTES, NaiveBayes, NaiveBayesPairs, byte_likelihoods
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.text.codec import codec
from contextlab.tasks.text.corpus import PYTHON, Corpus, Part, load

PARTS: tuple[Part, Part] = ("train", "test")
SEPARATOR, DIFFERENT, SAME = BYTES, BYTES + 1, BYTES + 2
CORRELATION = 0.04
"""Of the bytes of a document, for naive Bayes: the best on training documents that it was not fitted to, of the default
corpus, is 0.03 to 0.05."""


@dataclass(frozen=True)
class FolderTask(TokenTask):
    """Base: windows of documents of a few folders of a corpus, where the folder is the label.

    Folders are drawn uniformly, then the windows of a folder's documents are equally likely. A document is in the
    training or in the test part by a hash of its path (see `contextlab.tasks.text.corpus`), so that no test prompt
    shows text of a training document. The best known learner is naive Bayes over pairs of bytes, fitted to all
    training documents of the folders; the Bayes optimum cannot be computed.

    corpus: "python", the sources of the standard library on this machine, or the path of a folder with folders in it.
    length: bytes of a window.
    folders: how many, the largest first, or the names of some at the top of the corpus.
    part: documents to draw from, "train" or "test".
    """

    one_prediction: ClassVar[bool] = True
    each: ClassVar[int] = 1
    """Documents of `length` bytes that every folder must have in both parts."""

    corpus: str = PYTHON
    length: PositiveInt = 512
    folders: Annotated[int, Field(ge=2)] | tuple[str, ...] = 6
    part: Part = "train"

    def __post_init__(self) -> None:
        check_options(self)
        if isinstance(self.folders, int):
            if len(self.names) < self.folders:
                raise InputError(
                    f"folders {self.folders}: corpus {self.corpus!r} has {len(self.names)} with {self._wanted}: choose "
                    "fewer, or a smaller length"
                )
            return
        if len(set(self.folders)) < max(2, len(self.folders)):
            raise InputError(f"folders {list(self.folders)}: name at least two different ones")
        fit = _largest(self.corpus, self.length, self.each)
        if missing := [name for name in self.folders if name not in fit]:
            raise InputError(
                f"folder {missing[0]!r} of corpus {self.corpus!r} does not have {self._wanted}: choose from "
                f"{', '.join(fit) or 'no folder (none has)'}"
            )

    @property
    def _wanted(self) -> str:
        some = "a document" if self.each == 1 else f"{self.each} documents"
        return f"{some} of {self.length} bytes in each part (training, test)"

    @property
    def names(self) -> tuple[str, ...]:
        """The folders, in the order of their labels."""
        if isinstance(self.folders, int):
            return _largest(self.corpus, self.length, self.each)[: self.folders]
        return self.folders

    @property
    def documents(self) -> Corpus:
        """All documents of the part; prompts are drawn from those of the folders."""
        return load(self.corpus, self.part, codec(None))

    def symbol(self, token: int) -> str:
        """A byte's text."""
        return codec(None).decode([token])

    @abstractmethod
    def _learner(self, order: Literal[1, 2]) -> Learner: ...

    def learners(self) -> dict[str, Learner]:
        """Naive Bayes over pairs of bytes, and over bytes."""
        return {"byte_pairs": self._learner(2), "bytes": self._learner(1)}

    def splits(self) -> dict[str, Task]:
        """'train', then documents that no training prompt shows: of the same length, and twice as long."""
        held_out = self.replace(part="test", folders=self.names)
        found: dict[str, Task] = {"train": self, "documents=test": held_out}
        if set(self.names) <= set(_largest(self.corpus, 2 * self.length, self.each)):
            found[f"length={2 * self.length}"] = held_out.replace(length=2 * self.length)
        return found

    def _windows(self, device: torch.device | str) -> _Windows:
        return _Windows(self.documents.to(device), self.corpus, self.part, self.names, self.length)


@register(
    "task",
    "text_classification",
    family="text",
    papers=("2011.04006",),
    cases=({"length": 64, "folders": 3}, {"length": 200, "part": "test"}),
)
@dataclass(frozen=True)
class TextClassification(FolderTask):
    """Byte-level text classification after Long Range Arena: from which folder is this text?

    The prompt is a window of one document, and the label is predicted at its last byte. What differs: the published
    texts are film reviews of two kinds, shown from their beginning and padded, and the published models answer at a
    token of their own; here they are documents on this machine, a window from any place of one that is long enough, and
    the labels are folders. The `hard` preset has 4,096 bytes, as later work shows of the published texts.

    Token ids: 0 to 255 the bytes, then one label for each folder.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"length": 128, "folders": 3},
        "hard": {"length": 4096, "folders": 6},
    }

    @property
    def input_size(self) -> int:
        return BYTES + len(self.names)

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The text, and in brackets the folder's name."""
        label = int(prompt.targets[row, -1]) - BYTES
        return codec(None).decode(prompt.inputs[row].tolist()) + f"[{self.names[label]}]"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs [batch, length] int64; hidden "document" [batch, 1], the number of each window's."""
        windows = self._windows(device)
        label = torch.randint(len(self.names), (batch,), generator=generator, device=device)
        text, document = windows.draw(label, generator)
        return _prompt(text, BYTES + label, {"document": document.unsqueeze(1)})

    def _learner(self, order: Literal[1, 2]) -> Learner:
        return NaiveBayes(_likelihoods(self.corpus, self.names, order), CORRELATION)

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the folders."""
        return {"accuracy": 1 / len(self.names), "cross_entropy": math.log(len(self.names))}


@register(
    "task",
    "text_retrieval",
    family="text",
    papers=("2011.04006",),
    cases=({"length": 100, "folders": 3}, {"length": 200, "part": "test", "folders": 4}),
)
@dataclass(frozen=True)
class TextRetrieval(FolderTask):
    """Byte-level document retrieval after Long Range Arena: do these two texts belong together?

    The prompt is a window of one document, a separator and a window of another document, and what is predicted at the
    last byte is whether both are from the same folder, which half of the pairs are. What differs: the published texts
    are scientific papers, cut at 4,000 bytes, and the published models encode the two apart; here a causal model reads
    one after the other. The `hard` preset has 4,096 bytes of each.

    Token ids: 0 to 255 the bytes, the separator, the labels "different" and "same".
    """

    each: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"length": 128, "folders": 2},
        "hard": {"length": 4096, "folders": 4},
    }

    @property
    def input_size(self) -> int:
        return BYTES + 3

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The two texts, a line between them, and in brackets whether they are from the same folder."""
        ids, label = prompt.inputs[row].tolist(), int(prompt.targets[row, -1])
        one, two = (codec(None).decode(part) for part in (ids[: self.length], ids[self.length + 1 :]))
        return f"{one}\n--------\n{two}[{'same' if label == SAME else 'different'}]"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs [batch, 2 * length + 1] int64; hidden "document" [batch, 2], the numbers of the two."""
        windows, number = self._windows(device), len(self.names)
        first = torch.randint(number, (batch,), generator=generator, device=device)
        same = torch.rand(batch, generator=generator, device=device) < 0.5
        step = torch.randint(1, number, (batch,), generator=generator, device=device)
        one, document = windows.draw(first, generator)
        two, other = windows.draw(torch.where(same, first, (first + step) % number), generator, without=document)
        text = torch.cat([one, torch.full_like(one[:, :1], SEPARATOR), two], 1)
        return _prompt(text, torch.where(same, SAME, DIFFERENT), {"document": torch.stack([document, other], 1)})

    def _learner(self, order: Literal[1, 2]) -> Learner:
        return NaiveBayesPairs(_likelihoods(self.corpus, self.names, order), CORRELATION)

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly between the two answers."""
        return {"accuracy": 0.5, "cross_entropy": math.log(2)}


class _Windows:
    """The windows of `length` bytes in the documents of each folder, numbered folder after folder."""

    def __init__(self, corpus: Corpus, path: str, part: Part, folders: tuple[str, ...], length: int) -> None:
        device = corpus.tokens.device
        ranges = [_folders(path, part)[name] for name in folders]
        self.tokens, self.length = corpus.tokens, length
        self.document = torch.cat([torch.arange(begin, end, device=device) for begin, end in ranges])
        self.start = corpus.starts[self.document]
        self.room = (corpus.starts.diff()[self.document] - length + 1).clamp_min(0)
        self.first = self.room.cumsum(0) - self.room
        last = torch.tensor([end - begin for begin, end in ranges], device=device).cumsum(0) - 1
        self.end = (self.first + self.room)[last]  # of each folder
        self.begin = torch.cat([self.end.new_zeros(1), self.end[:-1]])

    def draw(self, folder: Tensor, generator: torch.Generator, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A window of each folder in `folder` [B], all equally likely: text [B, length] int64, its document [B].

        without: [B], a document that is not to be drawn from.
        """
        begin, end = self.begin[folder], self.end[folder]
        left_first = left_room = torch.zeros_like(begin)
        if without is not None:
            place = (self.document == without.unsqueeze(1)).int().argmax(1)
            left_first = self.first[place]
            left_room = torch.where((left_first >= begin) & (left_first < end), self.room[place], 0)
        uniform = torch.rand(len(folder), generator=generator, device=folder.device, dtype=torch.float64)
        pick = begin + (uniform * (end - begin - left_room)).long()
        pick = pick + torch.where(pick >= left_first, left_room, 0)
        place = torch.searchsorted(self.first + self.room, pick, right=True)
        at = self.start[place] + pick - self.first[place]
        text = self.tokens[at.unsqueeze(1) + torch.arange(self.length, device=at.device)]
        return text.long(), self.document[place]


def _prompt(text: Tensor, label: Tensor, hidden: dict[str, Tensor]) -> Prompt:
    """One label at the end of each text."""
    targets, scored = torch.zeros_like(text), torch.zeros_like(text, dtype=torch.bool)
    targets[:, -1], scored[:, -1] = label, True
    return Prompt(text, targets, scored, torch.zeros_like(text), hidden=hidden)


@lru_cache(maxsize=8)
def _folders(corpus: str, part: Part) -> dict[str, tuple[int, int]]:
    """The numbers of the first document of each folder at the top, and of the one after its last.

    Names are sorted part by part, so that the documents of a folder stand together.
    """
    tops = [name.split("/")[0] if "/" in name else "" for name in load(corpus, part, codec(None)).names]
    number, found = 0, {}
    for top, documents in groupby(tops):
        begin, number = number, number + len(list(documents))
        if top:
            found[top] = (begin, number)
    return found


@lru_cache(maxsize=32)
def _largest(corpus: str, length: int, each: int) -> tuple[str, ...]:
    """The folders with `each` documents of `length` bytes in both parts, by the bytes of their training documents."""
    found: dict[str, int] = {}
    for part in PARTS:
        starts = load(corpus, part, codec(None)).starts
        fit = {}
        for name, (begin, end) in _folders(corpus, part).items():
            sizes = starts[begin : end + 1].diff()
            if int((sizes >= length).sum()) >= each:
                fit[name] = int(sizes.sum())
        found = fit if part == "train" else {name: size for name, size in found.items() if name in fit}
    return tuple(sorted(found, key=lambda name: (-found[name], name)))


@lru_cache(maxsize=8)
def _likelihoods(corpus: str, folders: tuple[str, ...], order: Literal[1, 2]) -> Tensor:
    """How likely each folder's training documents make bytes."""
    known, where = load(corpus, "train", codec(None)), _folders(corpus, "train")
    texts = ([known.tokens[known.starts[i] : known.starts[i + 1]] for i in range(*where[name])] for name in folders)
    return byte_likelihoods(texts, order)
