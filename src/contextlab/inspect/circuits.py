"""A model as a graph: who adds what to the residual stream, who reads it, and what of the answer some edges keep.

Senders are the embedded tokens, the heads of each mixer (or the mixer as a whole, where its output is no sum over
heads), and the MLPs; receivers each mixer, each MLP and the read-out. A receiver reads the stream, the sum of what all
senders before it add. An edge that is kept carries what its sender adds in the run, one that is not carries what the
sender adds in the corrupted text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.inspect.capturing import taking
from contextlab.inspect.causal import Score
from contextlab.inspect.layout import chosen, sites
from contextlab.inspect.taps import Taps, frozen
from contextlab.models import Model
from contextlab.models.blocks import Block

READ_OUT = "final"


class Sender(NamedTuple):
    """Who adds to the stream. site: a place of the model. head: of it; None for all. order: who comes before whom."""

    site: str
    head: int | None
    order: int


class Receiver(NamedTuple):
    """Who reads the stream: "blocks.N.mixer", "blocks.N.mlp" or "final"."""

    name: str
    order: int


Edge = tuple[int, int]
"""Numbers of a sender and of a receiver."""


class Graph:
    """A model's senders, receivers and edges, and two texts that it has read.

    model: of ours, whose layers add to one stream: x + mixer(norm(x)), then x + mlp(norm(x)). Raises InputError of
    others. clean, corrupted: inputs [B, T] or [B, T, d]. score: predictions -> [B].
    """

    def __init__(self, model: Model, clean: Tensor, corrupted: Tensor, score: Score) -> None:
        self.model, self.score, self.corrupted = model, score, corrupted
        if reason := not_a_graph(model):
            raise InputError(reason)
        self._depth = len(model.blocks)
        known = sites(model)
        split = _split(model, corrupted, known)
        self.senders, self.receivers = [Sender("blocks.0.input", None, 0)], list[Receiver]()
        self._heads: dict[str, Tensor] = {}  # of a mixer, from each head's answer to the stream, [H, V, D]
        for number in range(self._depth):
            for order, part in enumerate(("mixer", "mlp")):
                name, at = f"blocks.{number}.{part}", 1 + 2 * number + order
                if f"{name}.output" not in known:
                    continue
                self.receivers.append(Receiver(name, at))
                if name in split:
                    self._heads[name] = split[name]
                    self.senders += [Sender(f"{name}.heads", head, at) for head in range(len(split[name]))]
                else:
                    self.senders.append(Sender(f"{name}.output", None, at))
        self.receivers.append(Receiver(READ_OUT, 1 + 2 * self._depth))
        self.edges: list[Edge] = [
            (s, r)
            for r, receiver in enumerate(self.receivers)
            for s, sender in enumerate(self.senders)
            if sender.order < receiver.order
        ]
        with torch.no_grad():
            there, self.clean_score = self._read(clean)
            self._here, self.corrupted_score = self._read(corrupted)
        self._apart = [self._added(sender, there) - self._added(sender, self._here) for sender in self.senders]

    def _read(self, inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What flows where, and the score. Raises InputError where layers do not add up as a graph's do."""
        model = self.model
        names = [f"blocks.{n}.{end}" for n in range(self._depth) for end in ("input", "output")]
        names += [f"{each.name}.{end}" for each in self.receivers[:-1] for end in ("input", "output")]
        names += [f"{name}.heads" for name in self._heads]
        self._places = chosen(model, names)
        with taking(model, self._places) as taken:
            score = self.score(model(inputs))
        found = {name: taken[name] for name in names}
        for number in range(self._depth):
            x = found[f"blocks.{number}.input"]
            for part in ("mixer", "mlp"):
                name = f"blocks.{number}.{part}"
                if f"{name}.output" not in found:
                    continue
                found[f"{name}.stream"] = x
                _require(found[f"{name}.input"], self._norm(name)(x), name)
                x = x + found[f"{name}.output"]
            _require(found[f"blocks.{number}.output"], x, f"blocks.{number}")
        found[f"{READ_OUT}.stream"] = x
        return found, score

    def _norm(self, name: str) -> Callable[[Tensor], Tensor]:
        _, number, part = name.split(".")
        block: Any = self.model.blocks[int(number)]
        norm: Callable[[Tensor], Tensor] = block.mixer_norm if part == "mixer" else block.mlp_norm
        return norm

    def _added(self, sender: Sender, values: Mapping[str, Tensor]) -> Tensor:
        """What a sender adds to the stream, [B, T, D]."""
        value = values[sender.site]
        if sender.head is None:
            return value
        return value[:, :, sender.head] @ self._heads[sender.site.removesuffix(".heads")][sender.head]

    def run(self, kept: set[Edge], *, clean: bool = True, nudges: Mapping[int, Tensor] | None = None) -> Tensor:
        """The score of the text [B] when only some edges carry what their senders add in this run.

        clean: whether the embedded tokens are the clean text's. nudges: receiver's number -> what is added to what it
        reads, [B, T, D].
        """
        added: dict[int, Tensor] = {0: self._apart[0]} if clean else {}
        heads: dict[str, Tensor] = {}
        of: dict[str, list[int]] = {}
        for s, sender in enumerate(self.senders):
            of.setdefault(sender.site.rpartition(".")[0], []).append(s)

        def reads(r: int) -> Tensor:
            x = self._here[f"{self.receivers[r].name}.stream"]
            for s, each in added.items():
                x = x + each if (s, r) in kept else x
            return x if nudges is None or r not in nudges else x + nudges[r]

        def receive(r: int) -> Callable[[Tensor], Tensor]:
            norm = self._norm(self.receivers[r].name)
            return lambda value: norm(reads(r))

        def keep(name: str) -> Callable[[Tensor], Tensor]:
            return lambda value: heads.setdefault(name, value)

        def send(name: str) -> Callable[[Tensor], Tensor]:
            def note(value: Tensor) -> Tensor:
                now = {f"{name}.output": value, **({f"{name}.heads": heads[name]} if name in self._heads else {})}
                for s in of[name]:
                    sender = self.senders[s]
                    added[s] = self._added(sender, now) - self._added(sender, self._here)
                return value

            return note

        edits: dict[str, Callable[[Tensor], Tensor]] = {}
        for r, receiver in enumerate(self.receivers[:-1]):
            name = receiver.name
            edits |= {f"{name}.input": receive(r), f"{name}.output": send(name)}
            if name in self._heads:
                edits[f"{name}.heads"] = keep(name)
        edits[f"blocks.{self._depth - 1}.output"] = lambda value: reads(len(self.receivers) - 1)
        handlers = [(self._places[name], lambda value, _, edit=edit: edit(value)) for name, edit in edits.items()]
        with Taps(self.model, handlers):
            return self.score(self.model(self.corrupted))

    def estimates(self) -> dict[Edge, Tensor]:
        """Edge attribution patching (2310.10348): of each edge alone, about what it would add to the score, [B].

        The gradient at what the receiver reads, before its norm, in the corrupted text, times the difference of what
        the sender adds in the two texts.
        """
        with frozen(self.model), torch.enable_grad():
            nudges = {r: torch.zeros_like(self._apart[0]).requires_grad_() for r in range(len(self.receivers))}
            total = self.run(set(self.edges), clean=False, nudges=nudges).sum()
            slopes = torch.autograd.grad(total, list(nudges.values()), allow_unused=True)
        none = torch.zeros_like(self._apart[0])
        given = [none if slope is None else slope for slope in slopes]
        return {(s, r): (given[r] * self._apart[s]).sum((1, 2)) for s, r in self.edges}


