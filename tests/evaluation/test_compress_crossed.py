"""Every registered policy under every wrapper: `compress` measures the combination, or refuses it in one line."""

from __future__ import annotations

import copy
import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from contextlab import registry
from contextlab.errors import InputError
from contextlab.evaluation.compress import build_prompts, compress
from contextlab.evaluation.compress.prompts import draw
from contextlab.models import build_model
from contextlab.policies import AdaKV, EvictionPolicy, PerLayer, Policy, Seen, build_policy, parse_policy

BUDGET = "40tok"
WRAPPERS = {
    "plain": "{plain}",
    "by layer": "0=none; {plain}",
    "head budgets": "ada_kv:of={name}{options}",
    "int8": "{plain}|quantize:bits=8,group=4,window=4",
    "float8": "{plain}|fp8",
    "low rank": "{plain}|low_rank",
    "all": "0=none; ada_kv:of={name}{options}",
}
SMALL: dict[str, dict[str, Any]] = {"pyramid_kv": {"pyramid": 1.5}}


def model() -> Any:
    layer = {"mixer": "attention", "options": {"kv_heads": 2}}
    sizes = {"read_in": "token", "input_size": 256, "output_size": 256}
    return build_model(
        {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 1, "position": "rope", "layers": [layer], **sizes}, seed=0
    )


def texts(entry: registry.Entry) -> dict[str, str]:
    """Wrapper -> a registered policy in it, with its first case's options and a small window."""
    known = {each.name for each in entry.parameters}
    window = {"window": 4} if "window" in known else {}
    options = {**window, **dict(next(iter(entry.cases), {})), **SMALL.get(entry.name, {})}
    plain = ",".join(f"{key}={value}" for key, value in options.items())
    beside = [f"{key}={value}" for key, value in options.items() if key in ("window", "sinks", "every")]
    of = {key: value for key, value in options.items() if key not in ("window", "sinks", "every", "reposition")}
    if of:
        beside.append("options={" + ", ".join(f"{key}: {value}" for key, value in of.items()) + "}")
    given = {
        "name": entry.name,
        "plain": f"{entry.name}:{plain}" if plain else entry.name,
        "options": "".join(f",{each}" for each in beside),
    }
    return {wrapper: text.format(**given) for wrapper, text in WRAPPERS.items()}


@pytest.fixture(scope="module")
def crossed() -> tuple[pd.DataFrame, list[str]]:
    told: list[str] = []
    written = []
    for text in (text for entry in registry.entries("policy") for text in texts(entry).values()):
        try:
            parse_policy(text)
        except InputError as error:  # what cannot be written together
            told.append(f"{text}: {error}")
        else:
            written.append(text)
    found = compress(model(), written, [BUDGET], ["text"], [96], prompts=2, batch=2, decoded=3, fit=2, left_out=told)
    return found, told


def test_every_combination_is_measured_or_refused_in_one_line(crossed: tuple[pd.DataFrame, list[str]]) -> None:
    found, told = crossed
    assert all("\n" not in line for line in told)
    losses = found[found["metric"] == "cross_entropy"].set_index("model")["value"]
    assert losses.map(math.isfinite).all()
    for entry in registry.entries("policy"):
        factory: Any = entry.factory
        drops = issubclass(factory, EvictionPolicy) and factory is not AdaKV
        fine = {"plain": True, "by layer": True, "int8": drops, "float8": drops, "low rank": False}
        fine |= dict.fromkeys(("head budgets", "all"), factory.only_scores)
        for wrapper, text in texts(entry).items():
            refused = [line for line in told if line.startswith(f"{text}: ")]
            assert (text in losses.index, len(refused)) == ((True, 0) if fine[wrapper] else (False, 1)), text


def test_what_is_held_and_read_is_told_by_every_wrapper(crossed: tuple[pd.DataFrame, list[str]]) -> None:
    found, _ = crossed
    state, reads = (
        found[found["metric"] == metric].set_index("model")["value"] for metric in ("state_bytes", "read_bytes")
    )
    for entry in registry.entries("policy"):
        text = texts(entry)
        if issubclass(entry.factory, EvictionPolicy):  # type: ignore[arg-type]
            assert state[text["plain"]] < state[text["by layer"]] < state["full"]
            # of the first layer everything; the second keeps what both keep evenly, where layers share evenly
            if "pyramid" not in text["plain"]:
                assert state[text["by layer"]] == pytest.approx((state[text["plain"]] + state["full"]) / 2, rel=0.01)
        if text["plain"] in reads.index:
            assert reads[text["by layer"]] == pytest.approx(reads[text["plain"]] / 2)
    assert {name.partition(":")[0] for name in reads.index} >= {
        "quest",
        "retrieval",
        "infllm",
        "specache",
        "0=none; quest",
    }


