"""What causes an answer: where what flowed in a clean text, put into a corrupted one, brings the clean answer back.

`patch_effects` puts it there and reads on, many places at once as rows of one batch; `attribution_effects` estimates
the same from one gradient (attribution patching, 2310.10348).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from contextlab.errors import InputError, unknown
from contextlab.inspect.capturing import patch, taking
from contextlab.inspect.layout import Site, chosen
from contextlab.inspect.taps import Handler, Taps, frozen
from contextlab.models import Model
from contextlab.models.within import Within
from contextlab.spec import describe

Score = Callable[[Tensor], Tensor]
"""Predictions [B, T, k] -> how much of the answer is there, [B]."""
By = Literal["places", "heads"]
Parts = list[tuple[int | None, int | None]]
"""(place, head) of what is put in alone; None for all of them."""
COLUMNS = ("site", "place", "head", "score", "effect")
AT_ONCE = 2**12
"""Tokens that are read in one batch, about."""


@dataclass(frozen=True)
class _Case:
    """The two texts, read: what flows through each of the sites in either, and what the answers score."""

    sites: dict[str, Site]
    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    clean_score: Tensor
    corrupted_score: Tensor

    def rows(self, site: str, parts: Sequence[tuple[int | None, int | None]], scores: Iterable[float]) -> Iterator[Any]:
        """Rows of a table; scores: of the patched text, means over its rows."""
        low, high = self.corrupted_score.mean().item(), self.clean_score.mean().item()
        for (place, head), score in zip(parts, scores, strict=True):
            effect = (score - low) / (high - low)
            yield {"site": site, "place": place, "head": head, "score": score, "effect": effect}


def patch_effects(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    score: Score,
    sites: str | Iterable[str] = "blocks.*.mixer.heads",
    by: Sequence[By] = ("places", "heads"),
) -> pd.DataFrame:
    """How much of the clean answer each place brings back, put into the corrupted text (activation patching).

    model: of ours. clean, corrupted: inputs of one shape, [B, T] or [B, T, d].
    score: predictions [B, T, k] -> [B], such as the logit of the clean text's answer less that of the other's.
    sites: places, or patterns of them, that hold tensors [B, T, ...]; see `contextlab.inspect.sites`.
    by: what is put in alone: each place of the text, each head, both; () a site as a whole.

    Returns a row a site, place and head: `score`, the mean over rows of the patched text's, and `effect`, 0 where that
    is the corrupted text's and 1 where it is the clean one's. Many are read at once, as rows of one batch.
    Raises InputError where the two texts score alike, or a site has no heads.
    """
    with torch.no_grad():
        case = _read(model, clean, corrupted, score, sites)
        found: list[dict[str, Any]] = []
        streams = streams_of(model, corrupted)
        for site in case.clean:
            parts, scores = scores_with(model, case.sites[site], case.clean[site], corrupted, score, by, streams)
            found += case.rows(site, parts, scores.mean(1).tolist())
    return _table(found)


@dataclass(frozen=True)
class Patched:
    """What patching did, prompt by prompt.

    clean_score, corrupted_score: [B]. parts: of each site. scores: site -> of the corrupted text with each part of the
    clean one, [parts, B]. controls: with that of another row's.
    """

    clean_score: Tensor
    corrupted_score: Tensor
    parts: dict[str, Parts]
    scores: dict[str, Tensor]
    controls: dict[str, Tensor]


def patch_scores(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    score: Score,
    asked: Mapping[str, Sequence[By]],
    controls: bool = True,
) -> Patched:
    """`patch_effects` prompt by prompt.

    clean, corrupted: [B, T] or [B, T, d]. asked: site -> what is put in alone there, as `by` of that. controls: whether
    to put in what the clean text of the row before gave, too. Other arguments and errors as there.
    """
    with torch.no_grad():
        case = _read(model, clean, corrupted, score, list(asked))
        streams = streams_of(model, corrupted)
        found = Patched(case.clean_score, case.corrupted_score, {}, {}, {})
        for site, by in asked.items():
            value = case.clean[site]
            for into, put in ((found.scores, value), (found.controls, value.roll(1, 0)))[: 1 + controls]:
                found.parts[site], into[site] = scores_with(model, case.sites[site], put, corrupted, score, by, streams)
    return found


def scores_with(
    model: nn.Module,
    site: Site,
    value: Tensor,
    inputs: Tensor,
    score: Score,
    by: Sequence[By],
    streams: Sequence[Tensor] = (),
) -> tuple[Parts, Tensor]:
    """The parts of a site, and what the inputs score with each of them alone out of `value`, [parts, B].

    value: [B, T, ...] as flows there. inputs: [B, T] or [B, T, d]. by: what is put in alone, as for `patch_effects`.
    streams: what each layer is given when the inputs are read (`streams_of`), so that earlier ones are not read again.
    """
    parts = _parts(site.name, value, by)
    begin = int(site.name.split(".")[1]) if streams and site.name.startswith("blocks.") else 0
    at_once = max(1, AT_ONCE // (value.shape[0] * value.shape[1]))
    scores: list[Tensor] = []
    for first in range(0, len(parts), at_once):
        some = parts[first : first + at_once]
        copies = _copied(inputs, len(some))
        # No layer before the patched one is read again: what it is given is known.
        given = {"within": Within(stream=_copied(streams[begin], len(some)), begin=begin)} if begin else {}
        with Taps(model, [(site, _put_in(value, some))]):
            predicted = model(copies, **given)
        scores += [score(each) for each in predicted.unflatten(0, (len(some), -1))]
    return parts, torch.stack(scores)


def attribution_effects(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    score: Score,
    sites: str | Iterable[str] = "blocks.*.mixer.heads",
    by: Sequence[By] = ("places", "heads"),
) -> pd.DataFrame:
    """An estimate of `patch_effects` from two readings and one gradient (attribution patching, 2310.10348).

    The score is taken to be linear between the two texts: its gradient in the corrupted one times what differs. Where
    it is not, as behind a softmax that is sure of itself, the estimate is wrong.

    clean, corrupted: [B, T] or [B, T, d]. Other arguments, table and errors as there.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("attribution_effects: there are no gradients within torch.inference_mode; call it outside")
    with frozen(model):
        case = _read(model, clean, corrupted, score, sites, gradients=True)
        names = list(case.corrupted)
        with torch.enable_grad():
            total = case.corrupted_score.sum()
        gradients = torch.autograd.grad(total, [case.corrupted[name] for name in names], allow_unused=True)
    low = case.corrupted_score.mean().item()
    found: list[dict[str, Any]] = []
    for name, gradient in zip(names, gradients, strict=True):
        value = case.clean[name]
        parts = _parts(name, value, by)
        moved = torch.zeros_like(value) if gradient is None else gradient * (value - case.corrupted[name].detach())
        each = moved.flatten(3).sum(-1) if "heads" in by else moved.flatten(2).sum(-1)[..., None]
        each = each.double().mean(0)  # [T, H or 1]
        each = each if "places" in by else each.sum(0, keepdim=True)
        found += case.rows(name, parts, [low + more for more in each.flatten().tolist()])
    return _table(found)


