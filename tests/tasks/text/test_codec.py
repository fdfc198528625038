"""Tokenizers of tasks: by name as by object, and those that cannot write the prompts are refused."""

from __future__ import annotations

import json

import pytest
import torch

import contextlab.tasks  # noqa: F401  (registers every task)
from contextlab import TaskSpec, build_task, registry
from contextlab.errors import InputError
from contextlab.tasks.text import codec

TASKS = [
    (entry.name, entry.cases[0])
    for entry in registry.entries("task")
    if any(parameter.name == "tokenizer" for parameter in entry.parameters)
]


@pytest.mark.parametrize(("name", "options"), TASKS, ids=[name for name, _ in TASKS])
def test_a_tokenizer_by_its_folder_draws_what_the_tokenizer_itself_draws(
    name: str, options: dict[str, object], byte_pairs, byte_pairs_folder, book
) -> None:
    if any(parameter.name == "corpus" for parameter in registry.lookup("task", name).parameters):
        options = {**options, "corpus": book}
    spec = TaskSpec(name=name, options={**options, "tokenizer": byte_pairs_folder})
    again = TaskSpec.parse(json.loads(spec.model_dump_json()))
    assert again == spec
    task = again.build()
    assert hash(task) == hash(spec.build())
    assert task.input_size == byte_pairs.get_vocab_size()
    own, other = (
        each.sample(4, torch.Generator().manual_seed(1))
        for each in (task, build_task(name, **options, tokenizer=byte_pairs))
    )
    assert torch.equal(own.inputs, other.inputs)
    assert torch.equal(own.targets, other.targets)
    if "reader" in task.learners():  # it parses the text that the tokens decode to, and makes no error
        assert task.errors(task.learners()["reader"](own), own)["accuracy"][own.scored].min() == 1


def test_many_texts_are_encoded_as_one_by_one_and_never_cut_or_padded(byte_pairs) -> None:
    limited = type(byte_pairs).from_str(byte_pairs.to_str())
    limited.enable_truncation(3)
    limited.enable_padding(length=5)
    texts = ["import torch\n", "", "é", "the value of key is: 1234567"]
    found = codec(limited).encode_all(texts)
    assert found == [codec(limited).encode(text) for text in texts] == [byte_pairs.encode(text).ids for text in texts]
    assert [codec(limited).decode(ids) for ids in found] == texts
    assert limited.encode("é").ids != found[2], "the tokenizer that was given is left as it was"


def test_tokenizers_without_the_needed_symbols_are_refused_in_one_line(tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers", minversion="5")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="the tokenizer cannot write '0123456789'"):
        build_task("needle", tokenizer=str(tmp_path))


def test_tokenizers_that_put_spaces_between_pieces_are_refused(byte_pairs) -> None:
    spaced = type(byte_pairs).from_str(byte_pairs.to_str())
    spaced.pre_tokenizer = type(spaced.pre_tokenizer)(add_prefix_space=True)
    with pytest.raises(InputError, match="changes text that is joined from pieces") as caught:
        build_task("needle", tokenizer=spaced)
    assert "became ' the -fox : 42 ." in str(caught.value)


@pytest.mark.parametrize("tokenizer", [3, object(), ["gpt2"]])
def test_what_is_no_tokenizer_is_refused(tokenizer: object) -> None:
    with pytest.raises(InputError, match="tokenizer: expected null .None. for bytes, a folder"):
        build_task("list_aggregation", tokenizer=tokenizer)
