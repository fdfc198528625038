"""Every causal type of the installed transformers, cut down (`tiny.py`), held to what the library says of any model.

    python -m tests.soak.causal --out causal.json          # all of them, about ten minutes of one core
    python -m tests.soak.causal --only llama gpt_oss       # some, with what failed in full
    python -m tests.soak.causal --out causal.json --table  # the tables of docs/checkpoints.md, from what was kept

Each type runs in a fork of this process with one thread, and is stopped after --limit seconds. In float64 (`SINGLE`
names those that cannot), where transformers computes parts in float32, errors are relative to the largest logit:

- pieces: read in pieces of 9, 1, 1, 6 and 3 tokens, against the whole. Of types that are known to differ
  (`contextlab.models.hub_pieces`), the largest difference over other texts and pieces, too, which is not above that
  known.
- padding: a row with 5 tokens of padding on the left or on the right, and what follows it, against the row alone.
- bytes: `state_nbytes` at five lengths is what the state holds.
- select: a row picked from a state goes on as it would have.
- kept: a state goes on twice with the same answers.
- policy: h2o at 100% changes nothing, in the whole and in pieces; at few tokens it runs.
- apply: streaming_llm at 100% of a state that was read without it changes nothing; at few tokens it runs.

A type that cannot be built here is told with the reason. A column is "ok", "known" with a figure, a refusal (a line of
`InputError`), or a fault: another error, or a figure.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from contextlab.errors import InputError
from contextlab.models.hub_model import HuggingFaceModel
from contextlab.models.hub_pieces import APART
from contextlab.policies import build_policy
from tests.soak.tiny import VOCABULARY, tiny

EXACT = 2e-5
"""The largest error, of the largest logit, that rounding of float32 parts explains."""
SINGLE = ("xglm", "inkling2_text", "inkling2_loop_text")
"""Types whose code in transformers cannot run in float64."""
LENGTHS = (1, 4, 7, 13, 24)
PIECES = (9, 1, 1, 6, 3)
APARTS = ((9, 1, 1, 6, 15), (1,) * 32, (16, 16))
"""The pieces by which a known difference is measured."""
COLUMNS = ("pieces", "padding", "bytes", "select", "kept", "policy", "apply")


def model_of(kind: str) -> Any:
    """transformers' model of a type, tiny, with random parameters: no bias and no gain is trivial."""
    config = tiny(kind)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    part = next((name for name, each in config.sub_configs.items() if each is cls.config_class), None)
    torch.manual_seed(0)
    model = cls._from_config(getattr(config, part) if part else config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(torch.float32 if kind in SINGLE else torch.float64).eval()


class NotBuilt(Exception):
    """transformers makes no model of the tiny configuration here."""


class Held:
    """One type, and what was found of it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        try:
            theirs = model_of(kind)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise NotBuilt(next((line.strip() for line in lines if "rror: " in line), lines[0])) from error
        self.model = HuggingFaceModel(theirs)
        self.tokens = torch.randint(3, VOCABULARY - 16, (2, 24), generator=torch.Generator().manual_seed(0))
        self.exact = 2e-4 if kind in SINGLE else EXACT
        self.whole = self.model(self.tokens[:, :20])
        self.read, self.state = self.model.read(self.tokens[:, :20])
        self._same("forward against read", self.read, self.whole)

    def _same(self, what: str, found: Tensor, expected: Tensor) -> None:
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= self.exact:
            raise AssertionError(f"{what}: {error:.1e}")

    def _in_pieces(self, tokens: Tensor | None = None, pieces: tuple[int, ...] = PIECES) -> Tensor:
        state, read = None, []
        for piece in (self.tokens[:, :20] if tokens is None else tokens).split(pieces, 1):
            logits, state = self.model.read(piece, state)
            read.append(logits)
        return torch.cat(read, 1)

    def pieces(self) -> str | None:
        """Read in pieces as in the whole; what is known to differ, in words."""
        known = APART.get(self.kind)
        if known is None:
            self._same("in pieces", self._in_pieces(), self.whole)
            return None
        worst = 0.0
        for seed in range(8):
            tokens = torch.randint(3, VOCABULARY - 16, (2, 32), generator=torch.Generator().manual_seed(seed))
            whole = self.model(tokens)
            for pieces in APARTS:
                found = self._in_pieces(tokens, pieces)
                worst = max(worst, float((found - whole).abs().max() / whole.abs().max()))
        if worst > known.error * 1.1:
            raise AssertionError(f"in pieces: {worst:.1e}, and {known.error:g} is known")
        return f"known: {worst:.1e}"

    def padding(self) -> None:
        """A padded row as the row alone."""
        try:
            self._padding()
        except InputError as error:
            if "NaN" not in str(error):
                raise
            # Rows without anything in sight overflow where float32's least number meets float64: in float32, then.
            model, exact = self.model, self.exact
            self.model, self.exact = HuggingFaceModel(copy.deepcopy(model.model).float()), 2e-4
            try:
                self._padding()
            finally:
                self.model, self.exact = model, exact

    def _padding(self) -> None:
        alone, state = self.model.read(self.tokens[:1, :7])
        after, _ = self.model.read(self.tokens[:1, 7:8], state)
        pad, place = torch.zeros(1, 5, dtype=torch.int64), torch.arange(12)[None]
        for side, mask in (("left", place >= torch.tensor([[5], [0]])), ("right", place < torch.tensor([[7], [12]]))):
            row = [pad, self.tokens[:1, :7]] if side == "left" else [self.tokens[:1, :7], pad]
            both = torch.cat([torch.cat(row, 1), self.tokens[1:, :12]])
            logits, state = self.model.read(both, mask=mask)
            self._same(f"{side} padding", logits[:1][mask[:1]][None], alone)
            logits, _ = self.model.read(self.tokens[:, 7:8], state)
            self._same(f"after {side} padding", logits[:1], after)

    def bytes(self) -> None:
        """Bytes as foretold."""
        for length in LENGTHS:
            _, state = self.model.read(self.tokens[:, :length])
            foretold = self.model.state_nbytes(length, batch=2)
            if state.nbytes != foretold:
                raise AssertionError(f"{length} tokens hold {state.nbytes} bytes, {foretold} were foretold")

    def select(self) -> None:
        """A row that was picked."""
        expected, _ = self.model.read(self.tokens[:, 20:21], self.state)
        found, _ = self.model.read(self.tokens[[1]][:, 20:21], self.state.select(torch.tensor([1])))
        self._same("picked", found, expected[[1]])

    def kept(self) -> None:
        """A state that was gone on from."""
        expected, _ = self.model.read(self.tokens[:, 20:22], self.state)
        self.model.read(self.tokens[:, 22:24], self.state)
        found, _ = self.model.read(self.tokens[:, 20:22], self.state)
        self._same("again", found, expected)

    def policy(self) -> None:
        """A policy that keeps all."""
        pieces = self._in_pieces()
        with build_policy("h2o").attach(self.model):
            whole, _ = self.model.read(self.tokens[:, :20])
            self._same("h2o at 100%", whole, self.whole)
            self._same("h2o at 100%, in pieces", self._in_pieces(), pieces)
        with build_policy("h2o", budget="8tok", window=4).attach(self.model):
            self._in_pieces()

    def apply(self) -> None:
        """A policy that keeps all of a state that was read without it."""
        following = self.tokens[:, 20:21]
        expected, _ = self.model.read(following, self.state)
        for budget in ("100%", "10tok"):
            policy = build_policy("streaming_llm", budget=budget, window=4)
            state = policy.apply(self.state, self.model)
            with policy.attach(self.model):
                found, _ = self.model.read(following, state)
            if budget == "100%":
                self._same("applied at 100%", found, expected)


def outcome(check: Callable[[], Any], full: bool) -> str:
    """What a check came to, in one line."""
    try:
        return check() or "ok"
    except NotBuilt as error:
        return f"not built: {error}"
    except InputError as error:
        line = str(error)
        return f"refused: {line}" if "\n" not in line else f"fault: a refusal of several lines, {line!r}"
    except AssertionError as error:
        return f"fault: {error}"
    except Exception as error:
        if full:
            traceback.print_exc()
        return f"fault: {type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"


def held(kind: str, full: bool = False) -> dict[str, str]:
    """What each column of a type came to; `built` alone where it cannot be built or read."""
    made: list[Held] = []
    built = outcome(lambda: made.append(Held(kind)), full)
    if built != "ok":
        return {"built": built}
    return {"built": "ok", **{name: outcome(getattr(made[0], name), full) for name in COLUMNS}}


def apart(kind: str, limit: int, full: bool) -> dict[str, str]:
    """`held` in a fork, stopped after `limit` seconds."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        signal.alarm(limit)
        with os.fdopen(writes, "w") as out, torch.no_grad():
            json.dump(held(kind, full), out)
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as out:
        text = out.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"built": f"fault: stopped by signal {os.waitstatus_to_exitcode(status)}"}


