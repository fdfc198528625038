"""Facts in filler and aggregation over lists, read back from their text."""

from __future__ import annotations

import re

import pytest
import torch

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.tasks.text.babilong import NAMES
from contextlab.tasks.text.babilong_world import ACTORS, DROPS, GIVES, MOVES, OBJECTS, PLACES, TAKES

FACT = rf"({'|'.join(ACTORS)}) ({'|'.join((*MOVES, *TAKES, *DROPS, *GIVES))}) the (\w+)(?: to (\w+))?\.\n"
RELATION = r"The (\w+) is (north|south|east|west) of the (\w+)\.\n"
STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
OPERATIONS = {"sum": sum, "max": max, "min": min, "count": lambda found: sum(each > 54 for each in found)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts(task, count: int) -> list[tuple[str, list[str]]]:
    prompt = task.sample(count, generator())
    asked = [task.codec.decode(task.ask(prompt, row).tolist()) for row in range(count)]
    return [(text, task.references(prompt, row)) for row, text in enumerate(asked)]


@pytest.mark.parametrize("task", NAMES)
def test_readers_make_no_error_on_any_split(task: str) -> None:
    for split in build_task("babilong", task=task, length=900).splits().values():
        prompt = split.sample(24, generator())
        assert prompt.length == split.length
        answer = split.learners()["reader"](prompt)
        assert split.errors(answer, prompt)["prompt_error"].max() == 0


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
def test_stories_can_happen_and_answer_the_question(task: str) -> None:
    """The world is told again fact by fact, objects with their whole history."""
    counts = dict.fromkeys(("move", "take", "drop"), 0)
    places = dict.fromkeys(PLACES, 0)
    for text, references in texts(build_task("babilong", task=task, facts=14, length=1500), 150):
        at: dict[str, str] = {}
        history: dict[str, list[str]] = {}
        holder: dict[str, str] = {}
        told = re.findall(FACT, text)
        assert len(told) == 14
        for who, verb, noun, _ in told:
            if verb in MOVES:
                counts["move"] += 1
                assert noun in PLACES
                assert at.get(who) != noun
                at[who] = noun
                for thing in [thing for thing, owner in holder.items() if owner == who]:
                    history[thing].append(noun)
            elif verb in TAKES:
                counts["take"] += 1
                assert noun in OBJECTS
                assert noun not in holder
                assert history.get(noun, [at[who]])[-1] == at[who]
                holder[noun] = who
                history.setdefault(noun, [at[who]])
            else:
                counts["drop"] += 1
                assert holder.pop(noun) == who
        thing, then = re.search(r"Where (?:is|was) (?:the )?(\w+?)(?: before the (\w+))?\?", text).groups()
        if task == "qa1":
            assert references == [at[thing]]
        elif task == "qa2":
            assert references == [history[thing][-1]]
        else:
            assert [references[0], then] == history[thing][-2:]
        places[references[0]] += 1
    assert (counts["take"] > 0) == (counts["drop"] > 0) == (task != "qa1")
    assert min(places.values()) > 5


def question(text: str) -> str:
    return re.search(r"\nQuestion: (.+)\nAnswer:(?: the)? $", text)[1]


def test_gifts_can_happen_and_the_last_that_fits_answers() -> None:
    forms = {
        r"What did (?P<giver>\w+) give to (?P<other>\w+)\?": "thing",
        r"Who gave the (?P<thing>\w+)(?: to (?P<other>\w+))?\?": "giver",
        r"Who received the (?P<thing>\w+)\?": "other",
        r"Who did (?P<giver>\w+) give the (?P<thing>\w+) to\?": "other",
    }
    answers: dict[str, int] = {}
    asked = dict.fromkeys(forms, 0)
    earlier = 0  # gifts with another answer that fit the question, and are not the last
    gifts_told = 0
    for text, references in texts(build_task("babilong", task="qa5", facts=20, length=2000), 400):
        at: dict[str, str] = {}
        lies: dict[str, str] = {}
        holder: dict[str, str] = {}
        gifts = []
        told = re.findall(FACT, text)
        assert len(told) == 20
        for who, verb, noun, other in told:
            assert bool(other) == (verb in GIVES)
            if verb in MOVES:
                assert at.get(who) != noun
                at[who] = noun
            elif verb in TAKES:
                assert noun not in holder
                assert lies.setdefault(noun, at[who]) == at[who]
                holder[noun] = who
            elif verb in DROPS:
                assert holder.pop(noun) == who
                lies[noun] = at[who]
            else:
                assert holder[noun] == who != other
                assert at.setdefault(other, at[who]) == at[who]
                holder[noun] = other
                gifts.append({"giver": who, "thing": noun, "other": other})
        form, given = next(
            (form, re.fullmatch(form, question(text))) for form in forms if re.fullmatch(form, question(text))
        )
        named = {key: value for key, value in given.groupdict().items() if value}
        fitting = [gift[forms[form]] for gift in gifts if named.items() <= gift.items()]
        assert references == fitting[-1:]
        earlier += len(set(fitting)) > 1
        gifts_told += len(gifts)
        asked[form] += 1
        answers[references[0]] = answers.get(references[0], 0) + 1
    assert earlier > 20
    assert gifts_told > 400 * 2
    assert min(asked.values()) > 50
    people, things = (torch.tensor([answers[name] for name in names]).double() for names in (ACTORS, OBJECTS))
    for counts in (people, things):  # the 99.99% quantile at 3 degrees of freedom is 21.1
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 21.1


@pytest.mark.parametrize("facts", [2, 3, 5])
def test_places_lie_where_relations_say_and_the_order_of_words_matters(facts: int) -> None:
    """Places are put on a grid, one relation after another."""
    ways: dict[str, int] = {}
    backward = 0
    for text, references in texts(build_task("babilong", task="qa4", facts=facts, length=500), 200):
        told = re.findall(RELATION, text)
        assert len(told) == facts
        at = {told[0][0]: (0, 0)}
        for _ in range(facts):
            for first, way, second in told:
                dx, dy = STEPS[way]
                if second in at:
                    x, y = at[second]
                    assert at.setdefault(first, (x + dx, y + dy)) == (x + dx, y + dy)
                elif first in at:
                    x, y = at[first]
                    at[second] = (x - dx, y - dy)
        assert len(at) == len(set(at.values())) == facts + 1
        forward = re.fullmatch(r"What is (\w+) of the (\w+)\?", question(text))
        way, place = (
            forward.groups()
            if forward
            else re.fullmatch(r"What is the (\w+) (\w+) of\?", question(text)).groups()[::-1]
        )
        (dx, dy), (x, y) = STEPS[way], at[place]
        sign = 1 if forward else -1
        side = {(x + sign * dx, y + sign * dy): True, (x - sign * dx, y - sign * dy): False}
        beside = {side[where]: name for name, where in at.items() if where in side}
        assert references == [beside[True]]
        assert beside.keys() == {True, False}  # the same words in another order would have that answer
        ways[way] = ways.get(way, 0) + 1
        backward += forward is None
    assert min(ways.values()) > 25
    assert len(ways) == 4
    assert 70 < backward < 130


@pytest.mark.parametrize("task", ["qa6", "qa7", "qa8"])
def test_places_and_hands_answer_the_question(task: str) -> None:
    counts: dict[str, int] = {}
    prompts = build_task("babilong", task=task, facts=12, length=1500)
    for text, references in texts(prompts, 300):
        at: dict[str, str] = {}
        hands: dict[str, set[str]] = {}  # of those who ever held something
        for who, verb, noun, other in re.findall(FACT, text):
            if verb in MOVES:
                at[who] = noun
            elif verb in TAKES:
                hands.setdefault(who, set()).add(noun)
            else:
                hands[who].remove(noun)
                if other:
                    hands.setdefault(other, set()).add(noun)
        if task == "qa6":
            who, place = re.fullmatch(r"Is (\w+) in the (\w+)\?", question(text)).groups()
            expected = ["yes" if at[who] == place else "no"]
        elif task == "qa7":
            who = re.fullmatch(r"How many objects is (\w+) carrying\?", question(text))[1]
            expected = [("none", "one", "two", "three")[len(hands[who])]]
        else:
            who = re.fullmatch(r"What is (\w+) carrying\?", question(text))[1]
            expected = sorted(hands[who]) or ["nothing"]
        assert references == expected
        counts[",".join(references)] = counts.get(",".join(references), 0) + 1
    assert len(counts) == {"qa6": 2, "qa7": 4, "qa8": 8}[task]
    if task == "qa6":
        assert abs(counts["yes"] - 150) < 45  # five standard deviations


def test_lists_match_in_any_order_and_only_as_a_whole() -> None:
    task = build_task("babilong", task="qa8", facts=12)
    prompt = task.sample(100, generator())
    row = next(row for row in range(100) if len(task.references(prompt, row)) == 2)
    one, other = task.references(prompt, row)
    texts = [""] * 100
    texts[row] = f"{other} and {one}"
    assert task.match(texts, prompt)[row] == 1
    texts[row] = one
    assert task.match(texts, prompt)[row] == 0.5


def test_first_places_are_drawn_evenly() -> None:
    """Chi-square over six places; the 99.99% quantile at 5 degrees of freedom is 25.7."""
    task = build_task("babilong", length=400, facts=3)
    first = [PLACES.index(re.search(FACT, text)[3]) for text, _ in texts(task, 1200)]
    counts = torch.bincount(torch.tensor(first), minlength=6).double()
    assert ((counts - 200) ** 2 / 200).sum() < 25.7


def test_the_distance_is_that_of_the_fact_that_tells() -> None:
    task = build_task("babilong", length=700)
    prompt = task.sample(30, generator())
    distance = task.facets(prompt)["distance"]
    for row in range(30):
        begin = int(prompt.hidden["fact"][row])
        fact = re.match(FACT, task.codec.decode(prompt.inputs[row, begin : begin + 60].tolist()))
        question = task.codec.decode(task.ask(prompt, row).tolist())
        assert fact[1] == re.search(r"Where is (\w+)", question)[1]
        assert [fact[3]] == task.references(prompt, row)
        first = int(prompt.scored[row].int().argmax())
        assert distance[row, first] == first - begin


@pytest.mark.parametrize("task", ["qa4", "qa5", "qa6", "qa7", "qa8"])
def test_the_fact_that_tells_is_named(task: str) -> None:
    """Its text is read at the place that `hidden` names, and held to the question."""
    built = build_task("babilong", task=task, facts=5, length=700)
    prompt = built.sample(40, generator())
    for row, begin in enumerate(prompt.hidden["fact"].tolist()):
        ids = built.ask(prompt, row).tolist()
        line, later = built.codec.decode(ids[begin:]).split("\n", 1)
        line, asked = f"{line}\n", question(built.codec.decode(ids))
        assert re.fullmatch(RELATION if task == "qa4" else FACT, line)
        if task == "qa4":
            place = next(name for name in PLACES if name in asked)
            assert {place, built.references(prompt, row)[0]} == set(re.fullmatch(RELATION, line).group(1, 3))
        elif task == "qa5":
            assert {*re.findall("|".join((*ACTORS, *OBJECTS)), asked), *built.references(prompt, row)} <= set(
                re.findall(r"\w+", line)
            )
        else:
            who = next(name for name in ACTORS if name in asked)
            assert who in line
            acts = (*MOVES,) if task == "qa6" else (*TAKES, *DROPS, *GIVES)
            assert any(f" {verb} the" in line for verb in acts)
            assert not any(
                who in each[:1] + each[3:] and each[1] in acts for each in re.findall(FACT, later)
            )  # and is the last of its kind


@pytest.mark.parametrize("operation", OPERATIONS)
def test_lists_are_aggregated(operation: str) -> None:
    task = build_task("list_aggregation", entries=12, operation=operation)
    length = task.sample(1, generator()).length
    for text, references in texts(task, 60):
        names, numbers = zip(*re.findall(r"^([A-Z]{3}): (\d+)$", text, flags=re.M), strict=True)
        assert len(set(names)) == 12
        assert all(10 <= int(each) < 100 for each in numbers)
        assert references == [str(OPERATIONS[operation]([int(each) for each in numbers]))]
    for split in task.splits().values():
        prompt = split.sample(32, generator())
        assert split is not task or prompt.length == length
        answer = split.learners()["reader"](prompt)
        assert split.errors(answer, prompt)["prompt_error"].max() == 0
    assert list(task.splits()) == ["train", "entries=6", "entries=24", "entries=48"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("babilong", {"task": name, "length": 300}) for name in NAMES[2:]),
        ("list_aggregation", {"entries": 9, "operation": "sum"}),
        ("list_aggregation", {"entries": 9, "operation": "count"}),
    ],
)
def test_any_tokenizer_writes_them(name: str, options: dict[str, object], byte_pairs, book) -> None:
    task = build_task(name, **options, **({"corpus": book} if name == "babilong" else {}), tokenizer=byte_pairs)
    prompt = task.sample(12, generator())
    answer = task.learners()["reader"](prompt)
    assert task.errors(answer, prompt)["prompt_error"].max() == 0
    assert name != "babilong" or prompt.length == 300
    ends = prompt.scored.shape[1] - prompt.scored.int().flip(1).argmax(1)
    for row, end in enumerate(ends.tolist()):
        ids = [*prompt.inputs[row].tolist(), int(prompt.targets[row, -1])][: end + 1]
        text = byte_pairs.decode(ids)
        tail = byte_pairs.encode(text[text.rindex("Question") :]).ids
        assert ids[-len(tail) :] == tail
        assert name == "babilong" or byte_pairs.encode(text).ids == ids


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("babilong", {"facts": 1}, "greater than or equal to 2"),
        ("babilong", {"facts": 2}, "facts 2 make no story of qa1; expected at least 3"),
        ("babilong", {"task": "qa4", "facts": 6}, "qa4 tells of 6 places; expected at most 5"),
        ("babilong", {"length": 150}, "leaves no room for text"),
        ("babilong", {"facts": 10**5}, "each has 4 tokens or more, and length is 1024; at most 256"),
        ("babilong", {"task": "qa9"}, "input should be 'qa1', 'qa2'.* or 'qa8'"),
        ("list_aggregation", {"entries": 1}, "greater than or equal to 2"),
        ("list_aggregation", {"operation": "mean"}, "input should be 'sum'"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task(name, **options)
