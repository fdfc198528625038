"""Another number of token ids for a model that is there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model


def resize(model: Model, count: int, mean: bool = True) -> None:
    """Give a model's embedding and read-out `count` token ids, in place; the spec says so, too.

    The first rows stay. mean: new ids start as the mean of the old ones, whose logits they then have on average;
    else they are drawn as in a new model.

    Raises InputError when the two differ in size or are no plain layers, as under an adapter.
    """
    spec, embedding, head = model.spec, model.read_in, model.read_out
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"new_num_tokens: expected a whole number of at least 1, got {count!r}")
    if spec.input_size != spec.output_size:
        raise InputError(
            f"resize_token_embeddings: the model reads {spec.input_size} token ids and predicts {spec.output_size}; "
            "only one that predicts what it reads can be resized"
        )
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise InputError(
            f"resize_token_embeddings: expected a plain embedding and head, got {type(embedding).__name__} and "
            f"{type(head).__name__}; resize before an adapter is put in"
        )
    new = ModelSpec.parse({**spec.model_dump(), "input_size": count, "output_size": count})
    drawn = 1.0 if not spec.tied else spec.width**-0.5
    embedding.weight = _rows(embedding.weight, count, mean, drawn)
    embedding.num_embeddings = count
    head.weight = embedding.weight if spec.tied else _rows(head.weight, count, mean, spec.width**-0.5)
    head.out_features = count
    if head.bias is not None:
        head.bias = _rows(head.bias, count, mean, 0.0)
    model.spec = new


def _rows(old: Tensor, count: int, mean: bool, drawn: float) -> nn.Parameter:
    """`count` rows, of which the first are those of `old` [N, ...]. drawn: the others' standard deviation."""
    with torch.no_grad():
        rows: Tensor = old[:count]
        more = count - len(rows)
        if more > 0:
            middle = old.float().mean(0, keepdim=True).to(old.dtype).expand(more, *old.shape[1:])
            added = middle if mean else torch.randn_like(middle) * drawn
            rows = torch.cat((rows, added))
        return nn.Parameter(rows.clone(), requires_grad=old.requires_grad)