def not_a_graph(model: Model) -> str:
    """Why a model's layers do not add to one stream, each reading it by itself; "" where they do."""
    spec = model.spec
    if spec.loops > 1 or spec.exit is not None or spec.pool is not None:
        return "edges are told of models that read their layers once, and answer at every token"
    if any(layer.share is not None or layer.kv != "own" or layer.skip is not None for layer in spec.pattern()):
        return "edges are told of layers that share nothing and that all tokens go through"
    for number, block in enumerate(model.blocks):
        if not isinstance(block, Block) or block.parallel or spec.residual != "plain":
            return f"layer {number} does not add x + mixer(norm(x)), then x + mlp(norm(x)), to the stream"
    return ""


def _split(model: Model, inputs: Tensor, known: Mapping[str, Any]) -> dict[str, Tensor]:
    """The mixers whose output is a sum over heads, and what takes each head's answer to the stream, [H, V, D]."""
    names = [f"blocks.{number}.mixer" for number in range(len(model.blocks))]
    names = [name for name in names if f"{name}.heads" in known and f"{name}.output" in known]
    with (
        torch.no_grad(),
        taking(model, chosen(model, [f"{n}.{e}" for n in names for e in ("heads", "output")])) as taken,
    ):
        model(inputs)
    found: dict[str, Tensor] = {}
    for name in names:
        block: Any = model.blocks[int(name.split(".")[1])]
        answers, output = taken[f"{name}.heads"], taken[f"{name}.output"]
        project = getattr(block.mixer, "out_proj", None)
        weight, bias = getattr(project, "weight", None), getattr(project, "bias", None)
        if not isinstance(weight, Tensor) or weight.shape != (output.shape[-1], answers[0, 0].numel()):
            continue
        to_stream = weight.detach().T.unflatten(0, (answers.shape[2], -1))
        made = torch.einsum("bthv,hvd->btd", answers.flatten(3), to_stream) + (0.0 if bias is None else bias)
        if _alike(output, made):
            found[name] = to_stream
    return found


def _alike(value: Tensor, made: Tensor) -> bool:
    return torch.allclose(value, made, rtol=1e-3, atol=1e-4 * max(1.0, value.abs().max().item()))


def _require(value: Tensor, made: Tensor, name: str) -> None:
    """Raises InputError where a layer does something else than a graph says."""
    if not _alike(value, made):
        raise InputError(f"{name}: does not read and add to the stream as edges would have it")
