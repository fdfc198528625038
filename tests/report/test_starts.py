"""What models started from, as the report tells it."""

from __future__ import annotations

from contextlab.report.starts import starts_table


def _start(source, told, before=None):
    return {"from": source, "told": told, **({"before": before} if before else {})}


def _taught(told, teacher):
    return {"teacher": teacher, "told": f"{told} of {teacher}"}


def test_the_way_of_a_model_is_told_from_the_first_step_of_the_first_seed():
    first = {
        "start": _start("runs/x/base:softmax", ["carried over: 2 of 3 tensors", "new: a"]),
        "distill": _taught("attention", "runs/x/base:softmax"),
    }
    records = [
        {"task": "recall", "model": "fresh", "seed": 0},
        *(
            {
                "task": "recall", "model": "delta", "seed": seed,
                "start": _start("runs/x/swap:delta", ["carried over: all"], first),
                "distill": _taught("logits", "runs/x/base:softmax"),
            }
            for seed in (0, 1)
        ),
        {"task": "recall", "model": "pupil", "seed": 0, "distill": _taught("logits", "org/name")},
    ]  # fmt: skip
    assert starts_table(records) == [
        {
            "task": "recall", "model": "delta", "from": "base:softmax",
            "what became of it": "carried over: 2 of 3 tensors; new: a", "learned from": "attention of base:softmax",
        },
        {
            "task": "recall", "model": "delta", "from": "swap:delta",
            "what became of it": "carried over: all", "learned from": "logits of base:softmax",
        },
        {
            "task": "recall", "model": "pupil", "from": "fresh",
            "what became of it": "", "learned from": "logits of name",
        },
    ]  # fmt: skip
    assert starts_table(records[:1]) == []
    named = starts_table([{**each, "run": "x"} for each in records], several_runs=True)
    assert [row["run"] for row in named] == ["x"] * 3
