"""Two blocks of softmax attention that copy a string."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import PositiveInt

from contextlab.constructions.base import Construction, Stream, construction, put, require_tokens, weight_of
from contextlab.constructions.lookup import APART, certainty, put_places
from contextlab.errors import InputError
from contextlab.learners import Copier, Learner
from contextlab.models import Model
from contextlab.prompt import Task


@construction("copy_construction", papers=("2402.01032",), cases=({"vocabulary": 5, "longest": 12},))
@dataclass(frozen=True)
class CopyConstruction(Construction):
    """Two blocks of softmax attention that copy the string before the bar, token by token, and then say its end.

    The first block's head finds the bar's place b; its MLP (a squared ReLU) makes the square of s = place - b + 1, the
    place of the next token to copy. The second's head attends to s by scores -(j - s)^2. (2402.01032 shows that
    two layers copy strings of exponential length, by n-gram look-up; this one counts places, as long as its table of
    positions is.) Before the bar, and after the end, all tokens are equally likely: there the head attends to the token
    of beginning, which says nothing.

    It equals the learner copier with ngram 0, at every prefix of the prompts of the task copy: $ string | string.

    vocabulary: number of symbols; the four marks $ | . * have ids of their own after them.
    longest: tokens of the longest string.
    """

    vocabulary: PositiveInt = 26
    longest: PositiveInt = 50

    @property
    def ids(self) -> int:
        """Symbols and marks."""
        return self.vocabulary + 4

    def stream(self) -> Stream:
        """The parts of a token's vector; `seen`: whether the bar came; `bar`: its place, 0 before."""
        return Stream(token=self.ids, found=self.ids, one=1, place=1, square=1, first=1, seen=1, bar=1, source=1)

    def fields(self) -> dict[str, Any]:
        width = self.stream().width
        return {
            "width": width,
            "depth": 2,
            "heads": 1,
            "layers": [
                {
                    "mixer": "attention",
                    "options": {"heads": 1, "head_dim": 2, "position": "none"},
                    "mlp": {"kind": "relu2", "options": {"ratio": 1 / width}},
                },
                {"mixer": "attention", "options": {"heads": 1, "head_dim": self.ids, "position": "none"}},
            ],
            "mlp": "none",
            "norm": "none",
            "position": "learned",
            "max_length": 2 * self.longest + 2,
            "read_in": "token",
            "input_size": self.ids,
            "output_size": self.ids,
            "read_out_bias": False,
        }

    def write(self, model: Model) -> None:
        at, places, ids = self.stream(), weight_of(model.positions), self.ids
        put(weight_of(model.read_in), slice(0, ids), at["token"])
        put_places(model, at)
        places[0, at["first"]] = 1.0
        put(weight_of(model.read_out), slice(0, ids), at["found"], certainty(ids))
        finding, copying = model.blocks
        self._find_bar(finding.mixer, finding.mlp, len(places))
        self._copy(copying.mixer)

    def _is_bar(self) -> int:
        return self.stream()["token"].start + self.vocabulary + 1

    def _find_bar(self, mixer: Any, mlp: Any, length: int) -> None:
        at, into, bar = self.stream(), weight_of(mixer.qkv_proj), self._is_bar()
        put(into, slice(0, 1), at["one"], 2**0.5)  # the mixer divides scores by the root
        into[2, bar] = APART * (length + 1)  # the first bar, or else the first token
        put(into, slice(2, 3), at["place"], -APART)
        into[4, bar] = 1.0
        put(into, slice(5, 6), at["place"])
        out = weight_of(mixer.out_proj)
        put(out, at["seen"], slice(0, 1))
        put(out, at["bar"], slice(1, 2))
        up = weight_of(mlp.up)
        for part, sign in (("place", 1.0), ("bar", -1.0), ("one", 1.0)):
            put(up, slice(0, 1), at[part], sign)
        put(weight_of(mlp.out_proj), at["source"], slice(0, 1))

    def _copy(self, mixer: Any) -> None:
        """Scores -2 APART (j - s)^2; of the first token -APART, between an exact hit and any miss."""
        at, into, ids = self.stream(), weight_of(mixer.qkv_proj), self.ids
        root, sharp = ids**0.5, 2 * APART
        query, key, value = (slice(part * ids, (part + 1) * ids) for part in range(3))
        ask, asked = into[query], into[key]
        for part, factor in (("place", 1.0), ("bar", -1.0), ("one", 1.0)):  # s j
            put(ask, slice(0, 1), at[part], 2 * sharp * root * factor)
        put(asked, slice(0, 1), at["place"])
        put(ask, slice(1, 2), at["source"], -sharp * root)  # s^2, which the first token alone is spared
        put(asked, slice(1, 2), at["one"])
        put(asked, slice(1, 2), at["first"], -1.0)
        put(ask, slice(2, 3), at["one"], root)
        put(asked, slice(2, 3), at["square"], -sharp)
        put(asked, slice(2, 3), at["first"], -APART)
        put(asked, slice(2, 3), at["seen"], -sharp)  # tokens behind the bar are no string
        asked[2, self._is_bar()] = sharp
        told = into[value]
        put(told, slice(0, self.vocabulary), slice(at["token"].start, at["token"].start + self.vocabulary))
        told[self.vocabulary + 2, self._is_bar()] = 1.0  # where the bar stands, the copy ends
        put(weight_of(mixer.out_proj), at["found"], slice(0, ids))

    def learner(self) -> Learner:
        return Copier(self.ids, self.vocabulary + 1, self.vocabulary + 2)

    def check_task(self, task: Task) -> None:
        longest = getattr(task, "longest", None)
        if longest is None or not hasattr(task, "ngram"):
            raise InputError(
                f"{self.name} copies strings as the task copy has them ($ string | string); name that task"
            )
        if task.ngram:
            raise InputError(f"{self.name} copies from the beginning, the task has ngram {task.ngram}; set ngram to 0")
        require_tokens(self.name, task, self.ids)
        if longest > self.longest:
            raise InputError(
                f"{self.name}: strings of up to {self.longest}, the task has {longest}; give longest: {longest}"
            )
