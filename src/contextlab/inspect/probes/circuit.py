"""The smallest circuit that still answers: edges between heads and MLPs, found by taking away, and run alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.inspect.circuits import READ_OUT, Edge, Graph, not_a_graph
from contextlab.inspect.held import mean_of
from contextlab.inspect.pairs import margin_of, pairs_of, pairs_refusal, share_of
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, probe_table, some
from contextlab.inspect.probes.patching import MARGIN, SHARE, margin_words, percent
from contextlab.registry import register

LOST, ESTIMATE, EDGES = "effect when taken away", "estimate", "edges"
RANDOM = 8
"""Circuits of as many edges, drawn at random, whose mean is the control."""


@register("probe", "circuit", papers=("2304.14997", "2310.10348"), family="causal", cases=({"prompts": 4},))
@dataclass(frozen=True)
class Circuit(Probe):
    """The smallest circuit that still answers: which head writes what another reads.

    Senders are the embedded tokens, heads (of attention without norms and gates behind it; else a mixer as a whole) and
    MLPs; receivers each layer's mixer, each MLP and the read-out. The heads of one layer read together: an edge goes to
    the mixer, and which of its heads uses it is seen from the edges that leave it. An edge that is kept carries what
    its sender adds in the run of the circuit; every other one carries what it adds in the corrupted prompt (`patching`
    says which prompts). All edges give the clean prompt's answer exactly, none the corrupted one's.

    Edges are ranked by what is lost when each alone is taken from all (exactly, by running; that is where estimates
    from gradients fail: behind a softmax that is sure of itself they are 0, see "estimate", edge attribution patching,
    2310.10348). The least are taken away as long as the rest keeps the answer, then each of those left is tried alone,
    as ACDC does (2304.14997). No edge of what remains can be spared, but a smaller circuit of others may exist. It is
    then run on fresh prompts; the control is the mean of random circuits of as many edges.

    prompts: pairs to find it on; as many fresh ones test it.
    keep: how near the answer must stay, as a share of the clean answer: 0.9 is from 90% to 110%.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "what", figures=("measure",), measures=(LOST,), note="What is lost without the edge, a share."
    )

    prompts: PositiveInt = 32
    keep: PositiveFloat = 0.9

    def refusal(self, subject: Subject) -> str:
        if self.keep >= 1:
            return f"keep: expected a share below 1, got {self.keep:g}"
        return not_a_graph(subject.model) or pairs_refusal(subject)

    def measure(self, subject: Subject) -> pd.DataFrame:
        pairs, fresh = pairs_of(subject, self.prompts), pairs_of(subject, self.prompts, draw=2)
        graph = Graph(subject.model, pairs.clean.inputs, pairs.corrupted.inputs, pairs.score)
        whole = graph.clean_score - graph.corrupted_score
        untrained = margin_of(pairs, subject.untrained()).mean().item()
        rows: list[dict[str, Any]] = [{"what": "answer", "measure": MARGIN, "control": untrained, **mean_of(whole)}]
        kept, lost = self._smallest(graph, whole)
        guessed = graph.estimates()
        for edge in sorted(kept, key=lambda each: (each[1], each[0])):
            sender = graph.senders[edge[0]]
            told = {"site": sender.site, "head": sender.head, "what": _named(graph, edge)}
            rows.append({**told, "measure": LOST, **share_of(lost[edge], whole)})
            rows.append({**told, "measure": ESTIMATE, **share_of(guessed[edge], whole)})
        other = Graph(subject.model, fresh.clean.inputs, fresh.corrupted.inputs, fresh.score)
        apart = other.clean_score - other.corrupted_score
        generator = torch.Generator().manual_seed(subject.seed)
        drawn = [torch.randperm(len(graph.edges), generator=generator)[: len(kept)].tolist() for _ in range(RANDOM)]
        random = [_kept(other, {graph.edges[each] for each in some_edges}) for some_edges in drawn]
        control = sum(share_of(each, apart)["value"] for each in random) / RANDOM
        circuit = {"what": "circuit", "control": control, **share_of(_kept(other, kept), apart)}
        rows.append({**circuit, "measure": SHARE})
        rows.append({"what": "circuit", "measure": EDGES, "value": len(kept), "control": len(graph.edges)})
        return probe_table(rows)

    def _smallest(self, graph: Graph, whole: Tensor) -> tuple[set[Edge], dict[Edge, Tensor]]:
        """The edges that remain, and what is lost of the score, [B], when each alone is taken from all."""
        every = set(graph.edges)

        def enough(edges: set[Edge]) -> bool:
            share = share_of(_kept(graph, edges), whole)["value"]
            return self.keep <= share <= 2 - self.keep

        with torch.no_grad():
            lost = {edge: graph.clean_score - graph.run(every - {edge}) for edge in graph.edges}
        order = sorted(graph.edges, key=lambda edge: abs(lost[edge].mean().item()))
        low, high = 0, len(order)  # so many of the least can be taken away, so many cannot
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if enough(set(order[middle:])) else (low, middle)
        kept, again = set(order[low:]), True
        while again:
            again = False
            for edge in order:
                if edge in kept and enough(kept - {edge}):
                    kept, again = kept - {edge}, True
        return kept, lost

    def words(self, rows: list[Row]) -> list[str]:
        if no_margin := margin_words(rows):
            return [no_margin]
        found, count = (next(row for row in rows if row["measure"] == each) for each in (SHARE, EDGES))
        edges = [row for row in rows if row["measure"] == LOST]
        if found["ci_low"] is not None and found["ci_low"] <= found["control"]:
            return [
                f"No circuit is found: on fresh prompts it keeps {percent(found)}, random edges {found['control']:.0%}."
            ]
        edges_of = f"{count['value']:.3g} of {count['control']:.3g} edges"
        random = f"as many random ones {found['control']:.0%}"
        return [
            f"{edges_of} keep {percent(found)} of the answer on fresh prompts ({random}): "
            f"{some([row['what'] for row in edges], 12)}."
        ]


def _kept(graph: Graph, edges: set[Edge]) -> Tensor:
    """How much more some edges alone score than the corrupted text, [B]."""
    with torch.no_grad():
        return graph.run(edges) - graph.corrupted_score


def _named(graph: Graph, edge: Edge) -> str:
    """An edge in words: 0.1 to mixer 2."""
    sender, receiver = graph.senders[edge[0]], graph.receivers[edge[1]]
    _, number, *part = sender.site.split(".")
    one = "tokens" if not edge[0] else f"{part[0]} {number}" if sender.head is None else f"head {number}.{sender.head}"
    if receiver.name == READ_OUT:
        return f"{one} to the answer"
    _, number, reads = receiver.name.split(".")
    return f"{one} to {reads} {number}"
