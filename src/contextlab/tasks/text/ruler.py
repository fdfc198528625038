"""RULER's thirteen tasks of long context, at any length and for any tokenizer."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import PositiveInt

from contextlab.errors import InputError
from contextlab.learners.text import Reader
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.text.base import FilledTask
from contextlab.tasks.text.corpus import PYTHON, Corpus, Part
from contextlab.tasks.text.page import DIGITS, HEX, Page, Story
from contextlab.tasks.text.questions import FORMATS, Format, encoded, questions
from contextlab.tasks.text.ruler_aggregation import common_words, frequent_words, read_common_words, read_frequent_words
from contextlab.tasks.text.ruler_parts import noise
from contextlab.tasks.text.ruler_questions import asked_in, extract, question_among_documents
from contextlab.tasks.text.ruler_retrieval import NEEDLES, needles, read_needles
from contextlab.tasks.text.ruler_tracing import read_variables, variables

Name = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]
NAMES: tuple[str, ...] = get_args(Name)


@register(
    "task",
    "ruler",
    family="text",
    papers=("2404.06654",),
    cases=({}, {"task": "niah_multiquery"}, {"task": "vt", "length": 1500}, {"task": "fwe"}),
)
@dataclass(frozen=True)
class Ruler(FilledTask):
    """RULER's thirteen tasks, by name: needles, chains of variables, common and frequent words, and questions.

    niah_...: needles "One of the special magic numbers for KEY is: VALUE." in repeated noise, in real text, or among
        needles for other keys; one key, four values of a key, or four keys are asked for.
    vt: variable tracking, one chain of five assignments in noise; every variable of the chain's value is asked for.
    cwe, fwe: the ten words of a numbered list that are repeated most; the three most frequent words of a coded text,
        whose frequencies are those of a zeta distribution, after the most frequent, "...".
    qa_1, qa_2: a question among documents, from a local file in the format of SQuAD 2 (qa_1, such as dev-v2.0.json) or
        HotpotQA (qa_2, such as hotpot_dev_distractor_v1.json), which are not part of this library. Paragraphs that
        come with the question stand, in any order, among others of its article (SQuAD), then of the whole file; when
        that has no more, all of them come again. Questions without an answer are left out; any of several answers
        counts for `match`, the first is scored token by token. `reader` looks the answer up in the file.

    Counts, formats and the rule for each size are those of the published generators. What differs: the instructions are
    in other words; real text is `corpus` in place of essays, and needles stand at beginnings of its lines; words come
    from a shorter list; the solved example of vt is shorter; documents follow each other without an empty line, as many
    in each prompt as fit; a question that a file has twice counts once; answers have one order, that of the text (of
    the question in niah_multiquery, of frequency in fwe), because they are also scored token by token. `match` is the
    published string match, which knows no order. `length` counts the answer. The published lengths are in tokens of a
    language model: for bytes, four of them count as one where a size depends on the length.

    task: which of the thirteen.
    length: tokens in the prompt, answer included.
    example: a solved example before the prompt, in vt and cwe.
    data: the file of questions, for qa_1 and qa_2.
    corpus: "python", the sources of the standard library on this machine, or the path of a text file or a folder.
    part: documents, words and questions to draw from, "train" or "test".
    tokenizer: null for bytes, a folder with tokenizer.json, a Hugging Face hub name, or an object (encode, decode).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"task": "niah_single_1", "length": 512},
        "hard": {"task": "niah_multikey_3", "length": 8192},
        **{name: {"task": name, "length": 2048} for name in NAMES if not name.startswith("qa")},
    }

    task: Name = "niah_single_1"
    length: PositiveInt = 1024
    example: bool = True
    data: str | None = None
    corpus: str = PYTHON
    part: Part = "train"
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.task in ("qa_1", "qa_2") and self.data is None:
            form = FORMATS["squad" if self.task == "qa_1" else "hotpot"]
            raise InputError(f"ruler: task {self.task!r} needs data, the path of a JSON file in the format of {form}")
        if self.task in NAMES and not self.task.startswith("qa") and self.data is not None:
            raise InputError(f"ruler: data belongs to qa_1 and qa_2; task {self.task!r} reads none")
        super().__post_init__()

    def context(self, device: torch.device | str) -> Corpus | None:  # type: ignore[override]
        """Noise or real text, where the task has one of them; of questions, all texts of their file."""
        if self.task in ("qa_1", "qa_2"):
            return encoded(*self.file, self.codec).to(device)
        needles = NEEDLES.get(self.task)
        if self.task == "vt" or (needles and needles.haystack == "noise"):
            return noise(self.codec, self.length).to(device)
        return super().context(device) if needles and needles.haystack == "text" else None

    def alphabet(self) -> str:
        """Of the task's answers."""
        needles = NEEDLES.get(self.task)
        if needles:
            return HEX + "-" if needles.values == "uuids" else DIGITS
        if self.task in ("qa_1", "qa_2"):
            return "".join(sorted({each for question in questions(*self.file).asked for each in question.answers[0]}))
        return string.ascii_uppercase if self.task == "vt" else string.ascii_lowercase

    def compose(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        """Draw the prompts of the task."""
        if self.task in NEEDLES:
            return needles(self, page, batch, generator, NEEDLES[self.task])
        by_name = {"vt": variables, "cwe": common_words, "fwe": frequent_words}
        return by_name.get(self.task, question_among_documents)(self, page, batch, generator)

    def read(self, text: str) -> list[str]:
        """The task's answer; of questions, from the file and not from the documents."""
        if self.task in NEEDLES:
            return read_needles(text)
        if self.task in ("qa_1", "qa_2"):
            known = questions(*self.file)
            return [f" {known.asked[known.number[asked_in(text)]].answers[0]}"]
        return {"vt": read_variables, "cwe": read_common_words, "fwe": read_frequent_words}[self.task](text)

    def learners(self) -> dict[str, Learner]:
        """`reader`, which makes no error; for questions, which it looks up, also `overlap`, which has the prompt."""
        found = super().learners()
        if self.task in ("qa_1", "qa_2"):
            found["overlap"] = Reader(self.output_size, extract, self.codec)
        return found

    def match(self, answers: list[str], prompt: Any) -> list[float]:  # type: ignore[override]
        """The published string match: the share of references found; of questions, whether any is found."""
        found = super().match(answers, prompt)
        return [float(share > 0) for share in found] if self.task in ("qa_1", "qa_2") else found

    def splits(self) -> dict[str, Task]:
        """'train', held-out documents, words and questions, and these at twice and four times the length."""
        found: dict[str, Task] = {"train": self, "documents=test": self.replace(part="test")}
        for times in (2, 4):
            found[f"length={times * self.length}"] = self.replace(part="test", length=times * self.length)
        return found

    @property
    def file(self) -> tuple[str, Format, Part]:
        """Path, format and part of the file of questions."""
        assert self.data is not None
        return self.data, "squad" if self.task == "qa_1" else "hotpot", self.part
