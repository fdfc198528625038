"""Draw the figures of the mixers' pages and renew their tables: `python docs/mixer_figures.py [FAMILY ...]`.

Two figures, both without training:

- reach: how much each token of the past counts for the answer to the last one, |dy_T / dx_(T-d)| over its value at
  d = 0, for freshly drawn mixers of width 64 (T = 512; geometric mean of 8 seeds and 4 sequences, with 95% intervals
  over the seeds, Student's t of the logarithms).
- capacity: N random pairs of unit keys (64 values) and values are written into one head, and all are read back: the
  part that is nearest to its own value among all N, and the squared error (means of 8 seeds with 95% intervals over
  these, Student's t).

The tables come from the registry. Needs the extra `image` and a Chromium or Chrome.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import plotly.graph_objects as go
import torch
from plotly.colors import qualitative
from plotly.subplots import make_subplots
from torch import Tensor
from torch.nn import functional as F

from contextlab import registry
from contextlab.evaluation.intervals import t95
from contextlab.mixers import build_mixer
from contextlab.mixers.base import state_growth
from contextlab.ops import gated_delta_rule, mesa, simple_gla, softmax_attention, titans
from contextlab.report.naming import bytes_in_words

FOLDER = Path(__file__).parent / "mixers"
WIDTH, LENGTH, SEEDS = 64, 512, 8
# Sizes at which 512 tokens are more than a window, a segment or a block.
OPTIONS: dict[str, dict[str, object]] = {
    "sliding_window": {"window": 64, "sinks": 4},
    "parallel": {"mixers": ["sliding_window", "mamba2"]},
    "moba": {"block": 32, "top_k": 3},
}
OURS = [entry for entry in registry.entries("mixer") if entry.factory.__module__.startswith("contextlab.")]
FAMILIES = sorted({entry.family for entry in OURS})
MARKS = ("<!-- table: written by docs/mixer_figures.py -->", "<!-- end of table -->")


def page(family: str) -> Path:
    """The family's page."""
    return FOLDER / f"{family.replace(' ', '-')}.md"


def members(family: str) -> list[registry.Entry]:
    """The registered mixers of a family."""
    return [entry for entry in OURS if entry.family == family]


def table(family: str) -> str:
    """The family's mixers as a Markdown table."""
    lines = ["| mixer | what it is | state after 4096 tokens, width 64 | papers |", "| --- | --- | --- | --- |"]
    for entry in members(family):
        mixer = build_mixer(entry.name, width=WIDTH, **OPTIONS.get(entry.name, {}) if entry.name == "parallel" else {})
        size = f"{bytes_in_words(mixer.state_nbytes(4096))}, {state_growth(mixer)}" if mixer.causal else "none"
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in entry.papers)
        lines.append(f"| `{entry.name}` | {entry.summary} | {size} | {papers} |")
    return "\n".join(lines)


def renewed(text: str, family: str) -> str:
    """A page's text with its table made anew."""
    start, end = map(re.escape, MARKS)
    return re.sub(
        f"({start}\n).*?({end})", lambda found: f"{found[1]}\n{table(family)}\n\n{found[2]}", text, flags=re.DOTALL
    )


