"""Time packed documents against padded rows: `python benchmarks/packed.py`.

One forward and backward of the same documents, lengths log-uniform from 16 to 512, as one row with `cu_seqlens` and as
rows padded on the right to the longest; in turns in one process, the ratio's median and quartiles.
"""

from __future__ import annotations

import statistics
import time

import torch

from contextlab import build_model

SIZES = {"width": 64, "depth": 2, "read_in": "token", "input_size": 64, "output_size": 64}


def main() -> None:
    """Print a line a model."""
    generator = torch.Generator().manual_seed(0)
    length = (16 * 32 ** torch.rand(24, generator=generator)).long()
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), length.cumsum(0)))
    row = torch.randint(64, (1, int(ends[-1])), generator=generator)
    mask = torch.arange(int(length.max())) < length[:, None]
    rows = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, row)
    print(f"{row.numel()} tokens, {rows.numel()} places in padded rows")
    for name in ("transformer", "mamba2", "gated_delta_net"):
        model = build_model(name, **SIZES)
        ways = {
            "packed": lambda model=model: model(row, cu_seqlens=ends).square().sum(),
            "padded": lambda model=model: model(rows, mask)[mask].square().sum(),
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(8):
            for way, loss in ways.items():
                start = time.perf_counter()
                loss().backward()
                taken[way].append(time.perf_counter() - start)
        ratios = [packed / padded for packed, padded in zip(taken["packed"], taken["padded"], strict=True)][1:]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: packed takes {middle:.2f} ({low:.2f} to {high:.2f}) of the padded rows' time")


if __name__ == "__main__":
    main()
