"""How many of a layer's heads are different: those that look alike could share one pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.inspect.alike import groups_of, head_correlations
from contextlab.inspect.held import mean_of
from contextlab.inspect.maps import NONE, mixing, telling_layers
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, probe_table, shown
from contextlab.models import Model
from contextlab.registry import register
from contextlab.words import listed

HEADS, EVERY, PAIRS, TOGETHER = "heads that look different", "heads", "correlation", "correlation in a group"
DIFFERENT, ALL, MEAN = "different", "all", "mean of pairs"
DRAWS = 200
"""Of the bootstrap over prompts."""


@register("probe", "head_groups", papers=("2403.08058",), family="maps", cases=({"prompts": 4},))
@dataclass(frozen=True)
class HeadGroups(Probe):
    """How many of a layer's heads are different: groups of heads whose matrices are alike, as CHAI shares them.

    Two heads are as alike as their matrices correlate, row by row without the mean, in the mean over prompts
    (`contextlab.inspect.alike`); groups are made by complete linkage, so that each two heads of one are alike at least
    by `alike`. It is asked of softmax attention, linear attention, delta rules and state-space layers alike, wherever a
    layer of two heads or more tells its matrices. The interval of a number of groups is that of a bootstrap over
    prompts. The control is the same with fresh weights. (CHAI, 2403.08058, clusters by K-means with a number of
    clusters chosen beforehand; the policy `chai` does that.)

    alike: the correlation from which on two heads are alike.
    prompts: over which correlations are means.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "site", figures=("measure",), note="Groups: heads each two of which look alike."
    )

    alike: Annotated[float, Field(gt=0, le=1)] = 0.9
    prompts: PositiveInt = 64

    def refusal(self, subject: Subject) -> str:
        return "" if telling_layers(subject.model) else NONE

    def measure(self, subject: Subject) -> pd.DataFrame:
        inputs = subject.prompts(self.prompts).inputs
        found, fresh = (_correlations(model, inputs) for model in (subject.model, subject.untrained()))
        rows: list[dict[str, Any]] = []
        draws = torch.randint(
            self.prompts, (DRAWS, self.prompts), generator=subject.generator(1), device=subject.device
        ).cpu()
        for site, each in found.items():
            heads = each.shape[1]
            mean, beside = each.mean(0).numpy(), fresh[site].mean(0).numpy()
            groups = groups_of(mean, self.alike)
            drawn = [len(groups_of(each[draw].mean(0).numpy(), self.alike)) for draw in draws]
            low, high = np.quantile(drawn, [0.025, 0.975])
            ends = {"ci_low": min(low, len(groups)), "ci_high": max(high, len(groups))}
            of = {"site": site, "n": self.prompts}
            count = {"value": len(groups), **ends, "control": len(groups_of(beside, self.alike))}
            rows += [
                {**of, "what": DIFFERENT, "measure": HEADS, **count},
                {**of, "what": ALL, "measure": EVERY, "value": heads},
                {**of, "what": MEAN, "measure": PAIRS, **_pairs(each, list(range(heads))),
                 "control": _pairs(fresh[site], list(range(heads)))["value"]},
            ]  # fmt: skip
            rows += [
                {**of, "what": "+".join(map(str, group)), "measure": TOGETHER, **_pairs(each, group),
                 "control": _pairs(fresh[site], group)["value"]}
                for group in groups if len(group) > 1
            ]  # fmt: skip
        if not rows:
            raise InputError("no layer that tells its matrices has two heads or more")
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        measured = by(rows, "measure")
        different = measured[HEADS]
        number, control = (sum(row[name] for row in different) for name in ("value", "control"))
        every = sum(row["value"] for row in measured[EVERY])
        layers = listed([f"{row['layer']} has {shown(row, 0)}" for row in different])
        sentences = [
            f"{number:.0f} of {every:.0f} heads look different, of fresh weights {control:.0f}: layer {layers}."
        ]
        for row in measured.get(TOGETHER, []):
            heads = listed([f"{row['layer']}.{head}" for head in row["what"].split("+")])
            sentences.append(f"Heads {heads} look alike (correlation {shown(row)}, control {row['control']:.2f}).")
        return sentences


def _correlations(model: Model, inputs: Tensor) -> dict[str, Tensor]:
    """Of each layer that has two heads or more how alike they look, [B, H, H]."""
    telling = telling_layers(model)
    with torch.no_grad():
        return {
            site: head_correlations(matrix, telling[site.removesuffix(".mixer")].causal).cpu()
            for site, matrix in mixing(model, inputs).items()
            if matrix.shape[1] > 1
        }


def _pairs(correlations: Tensor, heads: list[int]) -> dict[str, Any]:
    """The mean over all pairs of these heads, with its interval over prompts. correlations: [B, H, H]."""
    one, other = torch.triu_indices(len(heads), len(heads), 1)
    each = correlations[:, heads][:, :, heads][:, one, other].mean(1)
    return mean_of(each)