def influence(name: str) -> Tensor:
    """[SEEDS, LENGTH]: log of that of the token d back on the last answer, over that of the last token itself."""
    logs = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        mixer = build_mixer(name, width=WIDTH, **OPTIONS.get(name, {})).eval()
        x = torch.randn(4, LENGTH, WIDTH).requires_grad_()
        tokens = torch.randint(0, 8, (4, LENGTH)) if mixer.reads_tokens else None
        y = mixer(x, keep_state=False, tokens=tokens)[0][:, -1]
        (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
        size = gradient.norm(dim=-1).flip(1)
        logs.append((size / size[:, :1]).clamp_min(1e-9).log().mean(0))
    return torch.stack(logs)


def draw_reach(family: str) -> None:
    """Write the family's figure."""
    figure = go.Figure()
    colours, dashes = qualitative.D3, ("solid", "dash", "dot")
    for i, entry in enumerate(members(family)):
        size = influence(entry.name)  # logarithms
        # From 16 tokens back on, the mean over a tenth of the distance: single tokens are noise.
        places = sorted({round(1.12**n) for n in range(60) if 1.12**n < LENGTH - 1})
        smooth = torch.stack([size[:, max(1, d - d // 10) : d + d // 10 + 1].mean(1) for d in places], 1)
        middle, half = smooth.mean(0), t95(SEEDS - 1) * smooth.std(0) / SEEDS**0.5
        value, low, high = middle.exp(), (middle - half).exp(), (middle + half).exp()
        figure.add_scatter(
            x=places,
            y=[each if each > 2e-9 else None for each in value.tolist()],
            error_y={
                "type": "data",
                "array": (high - value).tolist(),
                "arrayminus": (value - low).tolist(),
                "thickness": 0.6,
                "width": 0,
            },
            name=entry.name,
            line={"color": colours[i % 10], "dash": dashes[i // 10]},
        )
    figure.update_xaxes(type="log", title="tokens back", dtick=1)
    figure.update_yaxes(type="log", title="influence on the answer", range=[-7, 1], exponentformat="power", dtick=1)
    finish(figure, f"{family.replace(' ', '-')}-reach.svg")


def recalled(op: str, pairs: int, seed: int) -> tuple[float, float]:
    """`pairs` pairs, written into one head and read back: the part nearest to its own value, and the squared error.

    The error is relative to the values' own size: 1 is what an empty memory has.
    """
    generator = torch.Generator().manual_seed(seed)
    k = F.normalize(torch.randn(1, pairs, 1, 64, generator=generator), dim=-1)
    v = torch.randn(1, pairs, 1, 64, generator=generator)
    ones, zeros = torch.ones(1, pairs, 1), torch.zeros(1, pairs, 1)
    blank = torch.zeros_like(k)  # the queries come after all pairs, and write nothing
    q2, k2, v2 = torch.cat((blank, k), 1), torch.cat((k, blank), 1), torch.cat((v, blank), 1)
    late = torch.cat((ones, zeros), 1)
    if op == "softmax_attention":
        o = softmax_attention(k, k, v, causal=False, scale=64.0)
    elif op == "linear attention":
        o = simple_gla(q2, k2, v2, None, None, 1.0)[0][:, pairs:]
    elif op == "linear attention, decay 0.98":
        o = simple_gla(q2, k2, v2, late * torch.log(torch.tensor(0.98)), None, 1.0)[0][:, pairs:]
    elif op == "delta rule":
        o = gated_delta_rule(q2, k2, v2, None, late, 1.0)[0][:, pairs:]
    elif op == "titans (momentum 0.5)":
        momentum = torch.cat((ones * torch.log(torch.tensor(0.5)), zeros - 60), 1)
        o = titans(q2, k2, v2, late * 0.5, momentum, late * 0, 1.0)[0][:, pairs:]
    else:
        o = mesa(q2, k2, v2, late * 0, late, torch.full((1, 64), 0.01), steps=64)[0][:, pairs:]
    o, v = o[0, :, 0], v[0, :, 0]
    nearest = torch.cdist(o, v).argmin(-1)
    right = (nearest == torch.arange(pairs)).float().mean().item()
    return right, ((o - v).square().sum() / v.square().sum()).item()


def draw_capacity() -> None:
    """Write the figure that the linear, delta and test-time pages share."""
    counts = [4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512]
    ops = (
        "softmax_attention",
        "mesa",
        "delta rule",
        "titans (momentum 0.5)",
        "linear attention",
        "linear attention, decay 0.98",
    )
    figure = make_subplots(1, 2, subplot_titles=("nearest to its own value, %", "squared error, 1 = empty memory"))
    for i, op in enumerate(ops):
        each = torch.tensor([[recalled(op, n, seed) for seed in range(SEEDS)] for n in counts])
        found, half = each.mean(1), t95(SEEDS - 1) * each.std(1) / SEEDS**0.5
        above = torch.minimum(half[:, 0], 1 - found[:, 0])  # a share ends at 1
        scaled = (
            (1, 100 * found[:, 0], 100 * above, 100 * half[:, 0]),
            (2, found[:, 1].clamp_min(1e-4), half[:, 1], half[:, 1]),
        )
        for column, values, more, less in scaled:
            figure.add_scatter(
                x=counts,
                y=values.tolist(),
                error_y={
                    "type": "data",
                    "array": more.tolist(),
                    "arrayminus": less.tolist(),
                    "thickness": 1,
                    "width": 2,
                },
                name=op.replace("_", " "),
                line={"color": qualitative.D3[i]},
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", title="pairs written into a head of 64 x 64", tickvals=[4, 16, 64, 256])
    figure.update_yaxes(range=[0, 104], col=1)
    figure.update_yaxes(type="log", range=[-3.2, 1.2], dtick=1, exponentformat="power", col=2)
    figure.update_layout(legend={"orientation": "h", "y": -0.22})
    finish(figure, "capacity.svg", 480)


def finish(figure: go.Figure, name: str, height: int = 420) -> None:
    """The looks that all figures share."""
    figure.update_layout(template="plotly_white", font={"size": 14}, margin={"t": 30, "l": 70, "r": 20, "b": 60})
    figure.write_image(FOLDER / name, width=820, height=height)


def main() -> None:
    """Draw, and renew the tables."""
    wanted = sys.argv[1:] or list(FAMILIES)
    unknown = [family for family in wanted if family not in FAMILIES]
    if unknown:
        raise SystemExit(f"unknown family {unknown[0]!r}; known: {', '.join(FAMILIES)}")
    for family in wanted:
        if family != "encoder":  # they have no past
            draw_reach(family)
        page(family).write_text(renewed(page(family).read_text(), family))
        print(family, flush=True)
    draw_capacity()


if __name__ == "__main__":
    main()
