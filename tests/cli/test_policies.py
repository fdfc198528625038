"""The command line and policies: `list policies`, `show policy`, `compress`."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from contextlab import registry


def test_policies_are_listed_and_shown_with_what_they_need(call):
    rows = {row["name"]: row for row in json.loads(call("list", "policies", "--json")[1])}
    assert set(rows) == set(registry.names("policy"))
    assert rows["h2o"]["family"] == "by attention"
    assert rows["h2o"]["needs"] == "the attention of all queries"
    assert rows["snapkv"]["needs"] == "the last 32 queries"
    assert rows["streaming_llm"]["needs"] == "nothing"
    assert rows["kvzip"]["needs"] == "a second reading of the prompt"
    assert rows["locret"]["needs"] == "each token's own query; training of its heads"
    assert rows["dmc"]["needs"] == "training of its gates"
    assert rows["oracle"]["needs"] == "the future: all that will be read"
    code, out, _ = call("list", "policies")
    assert code == 0
    assert "by attention" in out
    for name in rows:
        code, out, err = call("show", "policy", name)
        assert code == 0, err
        assert "Family: " in out
        shown = json.loads(call("show", "policy", name, "--json")[1])
        assert shown["family"] == rows[name]["family"]
        scope: dict[str, object] = {"contextlab": __import__("contextlab")}
        exec(shown["example"].splitlines()[0], scope)  # the line that builds it
        assert scope["policy"] is not None
        assert all(each["help"] for each in shown["parameters"]), name
    row = next(line for line in call("show", "policy", "tova")[1].splitlines() if line.startswith("sinks"))
    assert " ".join(row.split()).startswith("sinks 0 first tokens of each row that are never dropped")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "policy", "snapk"), "unknown policy 'snapk'; did you mean 'snapkv'?"),
        (("list", "policie"), "unknown kind 'policie'; did you mean 'policies'?"),
    ],
)
def test_near_names_are_told(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_compress_measures_prints_and_writes(call, tmp_path):
    from contextlab.models import build_model, save_model

    sizes = {"read_in": "token", "input_size": 256, "output_size": 256, "width": 16, "depth": 1, "heads": 2}
    save_model(build_model("transformer", **sizes), tmp_path / "small")
    save_model(build_model("linear_transformer", **sizes), tmp_path / "linear")
    arguments = "compress small --policy snapkv:window=4 --policy quantize --budget 50% --budget 20% --task text"
    arguments += " --lengths 64 --prompts 4 --batch 2 --compare linear"
    code, out, err = call(*arguments.split())
    assert code == 0, err
    assert "text, 64 tokens" in out
    assert "not seen to be better than chance" in " ".join(out.split())  # it is untrained: nothing ranks
    results = pd.read_parquet(tmp_path / "compressed/small/results.parquet")
    assert set(results["model"]) == {"full", "snapkv:window=4", "quantize", "linear"}
    assert set(results["split"]) == {"full", "50%", "20%", "own"}
    assert (results.loc[results["metric"] == "decode_ratio", "n"] == 2).all()
    assert "plotly" in (tmp_path / "compressed/small/compress.html").read_text()
    code, out, err = call(
        "compress", "small", "--weights", "rtn:bits=8", "--task", "text", "--lengths", "64", "--prompts", "2", "--json"
    )
    assert code == 0, err
    rows = json.loads(out)
    assert {(row["weights"], row["kind"]) for row in rows} == {(None, "policy"), ("rtn:bits=8", "weights")}
    assert {"weight_bytes", "state_bytes", "total_bytes"} <= {row["metric"] for row in rows}
    for wrong, message in (
        ("compress small", "expected --policy NAME, such as snapkv, or --weights METHOD"),
        ("compress small --weights gptq", "gptq: needs data to calibrate on"),
        ("compress small --policy quantize --data text", "--data: is what --weights METHOD is calibrated on"),
        ("compress linear --policy h2o --budget 20%", "needs a model with a KV state"),
        ("compress small --policy h2o --budget 0%", "budget: 0% keeps nothing"),
        ("compress small --policy h2o --budget 20% --compare small", "two models have the same name"),
        ("compress small --weights rtn --budget 20%", "--budget: is what a --policy keeps; give one"),
        ("compress small --policy quantize --budget 20%", "--budget: quantize takes none; leave it out"),
        ("compress small --policy h2o --budget 20% --lengths x", "expected numbers of tokens"),
    ):
        code, _, err = call(*wrong.split())
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
