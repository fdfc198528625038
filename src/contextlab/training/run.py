"""A training in progress: what is recorded of it, where it is kept, what came of it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.training import checkpoint
from contextlab.training.distributed import Workers
from contextlab.training.step import Step, TrainState
from contextlab.training.until import Look, Until

Stopped = Literal["", "solved", "hopeless"]
"""Why a training ended before its last step; "" where it did not."""


@dataclass
class TrainResult:
    """What came of a training.

    history: a row every `log_every` steps: step, loss and gradient_norm (means over the steps since the last
        row), learning_rate, tokens (read since the start, by all processes), seconds (since the start; of trainings
        that go together its share).
    status: "finished", "paused" where it was to pause before its end, or "diverged" when a loss or gradient was not
        finite; the model then holds the last parameters that came from finite gradients.
    step: the last step, counted from 1; of a diverged training the step that failed.
    seconds: that this call took.
    steps_per_second: of this call.
    message: one line about a diverged training, one that was stopped, or one that was resumed with another number of
        threads.
    checkpoint: folder of the last checkpoint.
    looks: at the validation prompts, where the training has a goal (`TrainSpec.until`).
    threads: of the last step on CPU.
    stopped: why it ended before its last step: "solved" or "hopeless"; "" where it did not.
    """

    history: pd.DataFrame
    status: Literal["finished", "paused", "diverged"]
    step: int
    seconds: float
    steps_per_second: float
    message: str = ""
    checkpoint: Path | None = None
    threads: int = 1
    looks: list[Look] = field(default_factory=list)
    stopped: Stopped = ""

    def _repr_html_(self) -> str:
        """In a notebook: how it ended, and the last rows of its history."""
        how = f"{self.status} after {self.step:,} steps in {self.seconds:.3g} s. {self.message}"
        return f"<div>{escape(how)}{self.history.tail(5).to_html(index=False, border=0)}</div>"


@dataclass
class Run:
    """A training in progress: its state, what was recorded of it, and where it is kept."""

    model: Any
    state: TrainState
    team: Workers
    identity: dict[str, Any]
    folder: Path | None
    rows: list[dict[str, float]] = field(default_factory=list)
    pending: list[list[float]] = field(default_factory=list)  # [loss, norm] of the steps since the last row
    fresh: list[Tensor] = field(default_factory=list)  # the same, not yet waited for
    tokens: int = 0
    status: str = ""
    until: Until | None = None
    looks: list[Look] = field(default_factory=list)
    stopped: Stopped = ""  # why, where it ended before its last step
    stopped_words: str = ""  # the same in a line
    earlier: float = 0.0
    threads: list[int] = field(default_factory=lambda: [torch.get_num_threads()])  # of its steps, in order
    first_step: int = 0
    began: float = field(default_factory=time.perf_counter)
    share: int = 1  # trainings that go together as one program, which share its time
    counted: float = field(default_factory=time.perf_counter)  # up to then the time is in `earlier`
    path: Path | None = None
    keep_all: bool = False  # checkpoints, not the last two alone

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def used(self) -> float:
        """Seconds since the start of the training, of all calls; its share of those that went together."""
        return self.earlier + (time.perf_counter() - self.counted) / self.share

    def shared_by(self, trainings: int) -> None:
        """From now on so many trainings share the time."""
        self.earlier, self.counted, self.share = self.used, time.perf_counter(), trainings

    def add(self, step: Step) -> None:
        self.fresh.append(torch.stack([step.loss, step.gradient_norm]))
        self.tokens += step.tokens * self.team.count

    def settle(self) -> None:
        """Wait for the steps' numbers; a first one that is not finite ends the training."""
        if self.fresh:
            known = len(self.pending)
            self.pending += self.team.mean(torch.stack(self.fresh)).tolist()
            bad = [i for i, pair in enumerate(self.pending[known:], known) if not math.isfinite(sum(pair))]
            if bad:
                self.status = "diverged"
                self.state.step -= len(self.pending) - 1 - bad[0]
                self.pending = self.pending[: bad[0] + 1]
            self.fresh = []

    def look(self) -> None:
        """Look whether the model is good enough or hopeless, where that is due; the steps are settled."""
        step = self.state.step
        if self.until is not None and self.until.due(step) and not self.status:
            with self.state.in_use():
                found = self.until.look(step)
            self.looks.append(found)
            if step == self.until.steps:
                return
            before = self.looks[-2] if len(self.looks) > 1 else None
            if self.team.any(self.until.reached(found)):
                self.stopped, self.stopped_words = "solved", self.until.words(found)
            elif self.team.any(self.until.hopeless(found, before)):
                assert before is not None
                self.stopped, self.stopped_words = "hopeless", self.until.hopeless_words(found, before)

    def record(self, learning_rate: float) -> dict[str, float]:
        """Add the row of this step."""
        loss, norm = (sum(values) / len(self.pending) for values in zip(*self.pending, strict=True))
        row = {
            "step": self.state.step,
            "loss": loss,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "tokens": self.tokens,
            "seconds": self.used,
        }
        self.rows.append(row)
        self.pending = []
        return row

    def open(self, resume: bool) -> None:
        """Prepare the folder, and go on from its newest checkpoint when asked to."""
        if self.folder is None:
            if resume:
                raise InputError("resume needs the folder that the training wrote; give folder=...")
            return
        if self.team.first:
            checkpoint.prepare(self.folder)
        self.team.wait()
        self.path = checkpoint.newest(self.folder)
        if self.path is None:
            return
        if not resume:
            raise InputError(f"{self.folder}: holds {self.path.name} already; resume it or choose another folder")
        adapters = {} if self.state.adapters is None else self.state.adapters.tensors()
        expected = {**self.state.optimizer, **self._streams([]), **adapters}
        with self.state.plain():
            found = checkpoint.read(self.path, self.model, self.identity, expected)
        for name, tensor in self.state.optimizer.items():
            tensor.copy_(found.tensors[name])
        try:
            self.state.unpack(found.tensors, found.record.get("optimizer"))
        except InputError as error:
            raise InputError(f"{self.path}: {error}; {checkpoint.remedy(self.path)}") from None
        self.state.generator.set_state(found.tensors[f"generator.{self.team.rank}"])
        self.state.step = self.first_step = found.record["step"]
        self.rows, self.pending = found.record["history"], found.record["pending"]
        self.tokens, self.status = found.record["tokens"], found.record["status"]
        self.earlier = found.record["seconds"]
        self.looks, self.stopped_words = found.record.get("looks", []), found.record.get("stopped", "")
        self.stopped = stopped_of(found.record)
        self._note_threads(found.record)

    def _note_threads(self, record: Mapping[str, Any]) -> None:
        """Say so where the steps before were made with another number of threads: sums are then rounded otherwise."""
        used = [*record.get("earlier_threads", ()), record.get("threads")]
        self.threads = [count for count in used if isinstance(count, int)]
        now = torch.get_num_threads()
        if not self.threads or (now != self.threads[-1] and not self.status):
            self.threads.append(now)
            if self.threads_message:
                warnings.warn(f"{self.path}: {self.threads_message}", stacklevel=4)

    @property
    def threads_message(self) -> str:
        """One line about a training that was made with several numbers of threads."""
        if len(self.threads) < 2:
            return ""
        return (
            f"trained with {', then with '.join(map(str, self.threads))} threads: last digits may differ from those of "
            "a training that was never stopped"
        )

    def save(self) -> None:
        """Write a checkpoint, by the first process."""
        if self.folder is None:
            return
        streams = self._streams(self.team.gather(self.state.generator.get_state()))
        if self.team.first:
            tensors, plain = self.state.pack()
            record = {
                "step": self.state.step,
                "status": self.status,
                "is": self.identity,
                "seconds": self.used,
                "tokens": self.tokens,
                "versions": {"torch": torch.__version__},
                "threads": self.threads[-1],
                "earlier_threads": self.threads[:-1],
                "pending": self.pending,
                "history": self.rows,
                "looks": self.looks,
                "stopped": self.stopped_words,
                "stopped_as": self.stopped,
                **({} if plain is None else {"optimizer": plain}),
            }
            with self.state.in_use():
                own = {**self.state.optimizer, **streams, **tensors}
                self.path = checkpoint.write(self.folder, self.model, own, record, self.state.write, self.keep_all)
        self.team.wait()

    def _streams(self, states: list[Tensor]) -> dict[str, Tensor]:
        own = self.state.generator.get_state()
        return {f"generator.{rank}": each for rank, each in enumerate(states or [own] * self.team.count)}

    def result(self) -> TrainResult:
        seconds, done = self.seconds, self.state.step - self.first_step
        message = "; ".join(each for each in (self.stopped_words, self.threads_message) if each)
        if self.status == "diverged":
            message = (
                f"the loss or its gradient was not finite at step {self.state.step}; the parameters are of "
                "the step before; try a smaller learning_rate or matrix_learning_rate, or a longer warmup"
            )
        history = pd.DataFrame(
            self.rows, columns=["step", "loss", "learning_rate", "gradient_norm", "tokens", "seconds"]
        )
        status: Literal["finished", "paused", "diverged"] = "finished" if self.status else "paused"
        if self.status == "diverged":
            status = "diverged"
        return TrainResult(
            history, status, self.state.step, seconds, done / seconds, message, self.path, self.threads[-1], self.looks,
            self.stopped,
        )  # fmt: skip


def stopped_of(record: Mapping[str, Any]) -> Stopped:
    """Why the training of a checkpoint's record was stopped. Those of older versions stopped only what was solved."""
    found: Stopped = record.get("stopped_as", "solved" if record.get("stopped") else "")
    return found