def main() -> int:
    """The command line. Returns 1 where a column of a type is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="these types")
    parser.add_argument("--out", type=Path, default=None, help="where to keep what was found, a JSON file")
    parser.add_argument("--table", action="store_true", help="print the tables of what --out holds, run nothing")
    parser.add_argument("--limit", type=int, default=120, help="seconds for each type")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.out.read_text())))
        return 0
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    kinds = arguments.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    found["transformers"] = transformers.__version__
    for kind in kinds:
        found[kind] = apart(kind, arguments.limit, arguments.only is not None)
        faults = {name: what for name, what in found[kind].items() if what != "ok"}
        print(kind, faults or "ok", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return int(any(what.startswith("fault") for kind in kinds for what in found[kind].values()))


def table(found: dict[str, Any]) -> str:
    """The tables of docs/checkpoints.md: types by what they came to, and those that differ in pieces."""
    groups: dict[str, list[str]] = {}
    for kind, columns in sorted(found.items()):
        if kind != "transformers":
            groups.setdefault(_summary(columns), []).append(kind)
    lines = [f"With transformers {found['transformers']}, `python -m tests.soak.causal`:", ""]
    lines += ["| what holds | types | which |", "| --- | --- | --- |"]
    order = sorted(groups.items(), key=lambda each: (each[0] != HOLDS, "all but" not in each[0], -len(each[1])))
    lines += [f"| {what} | {len(kinds)} | {', '.join(kinds)} |" for what, kinds in order]
    lines += ["", "| answers in pieces differ from the whole | by up to, of the largest logit |", "| --- | --- |"]
    apart: dict[str, list[str]] = {}
    for kind, columns in sorted(found.items()):
        if kind in APART and columns.get("pieces", "").startswith("known: "):
            apart.setdefault(APART[kind].why, []).append(f"{kind} {float(columns['pieces'][7:]):.2g}")
    lines += [f"| {why} | {', '.join(figures)} |" for why, figures in apart.items()]
    return "\n".join(lines)


HOLDS = "all of it"


def _summary(columns: dict[str, str]) -> str:
    """What a type came to, without its name, so that types of one outcome stand together."""
    if columns["built"] != "ok":
        return _plain(columns["built"])
    off = {name: what for name, what in columns.items() if what != "ok" and not what.startswith("known")}
    if not off:
        return HOLDS
    reasons = {_plain(what).removeprefix("refused: ") for what in off.values()}
    named = "policies" if set(off) <= {"policy", "apply"} else ", ".join(off)
    return f"all but {named}: " + "; ".join(sorted(reasons))


def _plain(what: str) -> str:
    """A refusal or a fault without the names of its type and of the module that it is about."""
    verdict, _, line = what.partition(": ")
    line = re.sub(r"^[\w-]+: (?=[a-z])", "", line)
    line = re.sub(r"^[A-Z]\w*?(Attention|SelfAttention|Attention\w*)\b:? ?", "the attention ", line)
    line = re.sub(r"^expected \[batch, tokens\].*", "it makes masks of its own", line)
    line = re.sub(r"(;| You can) .*", "", line)
    line = re.sub(r"^(H2O|StreamingLLM) needs a model with a KV state.*", "no layer keeps all keys and values", line)
    line = line.removesuffix(", so no policy can serve it").removesuffix(", so it has no state to hand on")
    line = line.removesuffix(", so there is no state to hand on").removesuffix(" in your environment.")
    return {"refused": f"refused: {line}", "not built": f"cannot be built here: {line}"}.get(verdict, what)


if __name__ == "__main__":
    raise SystemExit(main())
