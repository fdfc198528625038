"""RULER's prompts against the published definitions, read back from their text."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.tasks.text.corpus import part_of
from contextlab.tasks.text.ruler import NAMES
from contextlab.tasks.text.ruler_aggregation import zeta_counts
from contextlab.tasks.text.ruler_parts import NOISE
from contextlab.tasks.text.ruler_questions import extract

LENGTH = {"vt": 1500, "cwe": 2048}
NEEDLE = r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.\n"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Small files in the formats of SQuAD 2 and HotpotQA, twenty articles each."""
    folder = tmp_path_factory.mktemp("questions")
    articles, hotpot = [], []
    for i in range(20):
        paragraphs = [
            {
                "context": f"Town {i} part {k} has {100 * i + k} houses.",
                "qas": [
                    {
                        "question": f"How many houses has part {k} of town {i}?",
                        "is_impossible": False,
                        "answers": [{"text": f"{100 * i + k}"}, {"text": f"{100 * i + k} houses"}],
                    },
                    {"question": "Why?", "is_impossible": True, "answers": []},
                ],
            }
            for k in range(3)
        ]
        articles.append({"title": f"town {i}", "paragraphs": paragraphs})
        context = [[f"River {i}", [f"It meets lake {i}."]], [f"Lake {i}", [f"It has {i} boats. ", "It is blue."]]]
        hotpot.append({"question": f"How many boats has the lake of river {i}?", "answer": f"{i}", "context": context})
    for name, data in (("qa_1", {"data": articles}), ("qa_2", hotpot)):
        (folder / f"{name}.json").write_text(json.dumps(data))
    return {name: str(folder / f"{name}.json") for name in ("qa_1", "qa_2")}


def build(name: str, files: dict[str, str], **options):
    if name in files:
        options["data"] = files[name]
    return build_task("ruler", **{"task": name, "length": LENGTH.get(name, 1024), **options})


def texts(task, count: int = 12) -> list[tuple[str, list[str]]]:
    """What is read and what is answered, of some prompts."""
    prompt = task.sample(count, generator())
    asked = [task.codec.decode(task.ask(prompt, row).tolist()) for row in range(count)]
    return [(text, task.references(prompt, row)) for row, text in enumerate(asked)]


@pytest.mark.parametrize("name", NAMES)
def test_readers_make_no_error_and_prompts_have_their_length(name: str, files) -> None:
    for part in ("train", "test"):
        task = build(name, files, part=part)
        prompt = task.sample(16, generator())
        assert prompt.inputs.shape == (16, LENGTH.get(name, 1024))
        answer = task.learners()["reader"](prompt)
        errors = task.errors(answer, prompt)
        assert errors["accuracy"][prompt.scored].min() == 1
        assert errors["prompt_error"].max() == 0
        answers = [", ".join(reversed(task.references(prompt, row))) for row in range(16)]
        assert task.match(answers, prompt) == [1.0] * 16
        fact = prompt.hidden["fact"]
        assert (fact >= 0).all()
        assert (fact < prompt.scored.int().argmax(1)).all()
        if not name.startswith("qa") and name != "fwe":
            begins = [task.codec.decode(prompt.inputs[i, f : f + 60].tolist()) for i, f in enumerate(fact.tolist())]
            first = {"vt": "VAR [A-Z]{5} = [0-9]", "cwe": " ?[0-9]+[.] "}.get(name, "One of the special magic")
            assert all(re.match(first, text) for text in begins)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("niah")])
