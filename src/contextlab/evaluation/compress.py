"""`compress`: what is lost, in quality, when a policy keeps a part of a model's context, and what is won."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab import registry
from contextlab.errors import InputError, unknown
from contextlab.evaluation.cost import PeakMemory
from contextlab.evaluation.evaluate import Z95
from contextlab.evaluation.results import table
from contextlab.models import HuggingFaceModel, Model
from contextlab.ops.kv import KVLayer
from contextlab.policies import Budget, Locret, Policy, parse_options, parse_policy, takes_budget
from contextlab.policies.eviction.two_pass import ForesightPolicy
from contextlab.policies.reading.selective import ReadState
from contextlab.prompt import Prompt, Task
from contextlab.state import KVState, State, tensor_bytes
from contextlab.tasks import build_task

FULL, OWN = "full", "own"
"""Budgets in the table: of the cache without a policy, and of policies that take none."""
ALIASES = {"text": "language_modelling", "mqar": "associative_recall"}
SIZED = {"kv_retrieval": "pairs", "dictionary_retrieval": "dictionaries"}
"""Tasks whose length follows from another option."""
DECODED = 128
"""Tokens that are read one by one, at most, where no question says where to begin: it takes long."""
MOST_FITTED = 256
"""Prompts on which a policy is trained."""
MOST_LOGITS = 2**28
"""Logits of one batch of prompts: 1 GB in float32."""
AnyModel = Model | HuggingFaceModel


@dataclass(frozen=True)
class Setting:
    """One way to keep the context.

    label: the policy as it was written, or a model's name. budget: as it was written, or FULL, or OWN.
    weights: folder of what was trained of the policy, where `label` does not name one.
    """

    label: str
    budget: str
    model: AnyModel
    kind: str = "policy"
    weights: Path | None = None

    def policy(self, rows: int) -> Policy | None:
        """The policy for so many sequences at once; a budget in bytes is one sequence's."""
        if self.budget == FULL:
            return None
        text = self.label
        if self.weights is not None:
            first, bar, store = text.partition("|")
            text = f"{first}{',' if ':' in first else ':'}weights={self.weights}{bar}{store}"
        if self.budget == OWN:
            return parse_policy(text)
        budget = Budget.of(self.budget)
        return parse_policy(
            text, dataclasses.replace(budget, amount=budget.amount * rows) if budget.kind == "bytes" else budget
        )

    def layers(self) -> list[KVLayer]:
        """The layers that the policy serves; none without one. Raises InputError when it cannot serve the model."""
        policy = self.policy(1)
        if policy is None:
            return []
        if isinstance(policy, ForesightPolicy):  # it serves what it has seen; any text will do
            device = next(self.model.parameters()).device
            policy.watch(self.model, torch.zeros(1, 2, dtype=torch.int64, device=device))
        return policy.layers(self.model)


