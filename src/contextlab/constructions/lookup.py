"""Two blocks of softmax attention that look up what followed the same tokens before: the induction head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pydantic import PositiveInt

from contextlab.constructions.base import Construction, Stream, construction, put, require_tokens, weight_of
from contextlab.errors import InputError
from contextlab.learners import Induction, Learner
from contextlab.learners.answers import SMOOTHING
from contextlab.models import Model
from contextlab.prompt import Task

APART = 40.0
"""Between the scores of what is meant and of what comes next: other weights are below e^-40, 4e-18."""


def certainty(vocabulary: int) -> float:
    """The logit of an answer, over the others' 0, at which it has the probability that sure learners give it."""
    return math.log((1 - SMOOTHING) * (vocabulary - 1) / SMOOTHING)


def put_places(model: Model, stream: Stream) -> None:
    """Learned positions that tell each token one, its place and the place's square."""
    places = weight_of(model.positions)
    count = places.new_tensor(range(len(places)))[:, None]
    places[:, stream["one"]], places[:, stream["place"]], places[:, stream["square"]] = 1.0, count, count**2


def put_head_of_place(into: Any, query: slice, key: slice, stream: Stream, back: int, scale: float) -> None:
    """A head that attends to the token `back` places before: scores -APART (j - place + back)^2, up to j's constant.

    into: the projection's weight [outputs, width]. query, key: its rows of the head, two of each. scale: that the mixer
    divides scores by.
    """
    first, second = query.start, query.start + 1
    put(into, slice(first, first + 1), stream["one"], -APART * scale)
    put(into, slice(second, second + 1), stream["place"], 2 * APART * scale)
    put(into, slice(second, second + 1), stream["one"], -2 * APART * scale * back)
    put(into, slice(key.start, key.start + 1), stream["square"])
    put(into, slice(key.start + 1, key.start + 2), stream["place"])


@construction(
    "induction_construction",
    papers=("2209.11895", "2402.01032", "2508.07208"),
    cases=({"vocabulary": 8, "length": 32}, {"vocabulary": 5, "size": 3, "length": 24}),
)
@dataclass(frozen=True)
class InductionConstruction(Construction):
    """Two blocks of softmax attention: the token that followed the last occurrence of the last `size` tokens.

    The first block's heads copy the tokens 1, ..., size places before; the second's compares the query's last tokens
    with those before each key, and copies the key's token (the induction head, 2209.11895; with more tokens the n-gram
    look-up of 2402.01032). Of several occurrences the last one wins, by a score that grows with the place. Where none
    is, all tokens are equally likely: the second head then attends to the first token, which the first block's MLP
    (squared ReLUs) has cleared, with all that the heads copied where there was nothing to copy.

    It equals the learner induction, at every prefix. It reads tokens, and predicts the next at each.

    vocabulary: number of tokens.
    size: tokens that must be the same.
    length: tokens of the longest prompt.
    """

    vocabulary: PositiveInt = 16
    size: PositiveInt = 1
    length: PositiveInt = 256

    def __post_init__(self) -> None:
        if self.vocabulary < 2:
            raise InputError("vocabulary 1 leaves nothing to predict; use 2 or more")

    def stream(self) -> Stream:
        """The parts of a token's vector; `early` tells whether it has fewer than 1, ..., size tokens before it."""
        copied = {f"before_{back}": self.vocabulary for back in range(1, self.size + 1)}
        return Stream(token=self.vocabulary, **copied, found=self.vocabulary, one=1, place=1, square=1, early=self.size)

    def fields(self) -> dict[str, Any]:
        width, cleared = self.stream().width, (self.size + 1) * self.vocabulary
        copying = {"heads": self.size, "head_dim": self.vocabulary, "position": "none"}
        finding = {"heads": 1, "head_dim": self.size * self.vocabulary + 1, "position": "none"}
        return {
            "width": width,
            "depth": 2,
            "heads": 1,
            "layers": [
                {
                    "mixer": "attention",
                    "options": copying,
                    "mlp": {"kind": "relu2", "options": {"ratio": cleared / width}},
                },
                {"mixer": "attention", "options": finding},
            ],
            "mlp": "none",
            "norm": "none",
            "position": "learned",
            "max_length": self.length,
            "read_in": "token",
            "input_size": self.vocabulary,
            "output_size": self.vocabulary,
            "read_out_bias": False,
        }

    def write(self, model: Model) -> None:
        v, at, copying, finding = self.vocabulary, self.stream(), model.blocks[0], model.blocks[1]
        put(weight_of(model.read_in), slice(0, v), at["token"])
        put_places(model, at)
        for back in range(1, self.size + 1):
            weight_of(model.positions)[:back, at["early"].start + back - 1] = 1.0
        put(weight_of(model.read_out), slice(0, v), at["found"], certainty(v))
        self._copy(copying.mixer)
        self._clear(copying.mlp)
        self._find(finding.mixer)

    def _copy(self, mixer: Any) -> None:
        v, at, n = self.vocabulary, self.stream(), self.size
        into, out = weight_of(mixer.qkv_proj), weight_of(mixer.out_proj)
        for head in range(n):
            query, key, value = (slice((part * n + head) * v, (part * n + head + 1) * v) for part in range(3))
            put_head_of_place(into, query, key, at, head + 1, v**0.5)
            put(into, value, at["token"])
            put(out, at[f"before_{head + 1}"], slice(head * v, (head + 1) * v))

    def _clear(self, mlp: Any) -> None:
        """Take away what stands where there is nothing: relu(z + early - 1)^2 is z where it is early, 0 elsewhere."""
        v, at = self.vocabulary, self.stream()
        for number, (part, early) in enumerate((("token", 0), *((f"before_{b + 1}", b) for b in range(self.size)))):
            rows = slice(number * v, (number + 1) * v)
            put(weight_of(mlp.up), rows, at[part])
            weight_of(mlp.up)[rows, at["early"].start + early] = 1.0
            weight_of(mlp.up)[rows, at["one"]] = -1.0
            put(weight_of(mlp.out_proj), at[part], rows, -1.0)

    def _find(self, mixer: Any) -> None:
        v, at, n = self.vocabulary, self.stream(), self.size
        into, size = weight_of(mixer.qkv_proj), n * v + 1
        root = size**0.5  # the mixer divides scores by it
        last = APART * self.length  # above all that places add
        match = last + 2 * APART  # what each token that is the same adds
        for back in range(n):
            rows = slice(back * v, (back + 1) * v)
            put(into, rows, at["token" if back == 0 else f"before_{back}"], match * root)
            put(into, slice(size + rows.start, size + rows.stop), at[f"before_{back + 1}"])
        put(into, slice(size - 1, size), at["one"], root)
        key = slice(2 * size - 1, 2 * size)
        put(into, key, at["place"], APART)
        first = slice(at["early"].start, at["early"].start + 1)
        put(into, key, first, (n - 1) * match + last + APART)  # the first token: above n - 1 tokens, below n
        put(into, slice(2 * size, 2 * size + v), at["token"])
        put(weight_of(mixer.out_proj), at["found"], slice(0, v))

    def learner(self) -> Learner:
        return Induction(self.vocabulary, self.size)

    def check_task(self, task: Task) -> None:
        require_tokens(self.name, task, self.vocabulary)
        tokens = getattr(task, "length", None)
        if isinstance(tokens, int) and tokens > self.length:
            raise InputError(
                f"{self.name} reads at most {self.length} tokens, the task has {tokens}; give length: {tokens}"
            )
