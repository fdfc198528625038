"""The probe of heads: it names those whose work is written down, and none in a model that learned nothing."""

from __future__ import annotations

from contextlab import build_model, build_task
from contextlab.inspect import look
from contextlab.models import preset


def test_the_induction_heads_are_named():
    task = build_task("induction_head", length=64)
    model = build_model("induction_construction", vocabulary=task.input_size, length=task.length)
    words = look(model, task, ["heads:prompts=16"]).words
    assert any(line.startswith("Heads that look at the token before: 0.0 (") for line in words)
    assert any(line.startswith("Heads that copy what they look at: 1.0 (1.00)") for line in words)
    assert not any("symbol earlier" in line for line in words)


def test_fresh_weights_have_no_heads_to_name():
    task = build_task("induction_head", length=32)
    found = look(
        build_model(preset("transformer", width=16, depth=2, heads=2).for_task(task)), task, ["heads:prompts=16"]
    )
    assert found.words[0].startswith("No head has learned to look mostly one way; what has grown most is the share for")


def test_vectors_are_looked_at_too():
    task = build_task("linear_regression", dimensions=2, examples=6)
    found = look(build_model(preset("mamba2", width=16, depth=1, heads=2).for_task(task)), task, ["heads:prompts=4"])
    assert set(found.table["what"]) == {"previous", "same", "first"}
