"""The law of packed documents, of mixers and of models: each is answered as if it stood alone, forward and backward.

Outside training, in which some layers add a term to the gradient that is a mean over the batch (balance of experts,
nearness of centroids).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.testing.law import Component, close, law, require
from contextlab.testing.mixers import allowed
from contextlab.testing.models import drawn
from contextlab.testing.readings import WIDTH, Reading

LENGTHS = (3, 0, 17, 1, 6)
"""Of the documents: unequal, so that they are read in several batches, one empty, one of a single token."""


def ends() -> Tensor:
    """cu_seqlens of such documents: [N + 1] int32, for the five of them N = 5."""
    return torch.tensor((0, *LENGTHS)).cumsum(0).int()


def hold_to_packed(
    module: nn.Module,
    x: Tensor,
    packed: Iterable[Callable[..., Any]],
    alone: Callable[..., Any],
    allowed: float,
) -> None:
    """Answers and gradients of each of `packed`, of x [1, T, D], against those of `alone`, of each document [1, t, D].

    Both return a tuple, of which the answer is the first.
    """
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]
    each = torch.cat([alone(document)[0] for document in x.split(LENGTHS, 1) if document.shape[1]], 1)
    weight = torch.randn_like(each)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True, materialize_grads=True)

    due = gradients(each)
    own = torch.zeros(x.shape[1], dtype=torch.bool)
    own[3:20] = True
    for read in packed:
        together = read(x)[0]
        close(together, each, allowed, "outputs of packed documents")
        for got, expected in zip(gradients(together), due, strict=True):
            close(got, expected, 10 * allowed, "gradients of packed documents")
        (reached,) = torch.autograd.grad(together[:, own].square().sum(), x)
        require(not bool(reached[:, ~own].any()), "a document's answers depend on another document")


@law("mixer", "packed", "Packed documents are answered as each alone, and none reaches another.")
def packed_documents(component: Component) -> None:
    """Forward and backward, with and without a state; what follows goes on from each document's own state."""
    mixer = component.build().double().eval()
    x, cu_seqlens = torch.randn(1, sum(LENGTHS), WIDTH, dtype=torch.float64), ends()
    within = allowed(mixer, Reading(x[:, :17], [], None), 1e-9, 1e-5)
    packed = [functools.partial(mixer, keep_state=keep, cu_seqlens=cu_seqlens) for keep in (False, True)]
    hold_to_packed(mixer, x, packed, mixer, within)
    if not mixer.causal:
        return
    with torch.no_grad():
        _, after = mixer(x, cu_seqlens=cu_seqlens)
        more = torch.randn(len(LENGTHS), 2, WIDTH, dtype=torch.float64)
        together, _ = mixer(more, after)
        for row, document in enumerate(x.split(LENGTHS, 1)):
            state = mixer(document)[1] if document.shape[1] else None
            close(together[row], mixer(more[row : row + 1], state)[0][0], within, "outputs after packed documents")


@law(
    "model",
    "packed",
    "Packed documents are answered as each alone, by cu_seqlens and by position_ids.",
    holds_for=drawn,
)
def packed_model(component: Component) -> None:
    """Forward and backward, and what follows each of them from the state."""
    model, cu_seqlens = component.build().eval(), ends()
    x = torch.randint(model.spec.output_size, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    documents = [document for document in x.split(LENGTHS, 1) if document.shape[1]]
    wanted = list(model.parameters())

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), wanted, materialize_grads=True)

    each, together = torch.cat([model(document) for document in documents], 1), model(x, cu_seqlens=cu_seqlens)
    close(together, each, what="outputs of packed documents")
    for got, expected in zip(gradients(together), gradients(each), strict=True):
        close(got, expected, 1e-8, "gradients of packed documents")
    with torch.no_grad():
        close(model(x, position_ids=places), each, what="outputs of documents told by position_ids")
        read, state = model.read(x, cu_seqlens=cu_seqlens)
        close(read, each, what="outputs of packed documents that leave a state")
        after, _ = model.read(x[:, :2].expand(len(LENGTHS), 2), state)
        alone, _ = model.read(x[:, :2], model.read(documents[-1])[1])
        close(after[-1:], alone, what="outputs after packed documents")
