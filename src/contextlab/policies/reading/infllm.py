"""InfLLM: distant blocks are found by the few of their tokens that mattered to those that followed them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer, values_of
from contextlab.ops.precision import working_dtype
from contextlab.ops.softmax import capped
from contextlab.policies.core.budget import Amount
from contextlab.policies.core.ranking import best, coarse
from contextlab.policies.reading.fetching import candidates, fetched, row_candidates
from contextlab.policies.reading.selective import ReadState, SelectivePolicy
from contextlab.registry import register
from contextlab.state import KVState, State, own


@dataclass
class BlockState(ReadState):
    """A `ReadState` whose blocks are summarised only when they leave the window.

    scores: [B, Hkv, n], at least float32, of the last tokens, those that no block's summary holds yet: what their keys
        scored with the queries that followed, summed so far. None where nothing is chosen.
    """

    scores: Tensor | None = None


@register(
    "policy",
    "infllm",
    family="selective",
    papers=("2402.04617",),
    cases=({"page": 4, "representatives": 4}, {"page": 4, "representatives": 4, "sinks": 0, "ahead": True}),
)
class InfLLM(SelectivePolicy):
    """InfLLM: sinks, a local window, and the distant blocks whose representative tokens fit best.

    A token's representative score is the mean product of its key with the queries of the `window` tokens after it
    (section 3.2 of the paper), over the query heads that share a key head; the tokens of highest score represent their
    block, and a block's relevance is the sum of their keys' products with the queries that choose. Scores are summed
    while tokens are in the window, and a block is summarised, by the mean of its representatives' keys, when it leaves.
    These means and the scores of the tokens in no summary are resident; all keys and values may be offloaded.

    Rotary distances are clipped: every token further back than `window` is read, and judged, as if it were exactly
    that far away, so that a model sees no distance that it was not trained on. Nothing is clipped where positions are
    not rotary, nor with a full budget, which reads everything as it is.

    The prompt is read in full, as in the other policies of this kind, unless `chunk` has it read as in the paper:
    each chunk of queries chooses its blocks by their sum, and sees nothing else beyond the window; so the first
    queries of a chunk are answered with blocks that the later ones asked for, too. Chunks are counted from the end of
    a piece, so that padding does not move them.

    Differs from the paper's code in that the heads that share a key head choose together and others on their own
    (there all heads of a layer read the same blocks), in that sinks are whole blocks, and in what it sums for a
    token's score (there attention weights, the token's own among them). The code keeps recently read blocks on the
    device; here they are fetched when they are read.

    budget: what one token may read: "10%" of all bytes, "512tok", "64MB"; see `SelectivePolicy`. Tokens of a chunk may
        read up to chunk - 1 more.
    window: last tokens that are always read, at their true distance; 4096 in the paper.
    page: tokens in a block; default 16, or more where the summaries would take over half of a budget in per cent; 128
        in the paper.
    representatives: tokens that represent a block, at most page; 4 in the paper.
    sinks: first tokens that are always read; 128 in the paper.
    chunk: tokens of a piece that choose together and read selectively; 512 in the paper; default none does.
    skip: first layers that read everything.
    ahead: choose by the query of the token before; the paper does not.
    offload: keep keys and values in the CPU's memory and fetch what is read; in the paper the window stays.
    """

    kind = BlockState

    def __init__(
        self,
        budget: Amount = None,
        window: int = 64,
        page: int | None = None,
        representatives: int = 4,
        sinks: int = 4,
        chunk: int | None = None,
        skip: int = 0,
        ahead: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(budget, window, page, sinks, skip, ahead, offload)
        check_whole(representatives=(representatives, 1), **({} if chunk is None else {"chunk": (chunk, 1)}))
        if representatives > self.page:
            raise InputError(
                f"representatives: {representatives} of a block of {self.page} tokens; take at most {self.page} or "
                "raise page"
            )
        self.representatives, self.chunk = representatives, chunk

    @property
    def turns(self) -> bool:
        """See `Policy.turns`."""
        return True

    @property
    def needs(self) -> str:
        """See `Policy.needs`: the queries, unless all tokens of a block represent it."""
        return "the queries that follow each token" if self.representatives < self.page else ""

    def summarise(self, keys: Tensor) -> dict[str, Tensor]:
        """See `SelectivePolicy.summarise`, of the representatives' keys: "mean" [B, Hkv, P, D]."""
        return {"mean": keys.mean(3)}

    def relevance(self, q: Tensor, summary: dict[str, Tensor]) -> Tensor:
        """See `SelectivePolicy.relevance`: the mean of the representatives' scores, all at the same distance.

        In the first layer a word has the same key wherever it stands, so that blocks may be exactly alike.
        """
        return coarse(q @ summary["mean"].mT)

    def attend(
        self,
        layer: KVLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """See `Policy.attend`."""
        count = q.shape[1]
        if self.budget.everything or (count > 1 and self.chunk is None):
            return super().attend(layer, q, k, v, state, mask, keep_state)
        state = self._continued(BlockState, layer, k, v, state)
        outputs, size = [], self.chunk or 1
        for last in range((count - 1) % size + 1, count + 1, size):
            part = slice(max(0, last - size), last)
            few = None if mask is None else mask[:, part]
            y, state = self._step(layer, q[:, part], k[:, part], v[:, part], state, few)
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return y, state if keep_state else None

    def convert(self, layer: KVLayer, state: KVState) -> BlockState:
        """See `Policy.convert`."""
        if state.length and self.needs and not self.budget.everything:
            raise InputError(
                f"{type(self).__name__} finds the tokens that represent a block by the queries that followed them, and "
                "a state does not hold those; attach the policy before reading, or take representatives=page"
            )
        paged = super().convert(layer, state)
        after = BlockState(paged.kv, paged.summary, offloaded=paged.offloaded, length=paged.length)
        if self.budget.everything:
            return after
        count = min(self.latest, state.length)
        scores = torch.zeros(
            *state.keys.shape[:2], count, dtype=working_dtype(state.keys.dtype), device=state.keys.device
        )
        self._represent(layer, after.summary, after.kv, 0, scores)
        return dataclasses.replace(after, scores=scores)

    def _step(
        self, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, state: ReadState, mask: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        """The answer of a chunk of queries, or of one, that read the same blocks, and the state after them."""
        batch = len(q)
        before = state.length
        after = self._extended(layer, state, q, k, v, mask)
        first = dataclasses.replace(after, length=before + 1)  # they choose among what the first of them may
        with torch.no_grad():
            if state.query is not None:
                wants = self._at_window(layer, state.query[:, None], before - 1)
            else:
                wants = self._at_window(layer, q, before)
                wants = wants if mask is None else wants * mask[..., None, None]
            pages = self._pages(layer, wants.sum(1) if layer.cap is None else wants.mean(1), first)
        among = self._candidates(first.length)[0]
        if pages is None:  # all of them fit, and are clipped all the same
            pages = torch.arange(among, device=q.device).expand(batch, layer.kv_heads, -1)
            if after.kv.padded:
                read = first.length - after.kv.start.to(q.device) - int(self.ahead)
                mine = row_candidates(read, self.window, self.segment, self.page)[0][:, None, None]
                pages = pages.masked_fill(pages >= mine, -1)
        y, tokens = self._clipped(layer, q, after, pages)
        read_nbytes = self.token_nbytes(layer, tokens, batch, k.dtype)
        read_nbytes += self.summary_nbytes(layer, among * self.page, batch, k.dtype)
        query = q[:, -1].detach().clone() if self.ahead else None
        return y, dataclasses.replace(after, query=query, read_tokens=tokens, read_nbytes=read_nbytes)

    def _extended(
        self, layer: KVLayer, state: ReadState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> BlockState:
        assert isinstance(state, BlockState)
        after = super()._extended(layer, state, q, k, v, mask)
        assert isinstance(after, BlockState)
        if after.scores is None:
            return after
        scores = self._scored(layer, after.scores, q, after.kv)  # those before are still as they were
        self._represent(layer, after.summary, after.kv, state.length, scores)
        return dataclasses.replace(after, scores=own(scores[:, :, -self.latest :]))

    def _summarise(self, layer: KVLayer, summary: dict[str, Tensor], kv: KVState, before: int) -> None:
        """See `SelectivePolicy._summarise`: not when a block is complete, but when it leaves the window."""

    @torch.no_grad()
    def _scored(self, layer: KVLayer, scores: Tensor, q: Tensor, kv: KVState) -> Tensor:
        """The scores [B, Hkv, n] of the last tokens before the queries q [B, T, H, D], and of theirs, with these."""
        count, before = q.shape[1], scores.shape[2]
        wide = working_dtype(q.dtype)
        keys = kv.keys[:, :, kv.length - count - before : kv.length].to(q.device, wide)
        summed = (q.to(wide) * layer.scale).unflatten(2, (layer.kv_heads, -1)).sum(3).transpose(1, 2)
        upto = torch.nn.functional.pad(summed.cumsum(2), (0, 0, 1, 0))  # [B, Hkv, T + 1, D]: the first t queries
        place = torch.arange(-before, count, device=q.device)  # of each token, from the first query's
        after, last = (place + 1).clamp_min(0), (place + 1 + self.window).clamp(0, count)
        got = (keys * (upto.index_select(2, last) - upto.index_select(2, after))).sum(-1)
        return torch.cat((scores, scores.new_zeros(*scores.shape[:2], count)), 2) + got / self.window

    @torch.no_grad()
    def _represent(self, layer: KVLayer, summary: dict[str, Tensor], kv: KVState, before: int, scores: Tensor) -> None:
        """Write the summaries of the blocks that left the window since `before` tokens were read.

        scores: [B, Hkv, n] of the last tokens; as many as these blocks hold, where they count.
        """
        batch, kv_heads, capacity, _ = kv.keys.shape
        late, page, device = int(self.ahead), self.page, scores.device
        if not kv.padded:
            first, last = (candidates(n - late, self.window, page, page)[0] for n in (before, kv.length))
            if last == first:
                return
            start = torch.zeros(batch, dtype=torch.int64, device=device)
            at = torch.arange(first, last, device=device).expand(batch, -1)
        else:  # each row as many as one may have; those that have not left it are never read, and written again
            start = kv.start.to(device)
            done = row_candidates(before - late - start, self.window, page, page)[0]
            at = done[:, None] + torch.arange((kv.length - before) // page + 1, device=device)
        slots = (start[:, None, None] + at[..., None] * page + torch.arange(page, device=device)).flatten(1)
        slots = slots.clamp_max(capacity - 1)
        keys = fetched(kv.keys, slots[:, None].expand(-1, kv_heads, -1), device)
        if layer.turn is not None:  # as if all stood at the row's start
            keys = layer.turn(keys.transpose(1, 2), -slots[..., None]).transpose(1, 2)
        keys = keys.unflatten(2, (-1, page))
        if self.representatives < page:
            index = (slots - (kv.length - scores.shape[2])).clamp(0, scores.shape[2] - 1)
            judged = scores.gather(2, index[:, None].expand(-1, kv_heads, -1)).unflatten(2, (-1, page))
            chosen = best(judged, self.representatives)
            keys = keys.gather(3, chosen[..., None].expand(*chosen.shape, keys.shape[-1]))
        mean = self.summarise(keys)["mean"]
        summary["mean"].scatter_(2, at[:, None, :, None].expand(mean.shape), mean)

    def _at_window(self, layer: KVLayer, q: Tensor, first: int) -> Tensor:
        """Queries [B, T, H, D] of the slots first .., as if they stood `window` after a row's start."""
        if layer.turn is None:
            return q
        return layer.turn(q, (self.window - first - torch.arange(q.shape[1], device=q.device))[None, :, None])

    def _from_start(self, layer: KVLayer, x: Tensor, kv: KVState) -> Tensor:
        return x  # it does not depend on the padding already

    def _clipped(self, layer: KVLayer, q: Tensor, state: ReadState, pages: Tensor) -> tuple[Tensor, int]:
        """The answer [B, T, H, V] of the last tokens from some pages and the latest ones, and how many the last read.

        No rotary distance is larger than the window.
        """
        count, kv_heads, shared = q.shape[1], layer.kv_heads, layer.heads // layer.kv_heads
        slots, _, seen = self._chosen(state, pages, count)
        keys, values = (fetched(x, slots, q.device) for x in (state.kv.keys, state.kv.values))
        values = values_of(keys, values)
        at = torch.arange(state.length - count, state.length, device=q.device)
        split = pages.shape[2] * self.page  # what is before it is distant for all queries ..
        away = (at[:, None] - slots[:, :1, None, split:])[:, :, None]  # [B, 1, 1, T, n], of the latest tokens
        some = min(self.latest - self.window + count - 1, away.shape[-1])  # .. and of these the first, for some

        def scored(queries: Tensor, of: Tensor) -> Tensor:  # [B, Hkv, G, T, n]
            grouped = (queries * layer.scale).unflatten(2, (kv_heads, shared)).permute(0, 2, 3, 1, 4)
            return capped(grouped.flatten(2, 3) @ of.mT, layer.cap).unflatten(2, (shared, count))

        near = scored(q, keys[:, :, split:])
        if layer.turn is None:
            far = scored(q, keys[:, :, :split])
        else:
            back = layer.turn(keys[:, :, : split + some].transpose(1, 2), -slots[:, :, : split + some].transpose(1, 2))
            far, clipped = scored(self._at_window(layer, q, state.length - count), back.transpose(1, 2)).tensor_split(
                (split,), -1
            )
            clipped = torch.where(away[..., :some] > self.window, clipped, near[..., :some])
            near = torch.cat((clipped, near[..., some:]), -1)
        if layer.slopes is not None:
            slope = layer.slopes.to(q).unflatten(0, (kv_heads, shared))[..., None, None]
            far = far - (at[:, None] - slots[:, :, None, None, :split]) * slope
            near = near - away * slope
        hidden = away < 0
        if seen is not None:
            far = far.masked_fill(~seen[:, :, None, None, :split], -math.inf)
            hidden = hidden | ~seen[:, :1, None, None, split:]
        weights = torch.cat((far, near.masked_fill(hidden, -math.inf)), -1).softmax(-1, dtype=working_dtype(q.dtype))
        if seen is not None:  # padding sees nothing
            weights = weights.nan_to_num(0.0)
        y = (weights.to(values.dtype).flatten(2, 3) @ values).unflatten(2, (shared, count))
        return y.permute(0, 3, 1, 2, 4).flatten(2, 3), min(slots.shape[2], state.length)