def drawn() -> tuple[Any, Any, Any]:
    """The prompts of a small table, read by hand: tokens, targets, and where the question begins."""
    found = draw(build_prompts("text", 96, model()), 2, 0, torch.device("cpu"), 3)
    return found.prompt.inputs, found.prompt.targets, found.question


def by_hand(policy: Policy) -> float:
    """The cross-entropy of what is read token by token."""
    reader, (tokens, targets, first) = model(), drawn()
    with torch.no_grad(), policy.attach(reader):
        _, state = reader.read(tokens[:, :first])
        parts = []
        for t in range(first, tokens.shape[1]):
            y, state = reader.read(tokens[:, t : t + 1], state)
            parts.append(y)
    return float(F.cross_entropy(torch.cat(parts, 1).transpose(1, 2), targets[:, first:]))


def loss(policies: Any, **more: Any) -> list[float]:
    found = compress(model(), policies, [BUDGET], ["text"], [96], prompts=2, batch=2, decoded=3, **more)
    return list(found[(found["metric"] == "cross_entropy") & (found["model"] != "full")]["value"])


def test_what_wrappers_prepare_is_what_preparing_by_hand_gives() -> None:
    tokens, _, first = drawn()
    kvzip = build_policy("kvzip", budget=BUDGET, window=4)
    kvzip.watch(model(), tokens[:, :first])
    heads = AdaKV(BUDGET, of=build_policy("kvzip", window=4))
    heads.of.watch(model(), tokens[:, :first])
    oracle = build_policy("oracle", budget=BUDGET)
    oracle.watch(model(), tokens)
    expected = [by_hand(each) for each in (PerLayer({0: None}, kvzip), heads, PerLayer({1: None}, oracle))]
    texts = ["0=none; kvzip:window=4", "ada_kv:of=kvzip,window=4", "1=none; oracle"]
    assert loss(texts) == pytest.approx(expected, rel=1e-5)
    assert loss([*texts, "kvzip:window=4"])[3] != pytest.approx(expected[0], rel=1e-4)


def test_what_wrappers_train_is_trained_for_the_task_and_the_model_stays() -> None:
    tokens = draw(build_prompts("text", 96, model(), part="train"), 256, 1, torch.device("cpu"), 3).prompt.inputs
    locret = build_policy("locret", budget=BUDGET, window=4)
    locret.fit(model(), tokens, 3, steps=4, seed=0)
    heads = AdaKV(BUDGET, of=copy.copy(locret))
    gates = build_policy("dmc", budget=BUDGET)
    gates.fit(model(), tokens, tokens.shape[1] / 40, steps=4, seed=0)
    expected = [by_hand(each) for each in (PerLayer({0: None}, locret), heads, gates)]
    assert loss(["0=none; locret:window=4", "ada_kv:of=locret,window=4", "dmc"], fit=4) == pytest.approx(
        expected, rel=1e-5
    )
    with pytest.raises(InputError, match="policy 0=none; dmc: it must be trained; --fit STEPS"):
        loss(["0=none; dmc"])


class Later(EvictionPolicy):
    """A stranger's policy: one score."""

    def score(self, seen: Seen) -> torch.Tensor:
        return seen.positions.float()


def test_policies_that_were_made_are_measured_like_those_that_are_written() -> None:
    later, streaming = Later(sinks=4, window=4), "streaming_llm:sinks=4,window=4"
    fp8 = build_policy("fp8")
    made = {
        "later": later,
        "heads": AdaKV(of=later, floor=1.0, page=1),
        "few bits": later | fp8,
        "streaming": streaming,
    }
    found = compress(model(), made, [BUDGET], ["text"], [96], prompts=2, batch=2, decoded=3)
    losses = found[found["metric"] == "cross_entropy"].set_index("model")["value"]
    assert set(losses.index) == {"full", *made}
    assert losses["later"] == pytest.approx(by_hand(later.with_budget(BUDGET)), rel=1e-5)
    assert losses["heads"] == pytest.approx(losses["later"], rel=1e-6)  # the same tokens, laid out another way
    assert losses["few bits"] != losses["later"]
    own = compress(model(), [Later("20tok", window=4), "fp8"], [BUDGET], ["text"], [96], prompts=2, decoded=1)
    assert set(zip(own["model"], own["split"], strict=True)) == {("full", "full"), ("Later", "20tok"), ("fp8", "own")}
    with pytest.raises(InputError, match="two policies are called 'Later'; give a mapping of names to policies"):
        loss([later, Later(window=5)])
    with pytest.raises(InputError, match="expected policies or their names, got 3"):
        loss([3])