def test_needles_are_those_of_the_published_tasks(name: str, files) -> None:
    keys, values, asked, haystack, kinds = {
        "niah_single_1": (1, 1, 1, "noise", "words numbers"),
        "niah_single_2": (1, 1, 1, "text", "words numbers"),
        "niah_single_3": (1, 1, 1, "text", "words uuids"),
        "niah_multikey_1": (4, 1, 1, "text", "words numbers"),
        "niah_multikey_2": (None, 1, 1, "needles", "words numbers"),
        "niah_multikey_3": (None, 1, 1, "needles", "uuids uuids"),
        "niah_multivalue": (1, 4, 1, "text", "words numbers"),
        "niah_multiquery": (4, 1, 4, "text", "words numbers"),
    }[name]
    forms = {"words": r"[a-z]+-[a-z]+", "numbers": r"[1-9]\d{6}", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
    key_form, value_form = (forms[kind] for kind in kinds.split())
    depths = []
    for text, references in texts(build(name, files, length=1500)):
        found = [(m[2], m[3], m.start()) for m in re.finditer(NEEDLE, text)]
        by_key: dict[str, list[str]] = {}
        for key, value, _ in found:
            assert re.fullmatch(key_form, key)
            assert re.fullmatch(value_form, value)
            by_key.setdefault(key, []).append(value)
        if keys is None:
            assert len(found) >= 5
        else:
            assert len(by_key) == keys
            assert {len(each) for each in by_key.values()} == {values}
        query = re.search(r"\nWhat (?:is|are all) the special magic \w+ for (.+) mentioned in the text above\?", text)
        queries = re.split(", and |, ", query[1])
        assert len(queries) == len(set(queries)) == asked
        assert references == [value for key in queries for value in by_key[key]]
        _, body, _ = re.split(r"afterwards\.\n|\nWhat (?:is|are)", text, maxsplit=2)
        rest = re.sub(NEEDLE, "", body)
        if haystack == "noise":
            assert set(rest.splitlines()[:-1]) == {NOISE.strip()}
        assert (rest.strip() == "") == (haystack == "needles")
        depths.append(next(at for _, value, at in found if value == references[0]) / len(text))
    assert max(depths) - min(depths) > 0.15  # the first of four values stands early


def test_variables_are_a_chain_of_five_in_noise(files) -> None:
    for text, references in texts(build("vt", files)):
        example, body = text.split("Memorize the chain")[1:]
        told = re.findall(r"VAR ([A-Z]{5}) = (\d{5}|VAR [A-Z]{5})\n", body)
        assert len(told) == 5
        assert re.fullmatch(r"\d{5}", told[0][1])
        assert all(told[i + 1][1] == f"VAR {told[i][0]}" for i in range(4))
        assert references == [name for name, _ in told]
        assert len(set(references)) == 5
        assert f"are assigned the value {told[0][1]} in" in body
        assert len(re.findall(r"VAR [A-Z]{3} = ", example)) == 5
    assert "Memorize" not in texts(build("vt", files, example=False))[0][0][20:]


@pytest.mark.parametrize(("length", "counts", "example"), [(2048, (6, 1), (3, 1)), (16384, (30, 3), (10, 3))])
def test_common_words_are_repeated_as_published(files, length: int, counts, example) -> None:
    for text, references in texts(build("cwe", files, length=length), 4):
        lists = [part.split("\n")[1] for part in text.split("Below is a numbered list")[1:]]
        for listed, (often, seldom), common in zip(lists, (example, counts), (None, references), strict=True):
            entries = re.findall(r"(\d+)\. ([a-z]+)", listed)
            assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
            seen = Counter(word for _, word in entries)
            assert sorted(Counter(seen.values()).items())[-1] == (often, 10)
            assert set(seen.values()) == {often, seldom}
            if common:
                assert set(common) == {word for word, count in seen.items() if count == often}
            else:
                assert len(seen) == (20 if often == 3 else 40)


def test_frequent_words_follow_the_zeta_distribution(files) -> None:
    scipy = pytest.importorskip("scipy.special")
    for text, references in texts(build("fwe", files, length=2048)):
        words = text.split("appears in it.")[1].split("\nQuestion")[0].split()
        counts = Counter(words).most_common()
        assert counts[0][0] == "..."
        assert [word for word, _ in counts[1:4]] == references
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])
        total = next(n for n in range(10**4) if int(n / scipy.zeta(2.0)) == counts[0][1])
        within = [[int((total + i) * k**-2.0 / scipy.zeta(2.0)) for k in range(1, len(counts) + 1)] for i in range(3)]
        assert [count for _, count in counts] in within
    assert zeta_counts(1000, 5).tolist() == [int(1000 * k**-2.0 / scipy.zeta(2.0)) for k in range(1, 6)]


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_come_with_their_documents_and_parts_share_none(name: str, files) -> None:
    seen: dict[str, set[str]] = {}
    for part in ("train", "test"):
        for text, references in texts(build(name, files, length=700, part=part), 40):
            numbers = [int(n) for n in re.findall(r"Document (\d+):", text)]
            assert numbers == list(range(1, len(numbers) + 1))
            question = text[text.rindex("Question: ") + 10 : text.rindex(" Answer:")]
            seen.setdefault(part, set()).add(question)
            town = re.findall(r"\d+", question)
            if name == "qa_1":
                part_number, number = town
                assert f"Town {number} part {part_number} has {references[0]} houses." in text
                assert references == [references[0], f"{references[0]} houses"]
                assert len(set(re.findall(f"Town {number} part .", text))) == 3  # the rest of its article comes first
                assert part_of(f"town {number}") == part
            else:
                assert f"River {town[0]}\nIt meets" in text
                assert f"It has {references[0]} boats. It is blue." in text
    assert not seen["train"] & seen["test"]


