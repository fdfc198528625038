"""Questions with their documents, from files in the formats of SQuAD 2 and of HotpotQA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError
from torch import Tensor

from contextlab.errors import InputError
from contextlab.spec import explain
from contextlab.tasks.text.codec import Codec
from contextlab.tasks.text.corpus import Corpus, Part, part_of

Format = Literal["squad", "hotpot"]
FORMATS: dict[Format, str] = {"squad": "SQuAD 2", "hotpot": "HotpotQA"}
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class _Answer(BaseModel):
    text: Text


class _Asked(BaseModel):
    question: Text
    answers: list[_Answer]
    is_impossible: bool = False


class _Paragraph(BaseModel):
    context: Text
    qas: list[_Asked]


class _Article(BaseModel):
    title: str
    paragraphs: list[_Paragraph]


class _Squad(BaseModel):
    data: list[_Article]


class _Hotpot(BaseModel):
    question: Text
    answer: Text
    context: list[tuple[str, list[str]]]
    supporting_facts: list[tuple[str, int]] = []


READERS: dict[Format, TypeAdapter[Any]] = {"squad": TypeAdapter(_Squad), "hotpot": TypeAdapter(list[_Hotpot])}


@dataclass(frozen=True)
class Question:
    """A question: its text, the answers that count, and numbers of documents.

    support: those that tell the answer. documents: those that are always shown with it, the supporting ones among them.
    article: which article's other documents are shown next; -1 for none.
    """

    text: str
    answers: tuple[str, ...]
    support: tuple[int, ...]
    documents: tuple[int, ...]
    article: int = -1


class Questions:
    """The questions of one part and all its documents.

    asked: the questions, no text twice. documents: no text twice. number: a question's place in `asked` by its text.
    support, shown: [questions, K], the documents of `Question`, filled up with -1. article: [questions], its row of
    `articles` [articles, K], documents filled up with -1; the last row has none. references: [questions, K, L], UTF-8
    codes of the answers, filled up with zeros.
    """

    def __init__(self, asked: list[Question], documents: list[str], articles: list[list[int]]) -> None:
        self.asked, self.documents = asked, documents
        self.number = {question.text: i for i, question in enumerate(asked)}
        self.support = _table(question.support for question in asked)
        self.shown = _table(question.documents for question in asked)
        self.articles = _table([*articles, []])
        self.article = torch.tensor([question.article for question in asked]) % len(self.articles)
        codes = [[list(answer.encode()) for answer in question.answers] for question in asked]
        width, most = max(len(c) for row in codes for c in row), max(map(len, codes))
        self.references: Tensor = torch.zeros(len(asked), most, width, dtype=torch.int64)
        for i, row in enumerate(codes):
            for k, answer in enumerate(row):
                self.references[i, k, : len(answer)] = torch.tensor(answer)


def _table(rows: Iterable[Iterable[int]]) -> Tensor:
    """[rows, longest] int64, filled up with -1."""
    listed = [list(row) for row in rows]
    width = max(map(len, listed))
    return torch.tensor([row + [-1] * (width - len(row)) for row in listed], dtype=torch.int64).view(len(listed), width)


@lru_cache(maxsize=4)
def questions(path: str, form: Format, part: Part) -> Questions:
    """The questions of a file that are in one part: by a hash of the article (SQuAD), or of the question (HotpotQA).

    Of questions with the same text the first counts; questions without an answer are left out. Raises InputError when
    the file cannot be read, is of another format, or has no questions in the part.
    """
    name = FORMATS[form]
    expected = f"expected a JSON file in the format of {name}"
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"data {path!r} cannot be read ({error.strerror}); {expected}") from None
    try:
        given = READERS[form].validate_json(data)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] == "json_invalid":
            raise InputError(f"data {path!r} is not JSON; {expected}") from None
        raise InputError(
            f"data {path!r} is not in the format of {name} ({explain(error)}); qa_1 reads {FORMATS['squad']}, qa_2 "
            f"{FORMATS['hotpot']}"
        ) from None
    number: dict[str, int] = {}  # of each document
    asked: dict[str, Question] = {}
    articles: list[list[int]] = []
    if isinstance(given, _Squad):
        for article in given.data:
            if part_of(article.title) == part:
                own = [number.setdefault(each.context, len(number)) for each in article.paragraphs]
                for paragraph, at in zip(article.paragraphs, own, strict=True):
                    for each in paragraph.qas:
                        answers = tuple(dict.fromkeys(answer.text for answer in each.answers))
                        if answers and not each.is_impossible:
                            found = Question(each.question, answers, (at,), (at,), len(articles))
                            asked.setdefault(found.text, found)
                articles.append(list(dict.fromkeys(own)))
    else:
        for one in given:
            if part_of(one.question) == part and one.context:
                texts = [f"{title}\n{''.join(sentences)}" for title, sentences in one.context]
                shown = [number.setdefault(text, len(number)) for text in texts]
                titles = {title for title, _ in one.supporting_facts}
                told = [at for (title, _), at in zip(one.context, shown, strict=True) if title in titles]
                documents = tuple(dict.fromkeys(shown))
                support = tuple(dict.fromkeys(told)) or documents
                asked.setdefault(one.question, Question(one.question, (one.answer,), support, documents))
    if not asked:
        raise InputError(f"data {path!r} holds no questions of the {part} part: about one in ten is held out")
    return Questions(list(asked.values()), list(number), articles)


@lru_cache(maxsize=4)
def encoded(path: str, form: Format, part: Part, codec: Codec) -> Corpus:
    """All texts of a part as ids, kept: documents with a newline on both sides, then questions, then first answers.

    Text i is at `starts[i]`. An answer begins with a space where that is no token of its own.
    """
    known = questions(path, form, part)
    space = "" if codec.is_bytes else " "
    texts = [
        *(f"\n{each}\n" for each in known.documents),
        *(f"Question: {each.text} Answer:" for each in known.asked),
        *(f"{space}{each.answers[0]}" for each in known.asked),
    ]
    if codec.is_bytes:
        ids = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
    else:
        ids = [np.array(each, dtype=np.int32) for each in codec.encode_all(texts)]
    starts = torch.from_numpy(np.cumsum([0, *map(len, ids)]))
    return Corpus([path], torch.from_numpy(np.concatenate(ids)), starts, starts[:-1])
