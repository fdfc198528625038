"""`compress`: what it measures is what reading by hand gives, budgets are kept to, what does not fit is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.evaluation.compress import build_prompts, compress
from contextlab.evaluation.compress.prompts import draw
from contextlab.experiments import find_model
from contextlab.models import build_model, load
from contextlab.policies import build_policy

SIZES = {"read_in": "token", "input_size": 256, "output_size": 256}
TOKEN = 2 * 2 * 16 * 4  # bytes of a token: two layers of keys and values of 16 float32 numbers


def model(mixer: str = "attention", seed: int = 0, **options: Any) -> Any:
    layer = {"mixer": mixer, "options": options}
    return build_model({"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 1, "layers": [layer], **SIZES}, seed=seed)


def value(found: pd.DataFrame, policy: str, metric: str, budget: str | None = None, **where: Any) -> float:
    rows = found[(found["model"] == policy) & (found["metric"] == metric)]
    rows = rows if budget is None else rows[rows["split"] == budget]
    for key, wanted in where.items():
        rows = rows[rows[key] == wanted]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def by_hand(reader: Any, drawn: Any) -> Tensor:
    """Logits from the question on: read up to it, then the question, then the answer token by token."""
    x, first, length = drawn.prompt.inputs, drawn.question, drawn.prompt.length
    answer = next(t for t in range(first, length) if drawn.prompt.scored[:, t].any())
    assert first < answer
    _, state = reader.read(x[:, :first])
    y, state = reader.read(x[:, first:answer], state)
    parts = [y]
    for t in range(answer, length):
        y, state = reader.read(x[:, t : t + 1], state)
        parts.append(y)
    return torch.cat(parts, 1)


@pytest.fixture(scope="module")
def found() -> pd.DataFrame:
    policies = ["streaming_llm:sinks=2", "h2o:window=4", "quantize:bits=8"]
    other = {"linear": model("linear_attention")}
    return compress(
        model(), policies, ["100%", "10%", "8kB"], ["needle", "text"], [192], prompts=2, batch=2, compare=other
    )


def test_without_a_policy_it_is_the_plain_model(found: pd.DataFrame) -> None:
    for text in ("needle", "text"):
        task = build_prompts(text, 192, model())
        drawn = draw(task, 2, 0, torch.device("cpu"))
        with torch.no_grad():
            logits = model()(drawn.prompt.inputs)
        each = F.cross_entropy(logits.transpose(1, 2), drawn.prompt.targets, reduction="none")
        scored = drawn.prompt.scored & (torch.arange(192) >= drawn.question)
        assert scored.any(1).all()
        assert value(found, "full", "cross_entropy", task=text) == pytest.approx(float(each[scored].mean()), rel=1e-5)
    assert value(found, "full", "perplexity") == pytest.approx(
        math.exp(value(found, "full", "cross_entropy", task="text"))
    )


def test_a_full_budget_changes_nothing_and_smaller_ones_are_kept_to(found: pd.DataFrame) -> None:
    for text in ("needle", "text"):
        plain = value(found, "full", "cross_entropy", task=text)
        for policy in ("streaming_llm:sinks=2", "h2o:window=4"):
            assert value(found, policy, "cross_entropy", "100%", task=text) == pytest.approx(plain, rel=1e-5)
            assert abs(value(found, policy, "kl", "100%", task=text)) < 1e-6
            assert value(found, policy, "kl", "10%", task=text) > 0
            for budget, limit in (("10%", 0.1 * 192 * TOKEN), ("8kB", 8000)):
                held = value(found, policy, "state_bytes", budget, task=text)
                assert limit / 2 < held <= limit
        own = found[(found["model"] == "quantize:bits=8") & (found["task"] == text)]
        assert set(own["split"]) == {"own"}
        assert value(found, "linear", "state_bytes", task=text) < 3000
    compared = found[found["model"] == "linear"]
    assert set(compared["kind"]) == {"model"}
    assert {"cross_entropy", "state_bytes", "decode_ratio"} <= set(compared["metric"])
    times = found[found["metric"].isin(["prefill_ratio", "decode_ratio"])]
    assert (times["ci_low"] <= times["value"]).all()
    assert (times["value"] <= times["ci_high"]).all()
    assert (times.loc[times["model"] == "full", "value"] == 1).all()


def test_the_divergence_is_that_of_reading_by_hand(found: pd.DataFrame) -> None:
    reader, task = model(), build_prompts("needle", 192, model())
    policy = build_policy("streaming_llm", sinks=2, budget="16kB")  # 8 for each of two rows
    drawn = draw(task, 2, 0, torch.device("cpu"))
    x, first = drawn.prompt.inputs, drawn.question
    with torch.no_grad():
        p = reader(x)[:, first:].double().softmax(-1)
        with policy.attach(reader):
            logits = by_hand(reader, drawn)
    q = logits.double().softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)[drawn.prompt.scored[:, first:]].mean()
    assert value(found, "streaming_llm:sinks=2", "kl", "8kB", task="needle") == pytest.approx(float(kl), rel=1e-3)


def test_prompts_are_cut_where_their_question_begins() -> None:
    for text, begins in (("needle", "\nQuestion: what is"), ("kv_retrieval", '\n\nKey: "')):
        task = build_prompts(text, 512, model())
        for seed in range(3):
            drawn = draw(task, 3, seed, torch.device("cpu"))
            words = [bytes(row[drawn.question :].tolist()).decode() for row in drawn.prompt.inputs]
            assert any(each.startswith(begins) for each in words)  # of the row whose question begins first
            assert all(begins in each for each in words)
    assert 430 < build_prompts("kv_retrieval", 512, model()).sample(1, torch.Generator()).length <= 512
    recall = build_prompts("mqar", 128, model())
    assert draw(recall, 4, 0, torch.device("cpu")).question >= 2 * recall.pairs  # type: ignore[attr-defined]
    assert build_prompts("mqar:pairs=4,vocabulary=64", 128, model()).pairs == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": ["h20"]}, "unknown policy 'h20'; did you mean 'h2o'?"),
        ({"policies": []}, "expected at least one policy"),
        ({"budgets": ["0%"]}, "0% keeps nothing"),
        ({"budgets": ["-1tok"]}, "-1tok keeps nothing"),
        ({"budgets": ["101%"]}, "101% is more than the full cache"),
        ({"budgets": []}, "policy h2o: expected a budget"),
        ({"budgets": ["20tok"]}, "policy h2o: budget: 20 tokens do not hold the 32 protected ones"),
        ({"budgets": ["5%"]}, "policy h2o: budget 5% of"),
        ({"budgets": ["1kB"]}, "policy h2o: budget: 1kB does not hold the 32 protected tokens"),
        ({"tasks": ["nedle"]}, "unknown task 'nedle'; did you mean 'needle'?"),
        ({"tasks": ["linear_regression"]}, "shows vectors, and the model reads tokens"),
        ({"tasks": ["tree_traversal"]}, "has no length to set"),
        ({"tasks": ["needle:length=300"]}, "length is no option here; give it as --lengths 300"),
        ({"lengths": [40]}, "length 40 leaves no room for text"),
        ({"tasks": ["kv_retrieval"], "lengths": [100]}, "100 is too short for kv_retrieval"),
        ({"model": model("mamba")}, "H2O needs a model with a KV state"),
        (
            {"tasks": ["mqar:vocabulary=300"]},
            "the model knows 256; give a task of its tokens, such as mqar:vocabulary=256",
        ),
        ({"prompts": 1}, "prompts: expected at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    given = {"model": model(), "policies": ["h2o"], "budgets": ["50%"], "tasks": ["needle"], "lengths": [192]}
    with pytest.raises(InputError, match=message) as caught:
        compress(**{**given, **change})
    assert "\n" not in str(caught.value)


def test_policies_that_watch_or_learn_are_prepared_on_the_prompts() -> None:
    reader = model()
    with pytest.raises(InputError, match="locret:window=4: it must be trained; --fit STEPS"):
        compress(reader, ["locret:window=4"], ["25%"], ["needle"], [192], prompts=2)
    before = [weight.clone() for weight in reader.parameters()]
    policies = ["oracle", "kvzip:sinks=2", "locret:window=4", "locret:window=4|fp8"]
    found = compress(reader, policies, ["100%", "25%"], ["needle"], [192], prompts=4, batch=4, fit=3)
    assert all(torch.equal(a, b) for a, b in zip(before, reader.parameters(), strict=True))
    for policy in policies:
        assert value(found, policy, "state_bytes", "25%") <= 0.25 * 192 * TOKEN
    for policy in ("oracle", "kvzip:sinks=2", "locret:window=4"):
        assert abs(value(found, policy, "kl", "100%")) < 1e-6
    task = build_prompts("needle", 192, reader)
    drawn = draw(task, 4, 0, torch.device("cpu"))
    for name, seen in (("oracle", drawn.prompt.length), ("kvzip", drawn.question)):
        policy = build_policy(name, budget="25%", sinks=0 if name == "oracle" else 2)
        policy.watch(reader, drawn.prompt.inputs[:, :seen])
        with torch.no_grad(), policy.attach(reader):
            logits = by_hand(reader, drawn)
        each = F.cross_entropy(logits.transpose(1, 2), drawn.tail.targets, reduction="none")
        label = name if name == "oracle" else "kvzip:sinks=2"
        expected = float(each[drawn.tail.scored].mean())
        assert value(found, label, "cross_entropy", "25%") == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_kept_to_is_left_out_and_told_or_refused() -> None:
    policies, told = ["h2o:window=30", "streaming_llm:sinks=2"], []  # type: tuple[list[str], list[str]]
    found = compress(model(), policies, ["50%", "10%"], ["needle"], [192], prompts=2, left_out=told)
    settings = set(zip(found["model"], found["split"], strict=True))
    assert settings == {("full", "full"), (policies[0], "50%"), (policies[1], "50%"), (policies[1], "10%")}
    assert len(told) == 1
    assert told[0].startswith("h2o:window=30 at 10%, needle at 192 tokens: policy h2o:window=30: budget 10% of")
    told.clear()
    found = compress(
        model(), [*policies, "streaming_llm:window=300"], ["200tok"], ["needle"], [192], prompts=2, left_out=told
    )
    assert [line.partition(":")[0] for line in told] == ["streaming_llm"]
    assert set(found["model"]) == {"full", *policies}


def test_models_of_transformers_are_compressed_alike(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    name, theirs, _ = find_model(str(tmp_path), torch.device("cpu"))
    ours = load(tmp_path, native=True)
    policies = ["h2o:window=4", "kvzip:sinks=2", "oracle", "quantize:bits=4"]
    tables = [
        compress(each, policies, ["25%"], ["needle"], [192], prompts=2, batch=2, name=name) for each in (theirs, ours)
    ]
    for policy in ("full", *policies):
        for metric in ("cross_entropy", "accuracy"):
            a, b = (value(found, policy, metric) for found in tables)
            assert a == pytest.approx(b, rel=1e-3)
        if policy != "full":
            assert value(tables[0], policy, "state_bytes") <= value(tables[0], "full", "state_bytes")
    for policy in policies[:3]:
        assert value(tables[0], policy, "state_bytes") <= 0.25 * 192 * TOKEN
    quest = "quest:page=8,window=4"
    reads = [
        value(compress(each, [quest], ["50%"], ["needle"], [192], prompts=2), quest, "read_bytes")
        for each in (theirs, ours)
    ]
    assert 0 < reads[0] == reads[1] <= 0.5 * 192 * TOKEN


def test_what_a_token_reads_is_measured_and_must_be_within_the_budget() -> None:
    told: list[str] = []
    policies = ["quest:page=16,window=4", "retrieval:window=4,page=8", "retrieval:window=4"]  # the last of long leaves
    found = compress(model(), policies, ["50%"], ["needle"], [192], prompts=2, batch=2, left_out=told)
    for policy in policies[:2]:
        assert 0 < value(found, policy, "read_bytes") <= 0.5 * 192 * TOKEN
    assert not (found["model"].eq("full") & found["metric"].eq("read_bytes")).any()
    assert len(told) == 1
    assert "retrieval:window=4: budget 50% of 115 tokens is too small: a token reads at least" in told[0]