def test_documents_that_run_out_come_again_and_fill_the_length(files) -> None:
    for name, pattern in (("qa_1", r"Town \d+ part \d"), ("qa_2", r"(?:River|Lake) \d+\n")):
        for text, _ in texts(build(name, files, length=3000, part="test"), 4):
            counts = Counter(re.findall(pattern, text.split("Answer the question")[1]))
            assert len(counts) > 1
            assert max(counts.values()) > 1
            assert max(counts.values()) - min(counts.values()) <= 2  # round after round, and the question's once more
            assert 3000 - len(text) < 60  # no other document would fit
        once = build(name, files, length=1000, part="train")  # fewer than there are: none comes twice
        assert all(
            max(Counter(re.findall(pattern, text.split("Answer the")[1])).values()) == 1 for text, _ in texts(once)
        )


def test_every_document_of_a_file_comes_by_chance(tmp_path: Path) -> None:
    """Chi-square of the documents of other articles; the 99.99% quantile at 21 degrees of freedom is 55.

    The first article has two documents, the others one: the table of articles is filled up.
    """
    train = [n for n in range(60) if part_of(f"title {n}") == "train"][:21]
    twins = {train[0], 99}

    def told(i: int) -> dict[str, object]:
        return {"context": f"Town {i:02} is old.", "qas": [{"question": f"{i}?", "answers": [{"text": "x"}]}]}

    articles = [
        {"title": f"title {i}", "paragraphs": [told(each) for each in (sorted(twins) if i in twins else [i])]}
        for i in train
    ]
    (tmp_path / "squad").write_text(json.dumps({"data": articles}))
    task = build_task("ruler", task="qa_1", data=str(tmp_path / "squad"), length=350)
    counts: Counter[str] = Counter()
    for text, _ in texts(task, 1500):
        own, shown = re.search(r"Question: (\d+)", text)[1], re.findall(r"Town (\d+) is", text)
        assert f"{int(own):02}" in shown
        assert len(shown) == len(set(shown)) > 3
        article = twins if int(own) in twins else {int(own)}
        counts.update(int(each) for each in shown if int(each) not in article)
    found = torch.tensor(list(counts.values())).double()
    assert len(found) == 22
    assert ((found - found.mean()) ** 2 / found.mean()).sum() < 55


def test_the_fact_is_the_first_supporting_paragraph(tmp_path: Path) -> None:
    context = [[f"T{k}", [f"Text {k}. "]] for k in range(10)]
    one = {"question": "Who?", "answer": "no", "context": context, "supporting_facts": [["T3", 0], ["T7", 0]]}
    part = part_of("Who?")
    (tmp_path / "hotpot").write_text(json.dumps([one]))
    task = build_task("ruler", task="qa_2", data=str(tmp_path / "hotpot"), length=600, part=part)
    prompt = task.sample(20, generator())
    starts = set()
    for row, fact in enumerate(prompt.hidden["fact"].tolist()):
        text = task.codec.decode(prompt.inputs[row].tolist())
        assert fact == min(re.search(rf"Document \d+:\nT{k}\n", text).start() for k in (3, 7))
        starts.add(fact)
    assert len(starts) > 5