def _copied(x: Tensor, times: int) -> Tensor:
    """x [B, T, ...], so many times below itself."""
    return x.repeat(times, *(1 for _ in x.shape[1:]))


def streams_of(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """What each layer is given, [B, T, D]; [] of a model that cannot go on from there."""
    if not isinstance(model, Model):
        return []
    spec = model.spec
    apart = all(layer.share is None and layer.kv == "own" for layer in spec.pattern())
    if not apart or spec.loops != 1 or spec.exit is not None:
        return []
    within = Within(given=[])
    model(inputs, within=within)
    return within.given or []


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"place": "Int64", "head": "Int64"})


def _read(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    score: Score,
    sites: str | Iterable[str],
    gradients: bool = False,
) -> _Case:
    for text in (clean, corrupted):
        if not isinstance(text, Tensor) or text.ndim < 2:
            raise InputError(f"expected texts [B, T] or [B, T, d], got {describe(text)}")
    if not callable(score):
        raise InputError(f"score: expected a function of the predictions, got {describe(score)}")
    asked = chosen(model, sites)
    if not asked:
        raise InputError("sites: expected one or more")
    if skipped := [name for name, site in asked.items() if site.routed]:
        raise InputError(f"{skipped[0]}: tokens that skip the layer are not there; take blocks.*.output")
    if clean.shape != corrupted.shape:
        raise InputError(f"expected two texts of one shape, got {list(clean.shape)} and {list(corrupted.shape)}")
    with torch.no_grad(), taking(model, asked) as taken:
        high = _scored(score, model(clean), len(clean))
    first = {name: taken[name] for name in asked}
    starts = {"embedded": lambda value: value.detach().requires_grad_()} if gradients else {}  # of the graph
    with torch.set_grad_enabled(gradients), patch(model, starts), taking(model, asked) as taken:
        low = _scored(score, model(corrupted), len(corrupted))
    second = {name: taken[name] for name in asked}
    for name, value in first.items():
        if not isinstance(value, Tensor) or value.ndim < 3:
            raise InputError(f"{name}: is no tensor [B, T, ...]; leave it out")
    # Readings with and without gradients differ by rounding, of float32 at most.
    apart, rounding = (high - low).mean().abs().item(), min(2e-6, 16 * torch.finfo(high.dtype).eps)
    if torch.equal(clean, corrupted) or apart <= rounding * max(high.abs().mean().item(), low.abs().mean().item()):
        raise InputError(
            f"the clean and the corrupted text score alike, {high.mean().item():g}: nothing can be brought back"
        )
    return _Case(asked, first, second, high, low)


def _scored(score: Score, prediction: Tensor, rows: int) -> Tensor:
    found = score(prediction)
    if not isinstance(found, Tensor) or found.shape != (rows,):
        told = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"score: expected a value for each of the {rows} rows, [{rows}], got {told}")
    return found


def _parts(site: str, value: Tensor, by: Sequence[By]) -> Parts:
    """(place, head) of all that is put in alone."""
    for each in by if isinstance(by, list | tuple) else (by,):
        if each not in ("places", "heads"):
            raise InputError(f"by: {unknown('part', each, ('places', 'heads'))}")
    if "heads" in by and value.ndim < 4:
        raise InputError(f"{site}: has no heads, but is {list(value.shape)}; leave heads out of by")
    places = range(value.shape[1]) if "places" in by else (None,)
    heads = range(value.shape[2]) if "heads" in by else (None,)
    return list(product(places, heads))


def _put_in(clean: Tensor, parts: Sequence[tuple[int | None, int | None]]) -> Handler:
    """Puts the clean value in for one part in each copy of the rows."""

    def edit(value: Tensor, read: int) -> Tensor:
        copies = value.unflatten(0, (len(parts), -1)).clone()  # [N, B, T, ...]
        number = torch.arange(len(parts), device=value.device)
        places, heads = ([part[i] for part in parts] for i in (0, 1))
        if places[0] is None and heads[0] is None:
            copies[:] = clean
        elif heads[0] is None:
            copies[number, :, places] = clean[:, places].transpose(0, 1)
        elif places[0] is None:
            copies[number, :, :, heads] = clean[:, :, heads].movedim(2, 0)
        else:
            copies[number, :, places, heads] = clean[:, places, heads].transpose(0, 1)
        return copies.flatten(0, 1)

    return edit