def compress(
    model: AnyModel,
    policies: Sequence[str],
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
) -> pd.DataFrame:
    """Measure a model under each policy and budget, and without one, on the same prompts.

    Each prompt is read up to its question at once, then the question at once, then the answer token by token: a policy
    that keeps what the question asks for must do so before it is asked. Of text the last quarter is read token by
    token, of recall what follows the pairs, `decoded` tokens at most. Only that counts. All settings take turns on each
    batch of prompts, in one process, so that their times can be compared. What a policy must `watch` first, it watches
    within the time of prefill: kvzip the prompt up to its question, the oracle all that will be read.

    policies: as `policies.parse_policy` reads them. budgets: as `policies.Budget.of` reads them; bytes are those of one
        sequence.
    tasks: names of tasks on tokens that have a length, "text" and "mqar" among them, and options: "needle:depth=0.5".
    lengths: tokens of the prompts, about.
    prompts: for each task and length. batch: prompts at once; their times are one repeat.
    tokenizer: of tasks on text; None for bytes. compare: other models that read the same prompts without a policy.
    decoded: tokens of text, and of recall, that are read one by one, at most.
    fit: steps by which policies that must be trained are, on 256 prompts of each task's training part and length; 0
        refuses those that are not trained.
    left_out: where given, what a policy, budget or task does not allow is told there, a line each, and left out.
    progress: told what is measured next.

    Returns a tidy table: `run` is the model's name, `model` the policy as it was written, `split` the budget
    ("full" without a policy, "own" where a policy takes none), `kind` "policy", or "model" of those compared.
    Metrics: those of the task; kl (of the full cache's predictions to these, nats); perplexity (of text);
    state_bytes (of one sequence, the larger of those after the prompt's first part and at the end); read_bytes (of
    keys and values, by the last token, where a policy chooses what is read); peak_bytes (taken beyond what the
    process held before); prefill_ and decode_tokens_per_second; prefill_ratio and decode_ratio (times as fast as
    the full cache on the same batch); overhead (of prefill, a part of its time without a policy). Of qualities the
    interval is a normal 95% one over prompts, of times and bytes `value` is the median and the interval goes from
    the least to the most.

    Raises InputError before anything is measured where a policy, a budget or a task does not fit the model.
    """
    if not policies or not tasks or not lengths:
        raise InputError("compress: expected at least one policy, one task and one length")
    if prompts < 2:
        raise InputError(f"prompts: expected at least 2, got {prompts}")
    if decoded < 1:
        raise InputError(f"decoded: expected at least 1 token, got {decoded}")
    tell = progress or (lambda text: None)
    refusals = _Refusals(left_out)
    with tempfile.TemporaryDirectory() as folder:
        every = [
            Setting(FULL, FULL, model),
            *_settings(model, policies, budgets, fit, refusals),
            *(Setting(label, FULL, other, "model") for label, other in (compare or {}).items()),
        ]
        built = {(text, n): build_prompts(text, n, model, tokenizer) for text in tasks for n in lengths}
        for setting in every:
            _check_model(setting, built)
        device = next(model.parameters()).device
        chosen: dict[tuple[str, int], list[Setting]] = {}
        with torch.no_grad(), _evaluating({id(s.model): s.model for s in every}.values()):
            for i, ((text, n), task) in enumerate(built.items()):  # tried on one short prompt; this loads kernels, too
                tell(f"trying all settings on {text} at {n} tokens")
                settings = every
                if fit:
                    learnt = build_prompts(text, n, model, tokenizer, part="train")
                    settings = _fitted(every, learnt, fit, decoded, seed, device, Path(folder) / str(i), tell)
                drawn = _drawn(task, 1, seed, device, decoded)
                tried = _Drawn(_columns(drawn.prompt, slice(drawn.question + 1)), drawn.question)
                full = _read(settings[0], tried)
                chosen[text, n] = settings[:1]
                for setting in settings[1:]:
                    with refusals.of(f"{setting.label} at {setting.budget}, {text} at {n} tokens"):
                        _check_budget(setting, tried.question + 1, _read(setting, tried), full)
                        chosen[text, n].append(setting)
            return _measured(built, chosen, prompts, batch, decoded, seed, name, device, tell)