def test_questions_without_an_answer_and_asked_again_are_left_out(tmp_path: Path) -> None:
    part = part_of("town")
    asked = [
        {"question": "Never?", "is_impossible": True, "answers": [], "plausible_answers": [{"text": "old"}]},
        {"question": "Marked?", "is_impossible": True, "answers": [{"text": "old"}]},
        {"question": "Unmarked?", "answers": []},
        {
            "question": " Which? ",
            "is_impossible": False,
            "answers": [{"text": "Tromsø "}, {"text": "Tromsø"}, {"text": "it"}],
        },
    ]
    again = [{"question": "Which?", "answers": [{"text": "later"}]}]
    paragraphs = [{"context": "Tromsø is old.", "qas": asked}, {"context": "Later.", "qas": again}]
    (tmp_path / "squad").write_text(json.dumps({"data": [{"title": "town", "paragraphs": paragraphs}]}), "utf-8")
    task = build_task("ruler", task="qa_1", data=str(tmp_path / "squad"), length=300, part=part)
    for text, references in texts(task):
        assert "Question: Which? Answer:" in text
        assert references == ["Tromsø", "it"]
    assert task.chance()["accuracy"] == 1 / 7  # T r o m s and the two bytes of ø
    prompt = task.sample(4, generator())
    assert task.errors(task.learners()["reader"](prompt), prompt)["prompt_error"].max() == 0


def test_overlap_finds_what_stands_beside_the_words_of_the_question(files) -> None:
    text = (
        "Answer the question from the documents below, with the answer only.\n"
        "Document 1:\nThe mill burned. In the summer, the old mill of Vik was built by Anna-Lise Berg.\n"
        "Document 2:\nThe mill of Voss was never built. Who knows it?\n"
        "Answer the question from the documents above, with the answer only.\n"
        "Question: Who built the old mill of Vik? Answer:"
    )
    # The second sentence has most. Beside the question's words it has In, summer, was, and by Anna-Lise Berg. All but
    # "was" stand once, and the first of them is taken.
    assert extract(text) == [" In"]
    assert extract(text.replace("In the summer, the", "The mill knows: the")) == [" by Anna-Lise Berg"]
    task = build("qa_1", files)
    prompt = task.sample(64, generator())
    wrong = task.errors(task.learners()["overlap"](prompt), prompt)["prompt_error"][:, 0].mean()
    assert 0 < wrong < 0.5  # part 1 of town 2 reads like part 2 of town 1
    assert list(build("vt", files).learners()) == ["reader"]


def test_one_of_several_answers_is_enough_for_questions_only(files) -> None:
    task = build("qa_1", files)
    prompt = task.sample(2, generator())
    first = [task.references(prompt, row)[0] for row in range(2)]
    assert task.match([f"It is {each}." for each in first], prompt) == [1.0, 1.0]
    four = build("niah_multivalue", files)
    prompt = four.sample(1, generator())
    assert four.match([" ".join(four.references(prompt)[:3])], prompt) == [0.75]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cwe"])
def test_any_tokenizer_gives_the_ids_of_the_whole_question(name: str, files, byte_pairs, book) -> None:
    task = build(name, files, length=900, tokenizer=byte_pairs, corpus=book)
    prompt = task.sample(4, generator())
    assert prompt.length == 900
    answer = task.learners()["reader"](prompt)
    assert task.errors(answer, prompt)["accuracy"][prompt.scored].min() == 1
    ends = prompt.scored.shape[1] - prompt.scored.int().flip(1).argmax(1)
    for row, end in enumerate(ends.tolist()):
        ids = [*prompt.inputs[row].tolist(), int(prompt.targets[row, -1])][: end + 1]
        text = byte_pairs.decode(ids)
        begin = max(text.rindex(each) for each in ("What is", "What are", "Question: ") if each in text)
        tail = byte_pairs.encode(text[begin:]).ids
        assert ids[-len(tail) :] == tail
        if name in ("fwe", "niah_multikey_2", "niah_multikey_3", "qa_2"):  # no text that is cut anywhere
            assert byte_pairs.encode(text).ids == ids


