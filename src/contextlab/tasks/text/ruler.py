"""RULER's thirteen tasks of long context, at any length and for any tokenizer."""

from __future__ import annotations

import itertools
import math
import re
import string
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.text import Reader
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.text.codec import Codec
from contextlab.tasks.text.corpus import PYTHON, Corpus, Part
from contextlab.tasks.text.page import (
    DIGITS,
    HEX,
    SPACE,
    FilledTask,
    Page,
    Pieces,
    Story,
    cat,
    digits,
    distinct,
    interleave,
    letters,
    spaced,
    uuids,
)
from contextlab.tasks.text.questions import FORMATS, Format, encoded, questions
from contextlab.tasks.text.wordlist import adjectives, nouns

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
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


class Needles(NamedTuple):
    """A task of needles: what surrounds them, what keys and values are, how many of each, how many are asked for."""

    haystack: Literal["noise", "text", "needles"] = "text"
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    key_count: int = 1
    value_count: int = 1
    asked: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(values="uuids"),
    "niah_multikey_1": Needles(key_count=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", "uuids", "uuids"),
    "niah_multivalue": Needles(value_count=4),
    "niah_multiquery": Needles(key_count=4, asked=4),
}
HOPS, LINE = 4, 5
"""Of variable tracking: assignments after the first; letters of a name."""
DEPTHS = 40
"""Depths in the text at which needles stand, evenly from its beginning to its end."""
COMMON = 10
"""Words that are asked for in common words extraction."""
CODED, ALPHA = 6, 2.0
"""Of frequent words extraction: letters of a coded word, exponent of the word frequencies."""
BYTES = 4
"""Bytes that count for one token where a published rule depends on the length."""


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
            return encoded(*self._file, self.codec).to(device)
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
            return "".join(sorted({each for question in questions(*self._file).asked for each in question.answers[0]}))
        return string.ascii_uppercase if self.task == "vt" else string.ascii_lowercase

    def compose(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        """Draw the prompts of the task."""
        if self.task in NEEDLES:
            return self._needles(page, batch, generator, NEEDLES[self.task])
        by_name = {"vt": self._variables, "cwe": self._common_words, "fwe": self._frequent_words}
        return by_name.get(self.task, self._documents)(page, batch, generator)

    def read(self, text: str) -> list[str]:
        """The task's answer; of questions, from the file and not from the documents."""
        if self.task in NEEDLES:
            return _read_needles(text)
        if self.task in ("qa_1", "qa_2"):
            known = questions(*self._file)
            return [f" {known.asked[known.number[_asked(text)]].answers[0]}"]
        return {"vt": _read_variables, "cwe": _read_common_words, "fwe": _read_frequent_words}[self.task](text)

    def learners(self) -> dict[str, Learner]:
        """`reader`, which makes no error; for questions, which it looks up, also `overlap`, which has the prompt."""
        found = super().learners()
        if self.task in ("qa_1", "qa_2"):
            found["overlap"] = Reader(self.output_size, _extract, self.codec)
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
    def _long(self) -> bool:
        """Whether the published sizes for 4,096 tokens and more hold."""
        return self.length >= 4096 * (BYTES if self.codec.is_bytes else 1)

    def _needles(self, page: Page, batch: int, generator: torch.Generator, kind: Needles) -> Story:
        device = page.device
        one_answer = kind.asked * kind.value_count == 1
        noun, be = (kind.values[:-1], "is") if one_answer else (kind.values, "are")
        head = page.text(
            f"{'A' if one_answer else 'Some'} special magic {noun} {be} hidden in the text below. Memorize "
            f"{'it' if one_answer else 'them'}, because you will be asked about the {noun} afterwards.\n"
        )
        lines = kind.key_count * kind.value_count
        if kind.haystack == "needles":  # as many as can be, of which some are left out again
            shortest = 2 * len(page.codec.encode("One of the special magic"))
            lines = max(2, self.length // shortest)
        count = lines // kind.value_count
        asked = torch.rand(batch, kind.key_count, generator=generator, device=device).topk(kind.asked, 1).indices
        first, second = adjectives(self.part), nouns(self.part)
        if kind.keys == "uuids":
            codes = F.pad(uuids((batch, count), generator, device), (1, 0), value=SPACE)
            keys = interleave(page.spell(codes), page.text(""))
        else:
            drawn = distinct(batch, kind.key_count, len(first) * len(second), generator, device)
            if count > kind.key_count:  # others may be alike, but not like the one that is asked for
                others = torch.randint(len(first) * len(second), (batch, count), generator=generator, device=device)
                while (same := others == drawn).any():
                    others[same] = torch.randint(
                        len(first) * len(second), (int(same.sum()),), generator=generator, device=device
                    )
                others[:, :1] = drawn
                drawn = others
            one = page.text(*(f" {each}" for each in first)).take(drawn // len(second))
            keys = interleave(one, page.text(*(f"-{each}" for each in second)).take(drawn % len(second)))
        if kind.values == "uuids":
            codes = uuids((batch, lines), generator, device)
        else:
            number = torch.randint(10**6, 10**7, (batch, lines), generator=generator, device=device)
            codes = digits(number, 7)
        values = page.spell(F.pad(codes, (1, 0), value=SPACE))
        # line i is about key i // value_count, with value i
        owner = 2 * (torch.arange(lines, device=device) // kind.value_count)
        begin = page.text(f"One of the special magic {kind.values} for")
        ones, twos = keys.take(owner.expand(batch, -1)), keys.take(owner.expand(batch, -1) + 1)
        text = interleave(begin, ones, twos, page.text(" is:"), values, page.text(".\n"))
        order = torch.rand(batch, lines, generator=generator, device=device).argsort(1)  # of the lines in the text
        place = order.argsort(1)
        of_asked = asked.unsqueeze(2) * kind.value_count + torch.arange(kind.value_count, device=device)
        rising = place.gather(1, of_asked.flatten(1)).view(of_asked.shape).argsort(2)
        answers = of_asked.gather(2, rising).flatten(1)  # key by key as asked, the values as the text has them

        query: list[Pieces] = []
        for i in range(kind.asked):
            if i:
                query.append(page.text("," if i < kind.asked - 1 else ", and"))
            query.append(keys.take(2 * asked[:, i : i + 1] + torch.arange(2, device=device)))
        question = page.text(f"\nWhat {be}{'' if one_answer else ' all'} the special magic {noun} for")
        again = page.text(f" mentioned in the text above? The special magic {noun} for")
        after = cat(question, *query, again, *query, page.text(f" mentioned in the text above {be}"))
        answer = _listed(page, [values.take(answers[:, i : i + 1]) for i in range(answers.shape[1])], ",")
        references = codes.gather(1, answers.unsqueeze(2).expand(-1, -1, codes.shape[2]))
        width = 6 * torch.arange(lines, device=device)
        if kind.haystack == "needles":
            # Line 0 is asked for. Others follow it while they fit, and all that fit are shuffled.
            size = text.size.view(batch, lines, 6).sum(2)
            kept = size.cumsum(1) <= self._room([head, after], answer)
            if not kept[:, 0].all():
                raise InputError(
                    f"length {self.length} is too short for a needle and the question; use twice the length"
                )
            ranked = torch.where(kept, place, lines).argsort(1)
            every = (6 * ranked.unsqueeze(2) + torch.arange(6, device=device)).flatten(1)
            shown = kept.gather(1, ranked).repeat_interleave(6, 1)
            fact = head.start.shape[1] + 6 * (ranked == 0).int().argmax(1)
            return Story([head, text.take(every).where(shown), after], answer, fact, references)
        facts = [text.take(6 * order[:, i : i + 1] + torch.arange(6, device=device)) for i in range(len(width))]
        if kind.haystack == "noise":
            depths = torch.rand(batch, lines, generator=generator, device=device).sort(1).values
        else:
            chosen = torch.rand(batch, DEPTHS, generator=generator, device=device).topk(lines, 1).indices.sort(1).values
            depths = (100 * chosen / (DEPTHS - 1)).round() / 100
        parts, places = self.fill(page, generator, head, facts, depths, after, answer)
        return Story(parts, answer, places[place.gather(1, answers[:, 0:1])].squeeze(1), references)

    def _room(self, parts: list[Pieces], answer: list[tuple[Pieces, bool]]) -> Tensor:
        """[B, 1], the tokens that are left for a list beside these."""
        return self.length + 1 - cat(*parts, *(pieces for pieces, _ in answer)).size.sum(1, keepdim=True)

    def _variables(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        device = page.device

        def chain(width: int) -> tuple[Tensor, Pieces, Pieces, list[Pieces]]:
            """Codes and pieces of five names (a space before), of the value, and the assignments."""
            number = distinct(batch, HOPS + 1, 26**width, generator, device)
            codes = letters(number, width, string.ascii_uppercase)
            names = page.spell(F.pad(codes, (1, 0), value=SPACE))
            value = torch.randint(10**4, 10**5 - 1, (batch, 1), generator=generator, device=device)
            spelled = page.spell(F.pad(digits(value, 5), (1, 0), value=SPACE))
            each = [Pieces(names.start[:, i : i + 1], names.size[:, i : i + 1]) for i in range(HOPS + 1)]
            told = [cat(page.text("VAR"), each[0], page.text(" ="), spelled, page.text("\n"))]
            for before, name in itertools.pairwise(each):
                told.append(cat(page.text("VAR"), name, page.text(" = VAR"), before, page.text("\n")))
            return codes, names, spelled, told

        def question(value: Pieces) -> Pieces:
            return cat(
                page.text("\nQuestion: Find all variables that are assigned the value"),
                value,
                page.text(f" in the text above. Answer: In the text above, {HOPS + 1} variables have the value"),
                value,
                page.text(", they are:"),
            )

        def answers(names: Pieces) -> list[tuple[Pieces, bool]]:
            return _listed(page, [names.take(torch.full((batch, 1), i, device=device)) for i in range(HOPS + 1)], "")

        head = page.text("Memorize the chain of variable assignments that is hidden in the text below.\n")
        before = head
        if self.example:
            _, names, value, told = chain(3)
            shown = [piece for i, line in enumerate(told) for piece in ([page.text(NOISE)] if i % 2 else []) + [line]]
            solved = [piece for piece, _ in answers(names)]
            before = cat(head, *shown, question(value), *solved, page.text("\n"), head)
        codes, names, value, told = chain(LINE)
        answer = answers(names)
        depths = torch.rand(batch, HOPS + 1, generator=generator, device=device).sort(1).values
        parts, places = self.fill(page, generator, before, told, depths, question(value), answer)
        return Story(parts, answer, places[:1].expand(batch), codes)

    def _common_words(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        device = page.device
        table, spellings = _words(self.part)
        words = page.text(*table)
        numbers = page.text("1", *(f" {i + 2}" for i in range(max(400, self.length))))
        ask = (
            f"\nQuestion: What are the {COMMON} most common words in the list above? Answer: The {COMMON} words that "
            "appear most often in the list are:"
        )
        head = page.text("Below is a numbered list of words, of which some appear more often than others.\n")
        marks = [page.text(f" {i + 1}.") for i in range(COMMON)]

        def listed(count: int, often: int, seldom: int, room: Tensor | None) -> tuple[Pieces, Tensor, Tensor]:
            """The list [B, 3 n], its common words [B, 10] in order of first place, and the first of those."""
            if count > len(table):
                raise InputError(f"cwe: length {self.length} asks for {count} words, and there are {len(table)}")
            drawn = torch.rand(batch, len(table), generator=generator, device=device).topk(count, 1).indices
            common = torch.arange(COMMON, device=device)
            each = torch.cat([common.repeat(often), torch.arange(COMMON, count, device=device).repeat(seldom)])
            size = words.size[0, drawn] + int(numbers.size.max()) + 1
            kept = torch.ones_like(drawn, dtype=torch.bool)
            if room is not None:
                times = torch.where(torch.arange(count, device=device) < COMMON, often, seldom)
                kept = (size * times).cumsum(1) <= room
                if not kept[:, :COMMON].all():
                    need = self.length + int(((size * times)[:, :COMMON].sum(1) - room[:, 0]).max())
                    raise InputError(f"length {self.length} is too short for cwe: use {need + 64} or more")
            order = torch.rand(batch, len(each), generator=generator, device=device)
            order = torch.where(kept[:, each], order, 2.0).argsort(1)
            shuffled = each[order]
            shown = kept.gather(1, shuffled)
            number = torch.arange(len(each), device=device).expand(batch, -1)
            entries = interleave(numbers.take(number), page.text("."), words.take(drawn.gather(1, shuffled)))
            places = torch.where(shuffled.unsqueeze(1) == common.view(1, -1, 1), number.unsqueeze(1), len(each))
            begin = places.amin(2)
            rank = begin.argsort(1)
            return entries.where(shown.repeat_interleave(3, 1)), drawn.gather(1, rank), begin.amin(1)

        def solved(common: Tensor) -> list[tuple[Pieces, bool]]:
            return [
                piece
                for i in range(COMMON)
                for piece in [(marks[i], False), *spaced(page, words.take(common[:, i : i + 1]))]
            ]

        before = head
        if self.example:
            entries, common, _ = listed(*((40, 10, 3) if self._long else (20, 3, 1)), None)
            before = cat(head, entries, page.text(ask), *(piece for piece, _ in solved(common)), page.text("\n"), head)
        often, seldom = (30, 3) if self._long else (6, 1)
        question = page.text(ask)
        # What the answer takes is known only when the list is: the longest words are allowed for.
        given = cat(before, question, *marks).size.sum(1, keepdim=True) + COMMON * int(words.size.max())
        room = self.length + 1 - given.expand(batch, 1)
        most = int(room.max()) - COMMON * often * (int(words.size.min()) + 3)
        count = min(len(table), max(COMMON + 1, COMMON + most // (seldom * (int(words.size.min()) + 3))))
        entries, common, begin = listed(count, often, seldom, room)
        answer = solved(common)
        fact = before.start.shape[1] + 3 * begin
        return Story([before, entries, question], answer, fact, spellings.to(device)[common])

    def _frequent_words(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        device = page.device
        head = page.text("Read the coded text below and track how often each coded word appears in it.")
        question = page.text(
            "\nQuestion: Leave out the dots '...'. What are the three most frequent words in the coded text above? "
            "Answer: In the coded text above, the three most frequent words are:"
        )
        vocabulary = max(4, self.length // (50 * (BYTES if page.codec.is_bytes else 1)))
        number = distinct(batch, vocabulary, 26**CODED, generator, device)
        codes = letters(number, CODED, string.ascii_lowercase)
        words = page.spell(F.pad(codes, (1, 0), value=SPACE))
        longest = int(words.size.max())
        room = self.length + 1 - int(cat(head, question).size.sum()) - 3 * longest
        most = bisect_right(range(self.length), room // longest, key=lambda n: int(_zeta_counts(n, vocabulary).sum()))
        counts = _zeta_counts(max(most - 1, 0), vocabulary)
        if not counts[1] > counts[2] > counts[3] > 0:
            raise InputError(f"length {self.length} is too short for fwe, where frequencies have to differ: use 1024")
        each = torch.arange(vocabulary).repeat_interleave(counts).to(device)
        order = torch.rand(batch, len(each), generator=generator, device=device).argsort(1)
        dots = page.text(" ...").take(torch.zeros(batch, 1, dtype=torch.int64, device=device))
        names = cat(dots, Pieces(words.start[:, 1:], words.size[:, 1:]))
        shuffled = each[order]
        answer = _listed(page, [names.take(torch.full((batch, 1), i, device=device)) for i in (1, 2, 3)], "")
        fact = 1 + (shuffled == 1).int().argmax(1)
        return Story([head, names.take(shuffled), question], answer, fact, codes[:, 1:4])

    @property
    def _file(self) -> tuple[str, Format, Part]:
        assert self.data is not None
        return self.data, "squad" if self.task == "qa_1" else "hotpot", self.part

    def _documents(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        device, known, texts = page.device, questions(*self._file), page.corpus
        assert texts is not None
        documents, count = len(known.documents), len(known.asked)
        sizes = texts.starts.diff()

        def piece(number: Tensor) -> Pieces:
            return Pieces(texts.starts[number], sizes[number])

        head = page.text("Answer the question from the documents below, with the answer only.\n")
        again = page.text("Answer the question from the documents above, with the answer only.\n")
        every = documents + torch.arange(count, device=device).unsqueeze(1)
        space = [(page.text(" "), False)] if page.codec.is_bytes else []
        rooms = self._room([head, again, piece(every)], [*space, (piece(every + count), True)])  # [questions, 1]
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
            need = self.length + lacking
            raise InputError(f"length {self.length} is too short for these documents; use {need} or more")
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


@lru_cache(maxsize=8)
def noise(codec: Codec, length: int) -> Corpus:
    """A document of the noise sentences, one line after another, of more than `length` tokens."""
    line = codec.encode(NOISE)
    count = length // len(line) + 2
    lines = torch.arange(count) * len(line)
    tokens = torch.tensor(line * count, dtype=torch.uint8 if codec.is_bytes else torch.int32)
    return Corpus(["noise"], tokens, torch.tensor([0, len(tokens)]), lines)


@lru_cache
def _words(part: Part) -> tuple[tuple[str, ...], Tensor]:
    """Words of common words extraction, a space before each, and their ASCII codes [words, L]."""
    table = (*adjectives(part), *nouns(part))
    width = max(map(len, table))
    return tuple(f" {word}" for word in table), torch.tensor([list(w.ljust(width, "\0").encode()) for w in table])


def _zeta_counts(total: int, vocabulary: int) -> Tensor:
    """How often each of the words is shown, by rank: those of a zeta distribution, rounded down."""
    rank = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    exponent = torch.tensor(ALPHA, dtype=torch.float64)
    return (total * rank**-ALPHA / torch.special.zeta(exponent, torch.tensor(1.0, dtype=torch.float64))).long()


def _listed(page: Page, answers: list[Pieces], between: str) -> list[tuple[Pieces, bool]]:
    """Answers one after another, with what stands between them, which is not scored."""
    found: list[tuple[Pieces, bool]] = []
    for i, pieces in enumerate(answers):
        if i and between:
            found.append((page.text(between), False))
        found += spaced(page, pieces)
    return found


def _asked(text: str) -> str:
    """The question of a prompt of documents."""
    *_, last = text.partition(" above, with the answer only.\nQuestion: ")
    return last.rstrip(" ").removesuffix(" Answer:")


WORD = r"\w+(?:[-'.,\u2019]\w+)*"


def _extract(text: str) -> list[str]:
    """An answer for a question among documents: words beside those of the question, in the sentence that has most.

    Words weigh log(1 + 1 / count), as in the sliding-window baseline that SQuAD took from MCTest (1606.05250, section
    5). The sentence has the greatest weight of different words of the question. Of its runs of other words, up to the
    nearest mark, that with the greatest mean weight is the answer; the paper has the phrases of a parser.
    """
    question = set(re.findall(WORD, _asked(text).lower()))
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


def _read_needles(text: str) -> list[str]:
    asked = re.search(r"The special magic \w+ for ([^?]+) mentioned in the text above (?:is|are) ?$", text)
    if not asked:
        return []
    keys = re.split(r", and |, ", asked[1])
    return [f" {each}" for key in keys for each in re.findall(rf"special magic \w+ for {key} is: (\S+)\.\n", text)]


def _read_variables(text: str) -> list[str]:
    *_, asked = re.finditer(r"variables have the value (\d+), they are: ?", text)
    text = text[text.rindex("Memorize the chain") :]
    values: dict[str, str] = {}
    for name, number, other in re.findall(r"VAR ([A-Z]+) = (?:(\d+)|VAR ([A-Z]+))\n", text):
        values[name] = number or values[other]
    return [f" {name}" for name, value in values.items() if value == asked[1]]


def _read_common_words(text: str) -> list[str]:
    text = text[text.rindex("Below is a numbered list") : text.rindex("\nQuestion: ")]
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", text))  # in the order in which words appear
    often = sorted(counts.values())[-COMMON]
    return [f" {word}" for word, count in counts.items() if count >= often]


def _read_frequent_words(text: str) -> list[str]:
    text = text[text.rindex("appears in it.") + 14 : text.rindex("\nQuestion: ")]
    counts = Counter(word for word in text.split() if word != "...")
    return [f" {word}" for word, _ in counts.most_common(3)]
