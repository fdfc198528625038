"""`contextlab generate`: what is written, how it is drafted, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from contextlab import build_model, build_task, load_model, save_model
from contextlab.models import ModelSpec

BYTES = {"width": 16, "depth": 3, "heads": 2, "input_size": 256, "output_size": 256, "read_in": "token"}


@pytest.fixture
def models(tmp_path):
    """A model of bytes, and one of a task."""
    save_model(build_model({**BYTES, "position": "learned", "max_length": 24}), tmp_path / "bytes")
    task = build_task("associative_recall", vocabulary=8, pairs=2, length=8)
    save_model(build_model(ModelSpec(width=16, depth=2, heads=2).for_task(task)), tmp_path / "recall")


def test_it_writes_as_the_model_does_and_says_how_it_drafted(call, models, tmp_path):
    options = ("--prompt", "import os", "--tokens", "8", "--time", "0")
    code, out, _ = call("generate", "bytes", *options, "--draft", "layers=1", "--draft", "layers=2,ahead=3", "--json")
    assert code == 0
    told = json.loads(out)
    prompt = torch.tensor([list(b"import os")])
    expected = load_model(tmp_path / "bytes").eval().generate(prompt, 8)[0].tolist()
    assert told["prompts"] == [
        {"prompt": list(b"import os"), "written": expected, "text": bytes(expected).decode(errors="replace")}
    ]
    assert [(each["layers"], each["ahead"]) for each in told["drafts"]] == [(1, 4), (2, 3)]
    code, out, _ = call("generate", "bytes", *options, "--draft", "layers=2,ahead=3")
    assert code == 0
    assert out.startswith("import os")
    for words in ("layers", "accepted", f"{told['drafts'][1]['acceptance']:.1%}", "3 turns"):
        assert words in out


def test_prompts_of_a_task_are_drawn_and_read_as_its_symbols(call, models):
    options = ("generate", "recall", "--data", "associative_recall:vocabulary=8,pairs=2,length=8", "--prompts", "2")
    drawn = ("--tokens", "5", "--temperature", "1", "--json")
    runs = [json.loads(call(*options, *drawn, "--seed", seed)[1]) for seed in "001"]
    assert runs[0] == runs[1] != runs[2]
    for each in runs[0]["prompts"]:
        assert len(each["prompt"]) == 8
        assert len(each["written"]) == len(each["text"].split()) == 5
        assert all(symbol[0] in "kv_" for symbol in each["text"].split())
    assert runs[0]["drafts"] == []
    code, out, _ = call(*options, "--tokens", "5", "--temperature", "1", "--seed", "0")
    assert code == 0
    texts = [" ".join(each.split()) for each in out.strip().split("\n\n")]
    assert [len(text.split()) for text in texts] == [8 + 5, 8 + 5]  # no two symbols run together


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bytes",), "expected --prompt TEXT or --data FILE|TASK, one of the two"),
        (("bytes", "--prompt", ""), "--prompt: expected a text of at least one token"),
        (("bytes", "--prompt", "a", "--draft", "2"), "--draft: expected layers=E or layers=E,ahead=D"),
        (("bytes", "--prompt", "a", "--draft", "layers=3"), "draft.layers: 3 of 3 layers; 1 to 2 can draft for all"),
        (("bytes", "--prompt", "a", "--draft", "layer=1"), "draft.layer: unknown key; did you mean 'layers'?"),
        (("bytes", "--prompt", "a", "--prompts", "3"), "--prompts: are drawn of --data; leave it out"),
        (("bytes", "--prompt", "a", "--time", "3"), "--time: is how long a draft is timed; leave it out"),
        (("bytes", "--prompt", "a", "--draft", "layers=1", "--temperature", "1"), "leave out --temperature or --draft"),
        (("bytes", "--prompt", "abcd"), "4 tokens and 64 more are too many for a model of 24 positions; give fewer, "
                                        "such as --tokens 21"),
        (("recall", "--prompt", "a"), "the model has 8 tokens, which cannot be the 256 of bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(call, models, arguments, words):
    code, _, err = call("generate", *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
