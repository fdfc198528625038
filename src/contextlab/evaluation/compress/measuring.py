"""`compress`: what is lost, in quality, when a policy keeps a part of a model's context, and what is won."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from contextlab.errors import InputError
from contextlab.evaluation.compress.prompts import DECODED, AnyModel, Drawn, build_prompts, columns, draw
from contextlab.evaluation.compress.reading import evaluating, read
from contextlab.evaluation.compress.rows import Trials
from contextlab.evaluation.compress.settings import (
    FULL,
    WEIGHTS,
    Policies,
    Refusals,
    Setting,
    check_budget,
    check_model,
    settings_of,
    trained,
)  # fmt: skip
from contextlab.evaluation.results import COMPRESS_COLUMNS, table
from contextlab.prompt import Task

MOST_LOGITS = 2**28
"""Logits of one batch of prompts: 1 GB in float32."""


def compress(
    model: AnyModel,
    policies: Policies,
    budgets: Sequence[str],
    tasks: Sequence[str] = ("needle", "text"),
    lengths: Sequence[int] = (512,),
    *,
    prompts: int = 32,
    batch: int = 16,
    seed: int = 0,
    name: str = "model",
    tokenizer: Any = None,
    compare: Mapping[str, AnyModel] | None = None,
    decoded: int = DECODED,
    fit: int = 0,
    left_out: list[str] | None = None,
    progress: Callable[[str], None] | None = None,
    weights: Mapping[str, AnyModel] | None = None,
    sequences: int = 1,
) -> pd.DataFrame:
    """Measure a model under each policy and budget, and without one, on the same prompts.

    Each prompt is read up to its question at once, then the question at once, then the answer token by token: a policy
    that keeps what the question asks for must do so before it is asked. Of text the last quarter is read token by
    token, of recall what follows the pairs, `decoded` tokens at most. Only that counts. All settings take turns on each
    batch of prompts, in one process, so that their times can be compared. What a policy must read first
    (`Policy.prepare`), it reads within the time of prefill: kvzip the prompt up to its question, the oracle all that
    will be read.

    policies: as `policies.parse_policy` reads them, or made; a mapping gives them names. One that was made with a
        budget is measured at that, all rows of a batch together where it is in bytes.
    budgets: as `policies.Budget.of` reads them, of each policy that takes one; bytes are those of one sequence.
    tasks: names of tasks on tokens that have a length, "text" and "mqar" among them, and options: "needle:depth=0.5".
    lengths: tokens of the prompts, about.
    prompts: for each task and length. batch: prompts at once; their times are one repeat.
    tokenizer: of tasks on text; None for bytes. compare: other models that read the same prompts without a policy.
    decoded: tokens of text, and of recall, that are read one by one, at most.
    fit: steps by which policies that must be trained are, on 256 prompts of each task's training part and length; 0
        refuses those that are not trained.
    left_out: where given, what a policy, budget or task does not allow is told there, a line each, and left out.
    progress: told what is measured next.
    weights: the model with its weights made smaller, by name: each is measured like the model itself, with the full
        cache and with every policy and budget. sequences: that are held at once, in the total of bytes.

    Returns a tidy table: `run` is the model's name, `model` the policy as it was written, `split` the budget
    ("full" without a policy, "own" where a policy takes none), `kind` "policy", "weights" of a form of the
    weights, which column `weights` names, or "model" of those compared.
    Beside the columns of `results.COLUMNS` there are `chance`, what a guess among all tokens gets where the task knows
    none; `tokenizer`, by which text was read; and `prompts` and `values`, the quality of each prompt, by which
    policies are compared.
    Metrics: those of the task; kl (of the full cache's predictions to these, nats); perplexity (of text);
    state_bytes (of one sequence, the larger of those after the prompt's first part and at the end); weight_bytes;
    total_bytes (of the weights and of the states of so many sequences as column `sequences` tells); read_bytes (of
    keys and values, by the last token, where a policy chooses what is read); peak_bytes (taken beyond what the
    process held before); prefill_ and decode_tokens_per_second; prefill_ratio and decode_ratio (times as fast as
    the full cache on the same batch); overhead (of prefill, a part of its time without a policy). Of qualities the
    interval is a normal 95% one over prompts, of times and bytes `value` is the median and the interval goes from
    the least to the most.

    Raises InputError before anything is measured where a policy, a budget or a task does not fit the model.
    """
    if not (policies or weights) or not tasks or not lengths:
        raise InputError("compress: expected at least one policy or form of the weights, one task and one length")
    if sequences < 1:
        raise InputError(f"sequences: expected at least 1, got {sequences}")
    if prompts < 2:
        raise InputError(f"prompts: expected at least 2, got {prompts}")
    if decoded < 1:
        raise InputError(f"decoded: expected at least 1 token, got {decoded}")
    refusals = Refusals(left_out)
    every = [Setting(FULL, FULL, model), *settings_of(model, policies, budgets, fit, refusals)]
    for form, made in (weights or {}).items():
        every += [Setting(FULL, FULL, made, WEIGHTS, weights=form)]
        every += settings_of(made, policies, budgets, fit, refusals, form)
    every += [Setting(label, FULL, other, "model") for label, other in (compare or {}).items()]
    return measure(
        every, tasks, lengths, prompts=prompts, batch=batch, seed=seed, name=name, tokenizer=tokenizer,
        decoded=decoded, fit=fit, refusals=refusals, progress=progress, sequences=sequences,
    )  # fmt: skip


def measure(
    every: Sequence[Setting],
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    prompts: int = 32,
    batch: int = 16,
    seed: int = 0,
    name: str = "model",
    tokenizer: Any = None,
    decoded: int = DECODED,
    fit: int = 0,
    refusals: Refusals | None = None,
    progress: Callable[[str], None] | None = None,
    sequences: int = 1,
) -> pd.DataFrame:
    """Measure these settings, the first of which is the model itself, without a policy. The rest as for `compress`."""
    tell = progress or (lambda text: None)
    refusals = refusals or Refusals(None)
    model = every[0].model
    built = {(text, n): build_prompts(text, n, model, tokenizer) for text in tasks for n in lengths}
    for setting in every:
        check_model(setting, built)
    device = next(model.parameters()).device
    chosen: dict[tuple[str, int], list[Setting]] = {}
    with torch.no_grad(), evaluating({id(s.model): s.model for s in every}.values()):
        for (text, n), task in built.items():  # tried on one short prompt; this loads kernels, too
            tell(f"trying all settings on {text} at {n} tokens")
            settings = every
            if fit:
                learnt = build_prompts(text, n, model, tokenizer, part="train")
                settings = trained(every, learnt, fit, seed, device, tell, decoded)
            drawn = draw(task, 1, seed, device, decoded)
            tried = Drawn(columns(drawn.prompt, slice(drawn.question + 1)), drawn.question)
            read(settings[0], tried)
            chosen[text, n] = list(settings[:1])
            for setting in settings[1:]:
                with refusals.of(f"{setting.label} at {setting.budget}{setting.where}, {text} at {n} tokens"):
                    check_budget(setting, tried.question + 1, read(setting, tried))
                    chosen[text, n].append(setting)
        found = _measured(built, chosen, prompts, batch, decoded, seed, name, device, sequences, tell)
        texts = [text for (text, _), task in built.items() if hasattr(task, "tokenizer")]
        return found.assign(tokenizer=found["tokenizer"].mask(found["task"].isin(texts), tokenizer_name(tokenizer)))


def _measured(
    built: Mapping[tuple[str, int], Task],
    chosen: Mapping[tuple[str, int], list[Setting]],
    prompts: int,
    batch: int,
    decoded: int,
    seed: int,
    name: str,
    device: torch.device,
    sequences: int,
    tell: Callable[[str], None],
) -> pd.DataFrame:
    """See `compress`: the settings of each task and length take turns on batches of its prompts."""
    rows: list[dict[str, Any]] = []
    for (text, n), task in built.items():
        settings = chosen[text, n]
        trials: list[Trials] = [Trials() for _ in settings]
        model = settings[0].model
        each = min(batch, prompts, max(1, MOST_LOGITS // (n * (model.spec.output_size or 1))))
        for start in range(0, prompts, each):
            drawn = draw(task, min(each, prompts - start), 1_000_003 * seed + start, device, decoded)
            full = read(settings[0], drawn)
            trials[0].add(full, full, task, drawn)
            others = list(range(1, len(settings)))
            turn = start // each % max(1, len(others))
            for i in others[turn:] + others[:turn]:
                own = settings[i]
                tell(f"{text} at {n} tokens: {own.label}, {own.budget}{own.where}, prompt {start + 1}")
                trials[i].add(read(own, drawn), full, task, drawn)
        for setting, found in zip(settings, trials, strict=True):
            who = {"run": name, "model": setting.label, "kind": setting.kind, "split": setting.budget}
            at = {"seed": seed, "task": text, "length": n, "prompts": f"seed {seed}"}
            at |= {"weights": setting.weights} if setting.weights else {}
            rows += [{**who, **at, **row} for row in found.rows(setting, text, _chance(task, setting), sequences)]
    return table(rows, COMPRESS_COLUMNS)


def _chance(task: Task, setting: Setting) -> dict[str, float]:
    """What a predictor gets that has learned nothing: as the task knows it, else that of a guess among all tokens."""
    tokens = setting.model.spec.output_size or task.output_size
    return {"accuracy": 1 / tokens, "cross_entropy": math.log(tokens), **task.chance()}


def tokenizer_name(tokenizer: Any) -> str:
    """How the tokenizer of a text is told: bytes, a folder or hub name, or its class."""
    if tokenizer is None:
        return "bytes"
    named = tokenizer if isinstance(tokenizer, str) else getattr(tokenizer, "name_or_path", "")
    return str(named or type(tokenizer).__name__)
