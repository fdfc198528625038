"""`python -m tests.soak.graphs`: what torch makes of each mixer as one graph, and with a length left open.

One graph is `torch.compile(mixer, fullgraph=True)`; an open length is `torch.export` with a dynamic second dimension.
Each must be right, or be refused by torch for one of `REASONS`.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.testing import components
from contextlab.testing.readings import WIDTH

LENGTHS = (16, 5, 33, 100, 300)  # the first is the one that is traced
REASONS = {
    r"Constraints violated|Guard failed|Cannot create Dim with inconsistent": "steps by the length",
    r"data-dependent|Could not extract specialized": "sizes by the values",
    r"does not support RNN": "torch traces no LSTM or GRU",
}
"""What of torch's words stands for which reason."""


class Alone(nn.Module):
    """A mixer that keeps no state: x [B, T, D] -> y [B, T, D]."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """See the class; x [B, T, D]."""
        return self.mixer(x, keep_state=False)[0]


def reason(error: BaseException) -> str | None:
    """Why torch refused, in a few words; None where that is no reason."""
    text = str(error)
    if found := re.search(r"Guard failed: \S+ <= (\d+)", text):
        return f"up to {found[1]} tokens"
    return next((words for pattern, words in REASONS.items() if re.search(pattern, text)), None)


def tried(run: Callable[[Tensor], Tensor], model: nn.Module, lengths: tuple[int, ...]) -> str:
    """ "right", "WRONG: ...", or why torch refused."""
    least = ""
    for length in lengths:
        x = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length))
        try:
            found = run(x)
        except Exception as error:  # torch raises of many kinds
            if found := re.search(r"Guard failed: \S+ >= (\d+)", str(error)):
                least = f"from {found[1]} tokens on"
                continue
            return reason(error) or f"WRONG: {type(error).__name__}: {str(error).strip()[:200]!r}"
        expected = model(x)
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().amax())):
            return f"WRONG: {float((found - expected).abs().amax()):.1e} off at {length} tokens"
    return least or "right"


def one_graph(model: nn.Module) -> str:
    """What `fullgraph=True` gives."""
    torch._dynamo.reset()
    return tried(torch.compile(model, fullgraph=True, backend="eager"), model, LENGTHS[:1])


def open_length(model: nn.Module) -> str:
    """What an exported program of an open length gives at others."""
    x = torch.randn(2, LENGTHS[0], WIDTH)
    try:
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}}, strict=False)
    except Exception as error:  # torch raises of many kinds
        return reason(error) or f"WRONG: {type(error).__name__}: {str(error).strip()[:200]!r}"
    return tried(program.module(), model, LENGTHS)


@torch.no_grad()
def main(names: list[str]) -> int:
    """Print the table; 1 where one is wrong, or refused for no known reason."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    wrong, seen = 0, set[str]()
    print("| mixer | one graph | open length |\n| --- | --- | --- |")
    for component in components("mixer", *names):
        if component.name in seen:
            continue
        seen.add(component.name)
        model = Alone(component.build().float().eval())
        found = [one_graph(model), open_length(model)]
        wrong += any(each.startswith("WRONG") for each in found)
        print(f"| {component.name} | {' | '.join(found)} |", flush=True)
    print(f"\n{len(seen)} mixers, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of mixers; none for all")
    sys.exit(main(parser.parse_args().names))
