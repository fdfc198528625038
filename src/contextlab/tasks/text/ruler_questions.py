"""RULER's question answering: a question among documents, and the answer by word overlap."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.tasks.text.page import Page, Pieces, Story, distinct, interleave
from contextlab.tasks.text.questions import questions
from contextlab.tasks.text.ruler_parts import room

if TYPE_CHECKING:
    from contextlab.tasks.text.ruler import Ruler


def question_among_documents(task: Ruler, page: Page, batch: int, generator: torch.Generator) -> Story:
    """The documents of a question among others, in any order, and the question."""
    device, known, texts = page.device, questions(*task.file), page.corpus
    assert texts is not None
    documents, count = len(known.documents), len(known.asked)
    sizes = texts.starts.diff()

    def piece(number: Tensor) -> Pieces:
        return Pieces(texts.starts[number], sizes[number])

    head = page.text("Answer the question from the documents below, with the answer only.\n")
    again = page.text("Answer the question from the documents above, with the answer only.\n")
    every = documents + torch.arange(count, device=device).unsqueeze(1)
    space = [(page.text(" "), False)] if page.codec.is_bytes else []
    rooms = room(task.length, [head, again, piece(every)], [*space, (piece(every + count), True)])  # [questions, 1]
    most = int(rooms.max())
    fit = max(most // int(sizes[:documents].min()), 1)  # documents, at most
    shown = known.shown.to(device)
    names = page.text(*(f"Document {i + 1}:" for i in range(max(fit, shown.shape[1]))))

    def taken_by(chosen: Tensor) -> Tensor:
        """Tokens of the documents up to each, with their numbers; -1 is none. chosen: [n, K]."""
        number = (chosen >= 0).cumsum(1).clamp_max(names.size.shape[1])
        own = torch.where(chosen >= 0, sizes[chosen.clamp_min(0)], 0)
        return own.cumsum(1) + F.pad(names.size[0].cumsum(0), (1, 0))[number]

    if (lacking := int((taken_by(shown)[:, -1:] - rooms).max())) > 0:  # of any question: no later draw can fail
        need = task.length + lacking
        raise InputError(f"length {task.length} is too short for these documents; use {need} or more")
    pick = torch.randint(count, (batch,), generator=generator, device=device)
    asked, answer = (piece(documents + i * count + pick.unsqueeze(1)) for i in (0, 1))
    # The question's documents come first, then others of its article, then any, while they fit.
    shown, support = shown[pick], known.support.to(device)[pick]
    article = known.articles.to(device)[known.article.to(device)[pick]]
    article = article.masked_fill((article.unsqueeze(2) == shown.unsqueeze(1)).any(2), -1)
    article = article.gather(1, torch.rand(article.shape, generator=generator, device=device).argsort(1))
    first = torch.cat([shown, article], 1)
    rest = distinct(batch, min(documents, fit + first.shape[1]), documents, generator, device)
    before = torch.zeros(batch, documents + 1, dtype=torch.bool, device=device)
    before.scatter_(1, first % (documents + 1), True)  # those that fill up, -1, are none of the documents
    order = [first, rest.masked_fill(before.gather(1, rest), -1)]
    for _ in range((most - 1) // int(sizes[:documents].sum())):  # all of them are shown, and once more
        order.append(torch.rand(batch, documents, generator=generator, device=device).argsort(1))
    chosen = torch.cat(order, 1)
    kept = (chosen >= 0) & (taken_by(chosen) <= rooms[pick])
    shuffle = torch.rand(kept.shape, generator=generator, device=device)
    rank = torch.where(kept, shuffle, 2.0).argsort(1)[:, : int(kept.sum(1).max())]
    chosen, kept = chosen.gather(1, rank), kept.gather(1, rank)
    number = torch.arange(rank.shape[1], device=device).expand(batch, -1)
    told = interleave(names.take(number), piece(chosen)).where(kept.repeat_interleave(2, 1))
    tells = (chosen.unsqueeze(2) == support.unsqueeze(1)).any(2) & kept
    fact = 1 + 2 * tells.int().argmax(1)
    answers = [*space, (answer, True)]
    return Story([head, told, again, asked], answers, fact, known.references.to(device)[pick])


WORD = r"\w+(?:[-'.,\u2019]\w+)*"


def asked_in(text: str) -> str:
    """The question of a prompt of documents."""
    *_, last = text.partition(" above, with the answer only.\nQuestion: ")
    return last.rstrip(" ").removesuffix(" Answer:")


def extract(text: str) -> list[str]:
    """An answer for a question among documents: words beside those of the question, in the sentence that has most.

    Words weigh log(1 + 1 / count), as in the sliding-window baseline that SQuAD took from MCTest (1606.05250, section
    5). The sentence has the greatest weight of different words of the question. Of its runs of other words, up to the
    nearest mark, that with the greatest mean weight is the answer; the paper has the phrases of a parser.
    """
    question = set(re.findall(WORD, asked_in(text).lower()))
    told = text[text.index("Document 1:") : text.rindex("Answer the question")]
    counts = Counter(re.findall(WORD, told.lower()))

    def weight(words: Iterable[str]) -> float:
        return sum(math.log1p(1 / counts[word]) for word in words)

    sentences = [each for line in told.splitlines() for each in re.split(r"(?<=[.!?])\s+", line)]
    best = max(sentences, key=lambda each: weight(question & set(re.findall(WORD, each.lower()))))
    runs: list[list[re.Match[str]]] = [[]]
    for found in re.finditer(rf"({WORD})|[^\w\s]", best):
        if found[1] and found[1].lower() not in question:
            runs[-1].append(found)
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if run]
    if not runs:
        return []
    rarest = max(runs, key=lambda run: weight(each[1].lower() for each in run) / len(run))
    return [f" {best[rarest[0].start() : rarest[-1].end()]}"]
