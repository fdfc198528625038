"""What was measured of a setting as rows of the table: qualities by prompt, costs by batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.evaluation.compress.prompts import Drawn, is_text
from contextlab.evaluation.compress.reading import Reading
from contextlab.evaluation.compress.settings import Setting, weight_bytes
from contextlab.evaluation.intervals import share_bounds, t95, usual
from contextlab.prompt import HIGHER_IS_BETTER, Task, wide


@dataclass
class Trials:
    """What was measured of one setting: per prompt, and per batch."""

    quality: dict[str, list[Tensor]] = field(default_factory=dict)
    costs: dict[str, list[float]] = field(default_factory=dict)

    def add(self, reading: Reading, full: Reading, task: Task, drawn: Drawn) -> None:
        tail = drawn.tail
        errors = task.errors(reading.logits, tail)
        if reading.logits.shape == full.logits.shape:
            ours, theirs = (F.log_softmax(wide(x), -1) for x in (reading.logits, full.logits))
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

    def rows(
        self, setting: Setting, text: str, chance: Mapping[str, float] | None = None, sequences: int = 1
    ) -> Iterator[dict[str, Any]]:
        """A row a metric; of qualities with what chance gives and the value of each prompt, [prompts] float32.

        sequences: of whose states, beside the weights, the total of bytes is.
        """
        for metric, parts in self.quality.items():
            values = torch.cat(parts)
            mean, half = values.mean().item(), t95(len(values) - 1) * values.std().item() / math.sqrt(len(values))
            row = {"value": mean, "ci_low": mean - half, "ci_high": mean + half}
            if metric in HIGHER_IS_BETTER and len(values) > 1:
                other = usual(values.numpy())[1]
                low, high = share_bounds(*(np.array([each]) for each in (mean, half, len(values), other)))
                row |= {"ci_low": float(low[0]), "ci_high": float(high[0])}
            known = {"chance": (chance or {}).get(metric, math.nan), "values": values.float().numpy()}
            yield {"metric": metric, "n": len(values), **row, **known}
            if metric == "cross_entropy" and is_text(text):
                row = {key: math.exp(min(each, 700)) for key, each in row.items()}
                yield {"metric": "perplexity", "n": len(values), **row, "values": None}
        for metric, found in self.costs.items():
            if setting.kind != "policy" and metric == "overhead":
                continue
            yield {
                "metric": metric,
                "value": statistics.median(found),
                "ci_low": min(found),
                "ci_high": max(found),
                "n": len(found),
                "values": None,
            }
        own, states = weight_bytes(setting.model), self.costs["state_bytes"]
        for metric, times in (("weight_bytes", 0), ("total_bytes", sequences)):
            least, middle, most = (own + times * each for each in (min(states), statistics.median(states), max(states)))
            told: dict[str, Any] = {"value": middle, "ci_low": least, "ci_high": most, "n": len(states)}
            yield {"metric": metric, **told, "values": None, **({"sequences": times} if times else {})}