def test_common_words_for_any_tokenizer(files, byte_pairs) -> None:
    task = build("cwe", files, length=3000, tokenizer=byte_pairs)
    prompt = task.sample(4, generator())
    assert task.errors(task.learners()["reader"](prompt), prompt)["prompt_error"].max() == 0
    assert (prompt.scored.sum(1) >= 10).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "niah"}, "input should be 'niah_single_1'"),
        ({"length": 200}, "leaves no room for text"),
        ({"task": "niah_multikey_3", "length": 200}, "too short"),
        ({"task": "cwe", "length": 1024}, "too short for cwe: use"),
        ({"task": "fwe", "length": 300}, "too short for fwe"),
        ({"task": "qa_1"}, "needs data, the path of a JSON file in the format of SQuAD 2"),
        ({"task": "qa_2", "data": "nowhere.json"}, "data 'nowhere.json' cannot be read"),
        ({"task": "vt", "data": "x.json"}, "data belongs to qa_1 and qa_2"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task("ruler", **options)


def test_files_of_other_formats_are_refused(files, tmp_path: Path) -> None:
    def refused(task: str, content: object, message: str) -> None:
        (tmp_path / "data").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(InputError, match=message) as error:
            build_task("ruler", task=task, data=str(tmp_path / "data"))
        assert "\n" not in str(error.value)

    squad, hotpot = (json.loads(Path(files[name]).read_text()) for name in ("qa_1", "qa_2"))
    refused("qa_2", squad, r"not in the format of HotpotQA \(input: input should be a valid array")
    refused("qa_1", hotpot, "not in the format of SQuAD 2 .*; qa_1 reads SQuAD 2, qa_2 HotpotQA")
    refused("qa_2", [{**hotpot[0], "answer": 3}], r"HotpotQA \(0.answer: input should be a valid string, got int 3")
    refused("qa_2", [{**hotpot[0], "context": {"title": ["a"], "sentences": [["b"]]}}], "HotpotQA .0.context")
    refused("qa_2", [{key: hotpot[0][key] for key in ("question", "context")}], "0.answer: required, but missing")
    refused("qa_1", {"data": [{"title": "x"}]}, "data.0.paragraphs: required, but missing")
    refused("qa_1", "no json", "is not JSON; expected a JSON file in the format of SQuAD 2")
    refused("qa_2", "", "is not JSON; expected a JSON file in the format of HotpotQA")
    refused("qa_2", [], "holds no questions of the train part")
    refused("qa_1", {"data": []}, "holds no questions of the train part")
    with pytest.raises(InputError, match="cannot be read .*; expected a JSON file in the format of SQuAD 2"):
        build_task("ruler", task="qa_1", data=str(tmp_path))


def test_a_length_that_any_question_needs_is_asked_for_at_once(tmp_path: Path) -> None:
    """One question of two hundred has a long document: no draw can come upon it later."""
    paragraphs = [{"context": "Old.", "qas": [{"question": f"{i}?", "answers": [{"text": "x"}]}]} for i in range(199)]
    paragraphs.append({"context": "Long. " * 100, "qas": [{"question": "How?", "answers": [{"text": "x"}]}]})
    part = part_of("town")
    (tmp_path / "squad").write_text(json.dumps({"data": [{"title": "town", "paragraphs": paragraphs}]}))
    options = {"task": "qa_1", "data": str(tmp_path / "squad"), "part": part}
    with pytest.raises(InputError, match="length 700 is too short for these documents; use 7") as error:
        build_task("ruler", length=700, **options)
    length = int(re.search(r"use (\d+)", str(error.value))[1])
    with pytest.raises(InputError, match=f"use {length} or more"):
        build_task("ruler", length=length - 1, **options)
    task = build_task("ruler", length=length, **options)
    assert any("How?" in text and "Long. Long." in text for text, _ in texts(task, 500))