def _measured(
    built: Mapping[tuple[str, int], Task],
    chosen: Mapping[tuple[str, int], list[Setting]],
    prompts: int,
    batch: int,
    decoded: int,
    seed: int,
    name: str,
    device: torch.device,
    tell: Callable[[str], None],
) -> pd.DataFrame:
    """See `compress`: the settings of each task and length take turns on batches of its prompts."""
    rows: list[dict[str, Any]] = []
    for (text, n), task in built.items():
        settings = chosen[text, n]
        trials: list[_Trials] = [_Trials() for _ in settings]
        model = settings[0].model
        each = min(batch, prompts, max(1, MOST_LOGITS // (n * (model.spec.output_size or 1))))
        for start in range(0, prompts, each):
            drawn = _drawn(task, min(each, prompts - start), 1_000_003 * seed + start, device, decoded)
            full = _read(settings[0], drawn)
            trials[0].add(full, full, task, drawn)
            others = list(range(1, len(settings)))
            turn = start // each % max(1, len(others))
            for i in others[turn:] + others[:turn]:
                tell(f"{text} at {n} tokens: {settings[i].label}, {settings[i].budget}, prompt {start + 1}")
                trials[i].add(_read(settings[i], drawn), full, task, drawn)
        for setting, found in zip(settings, trials, strict=True):
            who = {"run": name, "model": setting.label, "kind": setting.kind, "split": setting.budget}
            at = {"seed": seed, "task": text, "length": n}
            rows += [{**who, **at, **row} for row in found.rows(setting, text)]
    return table(rows)


def build_prompts(text: str, length: int, model: AnyModel, tokenizer: Any = None, part: str = "test") -> Task:
    """The task that a text such as "needle:depth=0.5" names, its prompts of about `length` tokens.

    part: of the task's documents and names, where it tells training's from those of the test. Associative recall takes
    256 symbols, or as many as the model knows, and a pair for eight tokens, unless options say otherwise.

    Raises InputError where it has no length, or the model cannot read it.
    """
    name, options = parse_options(text, "task")
    name = ALIASES.get(name, name)
    if name not in registry.names("task"):
        raise InputError(unknown("task", name, [*registry.names("task"), *ALIASES]))
    entry = registry.lookup("task", name)
    known = {each.name for each in entry.parameters}
    read_in, size = entry.factory.read_in, model.spec.input_size or 0  # type: ignore[attr-defined]
    if model.spec.read_in != "token":
        raise InputError("compress: the model reads vectors; expected one that reads tokens, such as recipe byte-lm's")
    if read_in != "token":
        raise InputError(f"task {name!r} shows vectors, and the model reads tokens; needle, kv_retrieval, mqar do")
    if "length" in options:
        raise InputError(f"task {name}: the length is given apart, as --lengths {options['length']}")
    if "part" in known:
        options.setdefault("part", part)
    if "tokenizer" in known and tokenizer is not None:
        options.setdefault("tokenizer", tokenizer)
    if name == "associative_recall":
        vocabulary = options.setdefault("vocabulary", min(256, size // 2 * 2))
        options.setdefault("pairs", max(1, min(vocabulary // 2, length // 8)))
        options.setdefault("test_pairs", [])
    if name in SIZED and SIZED[name] not in options:
        few, more = (_longest(build_task(name, **{**options, SIZED[name]: n})) for n in (2, 3))
        count = 2 + (length - few) // max(1, more - few)
        if count < 2:
            raise InputError(f"--lengths: {length} is too short for {name}, whose prompts take at least {few} tokens")
        options[SIZED[name]] = count
    elif "length" in known:
        options["length"] = length
    elif name not in SIZED:
        raise InputError(f"task {name!r} has no length to set; needle, kv_retrieval, mqar and text have")
    task = build_task(name, **options)
    if task.input_size > size:
        raise InputError(
            f"task {text!r} shows {task.input_size} token ids, and the model knows {size}; give a model trained on it"
            + (f", or mqar:vocabulary={size // 2 * 2}" if name == "associative_recall" else "")
        )
    return task


def is_text(text: str) -> bool:
    """Whether a task as it was written is language modelling."""
    name = parse_options(text, "task")[0]
    return ALIASES.get(name, name) == "language_modelling"


def _longest(task: Task) -> int:
    return task.sample(1, torch.Generator().manual_seed(0)).length


def check_settings(policies: Sequence[str], budgets: Sequence[str]) -> None:
    """Raises InputError where a policy or a budget cannot be read, or a policy takes a budget and there is none."""
    for each in budgets:
        Budget.of(each)
    for text in policies:
        parse_policy(text)
        if takes_budget(text) and not budgets:
            raise InputError(f"policy {text}: expected a budget, such as --budget 10%, 512tok or 64MB")


class _Refusals:
    """What cannot be measured: it is told in `left_out` where that is given, otherwise raised."""

    def __init__(self, left_out: list[str] | None) -> None:
        self.left_out = left_out

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            if self.left_out is None:
                raise
            self.left_out.append(f"{what}: {error}")


def _settings(
    model: AnyModel, policies: Sequence[str], budgets: Sequence[str], fit: int, refusals: _Refusals
) -> Iterator[Setting]:
    """One for each policy and budget, each tried on the model unless it is to be trained first."""
    check_settings(policies, budgets)
    for text in policies:
        for budget in budgets if takes_budget(text) else (OWN,):
            setting = Setting(text, budget, model)
            with refusals.of(f"{text} at {budget}"):
                if not _to_train(setting):
                    with _naming(setting):
                        setting.layers()
                elif not fit:
                    raise InputError(
                        f"policy {text}: it must be trained; --fit STEPS does so on prompts of each task, and "
                        "weights=FOLDER is for one that was trained with policy.fit"
                    )
                yield setting


def _to_train(setting: Setting) -> bool:
    """Whether the policy is one that must be trained and is not."""
    policy = setting.policy(1)
    return isinstance(policy, Locret) and not policy.heads


def _fitted(
    settings: Sequence[Setting],
    task: Task,
    steps: int,
    decoded: int,
    seed: int,
    device: torch.device,
    folder: Path,
    tell: Callable[[str], None],
) -> list[Setting]:
    """The settings with what must be trained of their policies trained on prompts of the task, once a policy."""
    trained: dict[str, Path] = {}
    found = []
    for setting in settings:
        if _to_train(setting):
            if setting.label not in trained:
                tell(f"training {setting.label}, {steps} steps")
                drawn, policy = _drawn(task, MOST_FITTED, seed + 1, device, decoded), setting.policy(1)
                assert isinstance(policy, Locret)
                answer = drawn.prompt.length - drawn.question
                policy.fit(setting.model, drawn.prompt.inputs, answer, steps=steps, seed=seed)
                trained[setting.label] = folder / str(len(trained))
                policy.save(trained[setting.label])
            setting = dataclasses.replace(setting, weights=trained[setting.label])
        found.append(setting)
    return found


@contextlib.contextmanager
def _naming(setting: Setting) -> Iterator[None]:
    """Errors say which policy they are about."""
    try:
        yield
    except InputError as error:
        if setting.kind == "model" or setting.budget == FULL:
            raise
        raise InputError(f"policy {setting.label}: {error}") from None


def _check_model(setting: Setting, built: Mapping[tuple[str, int], Task]) -> None:
    """Refuse a model that cannot read the prompts."""
    for (text, n), task in built.items():
        size, longest = setting.model.spec.input_size or 0, getattr(setting.model.spec, "max_length", None)
        if setting.model.spec.read_in != "token" or task.input_size > size:
            raise InputError(f"{setting.label}: cannot read task {text!r}, which shows {task.input_size} token ids")
        if longest is not None and n > longest:
            raise InputError(f"{setting.label}: reads at most {longest} tokens, and --lengths has {n}")


def _check_budget(setting: Setting, read: int, reading: _Reading, full: _Reading) -> None:
    """Refuse a part of the cache that the policy cannot keep to, for example because of what it protects.

    read: tokens that were read. reading, full: of one sequence, with the policy and without.
    """
    policy = setting.policy(1)
    budget = getattr(policy, "budget", None)
    if policy is None or budget is None or budget.kind != "ratio" or budget.everything or policy.bounds == "prefill":
        return
    ours = isinstance(setting.model, Model)
    token = [
        (each.kv_heads, each.key_dim + each.value_dim, next(setting.model.parameters()).dtype)
        for each in setting.layers()
    ]
    cache = sum(tensor_bytes(read, heads, size, dtype=dtype) for heads, size, dtype in token)
    if policy.bounds == "read":
        if reading.read_bytes > budget.amount * cache:
            least = math.ceil(1000 * reading.read_bytes / cache) / 10
            raise InputError(
                f"policy {setting.label}: budget {budget} of {read} tokens is less than what a token reads, the latest "
                f"ones and what chooses the others, {least:g}% of them here; raise the budget or take longer prompts"
            )
        return
    buffers = cache * KVState.capacity(read) / read if ours else cache
    allowed = budget.amount * cache + max(0.0, full.state_bytes - buffers)  # beside the cache: convolutions, say
    if reading.state_bytes > allowed:
        least = math.ceil(1000 * (reading.state_bytes - allowed + budget.amount * cache) / cache) / 10
        raise InputError(
            f"policy {setting.label}: budget {budget} of {read} tokens is less than what it must keep, which takes "
            f"{least:g}% of them here; raise the budget, take longer prompts, or protect fewer tokens "
            f"({setting.label.partition('|')[0].partition(':')[0]}:window=4)"
        )


@contextlib.contextmanager
def _evaluating(models: Any) -> Iterator[None]:
    """The models in evaluation mode, and as they were before afterwards."""
    before = [(model, model.training) for model in models]
    for model, _ in before:
        model.eval()
    try:
        yield
    finally:
        for model, training in before:
            model.train(training)


@dataclass(frozen=True)
class _Drawn:
    """Prompts, and the token at which their question begins (of all rows: the earliest)."""

    prompt: Prompt
    question: int

    @property
    def tail(self) -> Prompt:
        """The question and what follows it."""
        return _columns(self.prompt, slice(self.question, None))

    @property
    def answer(self) -> int:
        """The first token from which on prompts are read token by token: the earliest at which a prediction counts."""
        return self.question + int(self.tail.scored.any(0).int().argmax())


def _drawn(task: Task, count: int, seed: int, device: torch.device, decoded: int = DECODED) -> _Drawn:
    prompt = task.sample(count, torch.Generator(device).manual_seed(seed), device)
    if prompt.hidden is not None and "question" in prompt.hidden:
        question = int(prompt.hidden["question"].min())
        return _Drawn(prompt, question)
    if bool(prompt.scored.all()):
        question, last = prompt.length - min(prompt.length // 4, decoded), prompt.length
    else:
        question = int(prompt.scored.int().argmax(1).min())
        last = question + decoded
    return _Drawn(_columns(prompt, slice(last)), max(1, question))


def _columns(prompt: Prompt, cut: slice) -> Prompt:
    """A part of the tokens of prompts."""
    return Prompt(prompt.inputs[:, cut], prompt.targets[:, cut], prompt.scored[:, cut], prompt.shot[:, cut])


@dataclass
class _Reading:
    """One pass over prompts.

    logits: [B, t, V] of the question and what follows. state_bytes: of one sequence. read_bytes: what its last token
    read of the keys and values, where a policy chooses that; 0 where none does.
    """

    logits: Tensor
    prefill: float
    decode: float
    state_bytes: float
    read_bytes: float
    peak_bytes: float


def _read(setting: Setting, drawn: _Drawn) -> _Reading:
    """Read prompts up to the question, then the question, and the rest token by token."""
    model: Any = setting.model
    inputs, first, answer = drawn.prompt.inputs, drawn.question, drawn.answer
    last = inputs.shape[1]
    _release()
    watch = PeakMemory(inputs.device)
    policy = setting.policy(len(inputs))
    began = _now(inputs.device)
    if isinstance(policy, ForesightPolicy):
        with _naming(setting):
            policy.watch(model, inputs[:, : last if policy.sees_what_follows else first])
    with _naming(setting), contextlib.nullcontext() if policy is None else policy.attach(model):
        _, state = model.read(inputs[:, :first])
        middle, held, parts = _now(inputs.device), state.nbytes, []
        if answer > first:
            y, state = model.read(inputs[:, first:answer], state)
            parts.append(y)
            held = max(held, state.nbytes)
        after = _now(inputs.device)
        for t in range(answer, last):
            y, state = model.read(inputs[:, t : t + 1], state)
            parts.append(y)
        ended = _now(inputs.device)
        held = max(held, state.nbytes)
    batch = len(inputs)
    return _Reading(
        torch.cat(parts, 1),
        prefill=batch * first / (middle - began),
        decode=batch * (last - answer) / (ended - after),
        state_bytes=held / batch,
        read_bytes=sum(each.read_nbytes for each in _read_states(state)) / batch,
        peak_bytes=watch.bytes(),
    )


def _read_states(value: Any) -> Iterator[ReadState]:
    """The states within a state whose policy chooses what a token reads."""
    if isinstance(value, ReadState):
        yield value
    elif isinstance(value, State):
        for each in dataclasses.fields(value):
            yield from _read_states(getattr(value, each.name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _read_states(inner)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _release() -> None:
    """Give freed memory back to the system, so that the process' peak tells what is taken next (Linux with glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class _Trials:
    """What was measured of one setting: per prompt, and per batch."""

    quality: dict[str, list[Tensor]] = field(default_factory=dict)
    costs: dict[str, list[float]] = field(default_factory=dict)

    def add(self, reading: _Reading, full: _Reading, task: Task, drawn: _Drawn) -> None:
        tail = drawn.tail
        errors = task.errors(reading.logits, tail)
        if reading.logits.shape == full.logits.shape:
            ours, theirs = (F.log_softmax(x.float(), -1) for x in (reading.logits, full.logits))
            errors = {**errors, "kl": (theirs.exp() * (theirs - ours)).sum(-1)}
        count = tail.scored.sum(1)
        for metric, each in errors.items():
            mean = torch.where(tail.scored, each.double(), 0.0).sum(1) / count
            self.quality.setdefault(metric, []).append(mean[count > 0].cpu())
        for metric, value in {
            "state_bytes": reading.state_bytes,
            "peak_bytes": reading.peak_bytes,
            **({"read_bytes": reading.read_bytes} if reading.read_bytes else {}),
            "prefill_tokens_per_second": reading.prefill,
            "decode_tokens_per_second": reading.decode,
            "prefill_ratio": reading.prefill / full.prefill,
            "decode_ratio": reading.decode / full.decode,
            "overhead": full.prefill / reading.prefill - 1,
        }.items():
            self.costs.setdefault(metric, []).append(value)

    def rows(self, setting: Setting, text: str) -> Iterator[dict[str, Any]]:
        for metric, parts in self.quality.items():
            values = torch.cat(parts)
            mean, half = values.mean().item(), Z95 * values.std().item() / math.sqrt(len(values))
            row = {"value": mean, "ci_low": mean - half, "ci_high": mean + half}
            yield {"metric": metric, "n": len(values), **row}
            if metric == "cross_entropy" and is_text(text):
                row = {key: math.exp(min(each, 700)) for key, each in row.items()}
                yield {"metric": "perplexity", "n": len(values), **row}
        for metric, found in self.costs.items():
            if setting.kind == "model" and metric == "overhead":
                continue
            yield {
                "metric": metric,
                "value": statistics.median(found),
                "ci_low": min(found),
                "ci_high": max(found),
                "n": len(found),
            }
