"""Blocks: a mixer and an MLP with their norms and residual connections, and what blocks share with one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers.base import Mixer
from contextlab.mixers.layers import Linear, RMSNorm, multiplications
from contextlab.mixers.softmax.attention import Attention
from contextlab.mixers.softmax.shared import SharedKeys
from contextlab.mixers.static.none import NoMixer
from contextlab.models.mlp import Mlp, build_mlp
from contextlab.models.routing import Router
from contextlab.models.spec import LayerSpec, MlpSpec, ModelSpec
from contextlab.state import State


class Residual(nn.Module):
    """x and f(x) in one: plain, with LAuReL's learned weights and low-rank map (2411.07501, section 2), or f(x) alone.

    The weights are 2 softmax(w) and B starts at zero, so that every kind starts as the plain residual.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.skip = spec.residual != "none"
        weighted = spec.residual in ("laurel_rw", "laurel")
        self.weights = nn.Parameter(torch.zeros(2)) if weighted else None
        low_rank = spec.residual in ("laurel_lr", "laurel")
        self.down = Linear(spec.width, spec.residual_rank) if low_rank else None
        self.up = Linear(spec.residual_rank, spec.width) if low_rank else None
        if self.up is not None:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        """x [B, T, D], the stream; fx [B, T, D], what the sub-layer made of it -> the stream after it [B, T, D]."""
        if not self.skip:
            return fx
        if self.down is not None and self.up is not None:
            x = x + self.up(self.down(x))
        if self.weights is None:
            return x + fx
        a, b = 2 * self.weights.softmax(0)
        return b * x + a * fx

    def flops(self, length: int) -> int:
        return 0 if self.down is None else 4 * length * multiplications(self.down)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); or both added to the same x when the spec's block is parallel.

    Where the layer says so (`skip`), a router sends only some tokens through.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, source: LayerSpec) -> None:
        super().__init__()
        self.reads_shared = layer.kv == "shared"
        self.parallel = spec.block == "parallel"
        normed = self.parallel or layer.mixer != "none"
        self.mixer_norm = make_norm(spec, spec.width) if normed else nn.Identity()
        self.mixer = make_mixer(spec, layer, spec.width, source)
        self.mixer_residual = Residual(spec)
        self.mlp = make_mlp(spec, layer)
        self.mlp_norm = make_norm(spec, spec.width) if self.mlp is not None and not self.parallel else None
        self.mlp_residual = Residual(spec) if self.mlp is not None and not self.parallel else None
        self.router = None if layer.skip is None else Router(spec.width, layer.skip)

    def forward(
        self,
        x: Tensor,
        state: State | None,
        mask: Tensor | None,
        keep_state: bool,
        embedded: Tensor,
        tokens: Tensor | None,
    ) -> tuple[Tensor, State | None]:
        """x [B, T, D] -> the stream after the block [B, T, D], and the mixer's state.

        mask: [B, T] bool, where there are tokens. embedded: [B, T, D], the stack's input. tokens: [B, T] int64, the
            ids; None where the model reads vectors.
        """
        if self.router is not None:
            return self.router(self._through, x, state, mask, keep_state, tokens)
        return self._through(x, state, mask, keep_state, tokens)

    def _through(
        self, x: Tensor, state: State | None, mask: Tensor | None, keep_state: bool, tokens: Tensor | None
    ) -> tuple[Tensor, State | None]:
        """`forward` of tokens that go through."""
        normed = self.mixer_norm(x)
        y, state = self.mixer(normed, state, mask, keep_state, tokens)
        if self.mlp is None:
            return self.mixer_residual(x, y), state
        if self.mlp_norm is None or self.mlp_residual is None:
            return self.mixer_residual(x, y + self.mlp(normed)), state
        x = self.mixer_residual(x, y)
        return self.mlp_residual(x, self.mlp(self.mlp_norm(x))), state

    def remember(
        self, x: Tensor, state: State | None, mask: Tensor | None, embedded: Tensor, tokens: Tensor | None
    ) -> State | None:
        """The mixer's state after tokens x [B, T, D] whose outputs are not asked for; arguments as of `forward`."""
        if self.router is not None:
            return self(x, state, mask, True, embedded, tokens)[1]
        return self.mixer.remember(self.mixer_norm(x), state, mask, tokens)

    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of one forward over `length` tokens, of which as many as its router's share go through."""
        parts = [self.mixer, self.mixer_residual, self.mlp, self.mlp_residual]
        count = length if self.router is None else self.router.skip.chosen(length)
        routing = 0 if self.router is None else self.router.flops(length)
        return routing + sum(part.flops(count) for part in parts if part is not None)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """The bytes of the state after `length` tokens: exact, but with a router the most that they can be."""
        if self.router is None:
            return self.mixer.state_nbytes(length, batch, dtype)
        return self.mixer.state_nbytes(self.router.skip.most(length), batch, dtype) + 8 * batch

    @property
    def reads_forward(self) -> bool:
        """Whether padding on the right of a row changes no answer."""
        return self.mixer.reads_forward and not (self.router is not None and self.training)


class InputBody(nn.Module):
    """mlp(norm(mixer(norm([x, input])))): the part of a `with_input` block that its uses can share."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        wide = 2 * spec.width
        self.mixer_norm = make_norm(spec, wide)
        self.mixer = make_mixer(spec, layer, wide, layer)
        self.narrow = Linear(wide, spec.width)
        self.mlp = make_mlp(spec, layer)
        self.mlp_norm = make_norm(spec, spec.width) if self.mlp is not None else None


class InputBlock(nn.Module):
    """x + L body([x, input]), as Zamba's global layers (2405.16712); the body may be shared, L is each use's own.

    In Zamba L's output goes into the next Mamba layer only; here it joins the residual stream.
    """

    reads_shared = False
    router = None

    def __init__(self, spec: ModelSpec, body: InputBody) -> None:
        super().__init__()
        self.body = body
        self.out_proj = Linear(spec.width, spec.width)

    @property
    def mixer(self) -> Mixer:
        return self.body.mixer

    def forward(
        self,
        x: Tensor,
        state: State | None,
        mask: Tensor | None,
        keep_state: bool,
        embedded: Tensor,
        tokens: Tensor | None,
    ) -> tuple[Tensor, State | None]:
        """x [B, T, D] -> the stream after the block [B, T, D], and the mixer's state.

        mask: [B, T] bool, where there are tokens. embedded: [B, T, D], the stack's input. tokens: [B, T] int64, the
            ids; None where the model reads vectors.
        """
        body = self.body
        y, state = body.mixer(body.mixer_norm(torch.cat((x, embedded), -1)), state, mask, keep_state, tokens)
        y = body.narrow(y)
        if body.mlp is not None and body.mlp_norm is not None:
            y = body.mlp(body.mlp_norm(y))
        return x + self.out_proj(y), state

    def remember(
        self, x: Tensor, state: State | None, mask: Tensor | None, embedded: Tensor, tokens: Tensor | None
    ) -> State | None:
        """The mixer's state after tokens x [B, T, D] whose outputs are not asked for; arguments as of `forward`."""
        body = self.body
        return body.mixer.remember(body.mixer_norm(torch.cat((x, embedded), -1)), state, mask, tokens)

    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of one forward over `length` tokens."""
        body = self.body
        mlp = 0 if body.mlp is None else body.mlp.flops(length)
        matrices = multiplications(body.narrow) + multiplications(self.out_proj)
        return body.mixer.flops(length) + mlp + 2 * length * matrices

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """The exact bytes of the state after `length` tokens."""
        return self.mixer.state_nbytes(length, batch, dtype)

    @property
    def reads_forward(self) -> bool:
        """Whether padding on the right of a row changes no answer."""
        return self.mixer.reads_forward


def make_blocks(spec: ModelSpec, done: Callable[[int, nn.Module], None] | None = None) -> nn.ModuleList:
    """The blocks of a spec in order; layers with the same `share` are one block, or one body of several.

    done: called with each block's number and the block when it is made, before the next one is.
    """
    pattern, sources = spec.pattern(), spec.sources()
    blocks: list[nn.Module] = []
    shared: dict[str, tuple[LayerSpec, nn.Module]] = {}
    for index, layer in enumerate(pattern):
        part: nn.Module
        if layer.share is not None and layer.share in shared:
            first, part = shared[layer.share]
            if first != layer:
                raise InputError(f"layers: the layers that share {layer.share!r} must be described alike")
        else:
            source = pattern[sources[index]]
            part = InputBody(spec, layer) if layer.with_input else Block(spec, layer, source)
            if layer.share is not None:
                shared[layer.share] = layer, part
        blocks.append(InputBlock(spec, part) if isinstance(part, InputBody) else part)
        if done is not None:
            done(index, blocks[-1])
    return nn.ModuleList(blocks)


def make_mixer(spec: ModelSpec, layer: LayerSpec, width: int, source: LayerSpec) -> Mixer:
    """The layer's mixer; the model's heads and relative position are its defaults.

    source: the layer that makes the keys and values, `layer` itself but for shared ones.
    """
    if layer.mixer == "none":
        return NoMixer(width)
    entry = registry.lookup("mixer", layer.mixer)
    known = {p.name for p in entry.parameters}
    options = {**source.options, **layer.options}
    defaults: dict[str, Any] = {}
    if "heads" in known and "head_dim" not in options:
        defaults["heads"] = spec.heads
    if "position" in known:
        known_positions = get_args(entry.options_model.model_fields["position"].annotation)
        wanted = "rope" if spec.position == "xpos" and "xpos" not in known_positions else spec.position
        defaults["position"] = wanted if wanted in known_positions else "none"
    if getattr(entry.factory, "reads_tokens", False) and spec.read_in != "token":
        raise InputError(f"layers: mixer {layer.mixer!r} reads token ids, but the model reads vectors")
    options = entry.check({"width": width, **defaults, **options})
    return SharedKeys(**options) if layer.kv == "shared" else entry.factory(**options)


def make_mlp(spec: ModelSpec, layer: LayerSpec) -> Mlp | None:
    """The layer's MLP, or None."""
    chosen: MlpSpec = layer.mlp or spec.mlp
    if chosen.kind == "none":
        return None
    return build_mlp(chosen.kind, width=spec.width, **{"ratio": spec.mlp_ratio, **chosen.options})


def make_norm(spec: ModelSpec, size: int) -> nn.Module:
    """The spec's normalisation of vectors of `size`."""
    if spec.norm == "none":
        return nn.Identity()
    if spec.norm == "rms":
        return RMSNorm(size, eps=spec.norm_eps)
    return nn.LayerNorm(size, eps=1e-5 if spec.norm_eps is None else spec.norm_eps)


class MatrixAtoms(nn.Module):
    """The matrices that the attention projections of all layers are made of (MASA, 2508.04581).

    q, k, v, out: [atoms, outputs, inputs].
    """

    def __init__(self, count: int, mixer: Attention) -> None:
        super().__init__()

        def draw(outputs: int, inputs: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, outputs, inputs).uniform_(-1, 1) * inputs**-0.5)

        inner, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        self.q, self.k, self.v = draw(inner, mixer.width), draw(keys, mixer.width), draw(keys, mixer.width)
        self.out = draw(mixer.width, inner)


class AtomLinear(nn.Module):
    """A linear layer whose matrix stacks, part by part, the sums of coefficient x atom.

    atoms: where the atoms are. parts: names of the atoms, for example ("q", "k", "v").
    """

    def __init__(self, atoms: MatrixAtoms, *parts: str) -> None:
        super().__init__()
        count = atoms.q.shape[0]
        self.coefficients = nn.Parameter(torch.randn(len(parts), count) * count**-0.5)
        self.parts = parts
        self._atoms = (atoms,)  # in a tuple, so that the atoms are no part of each layer

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs]."""
        atoms = (getattr(self._atoms[0], part) for part in self.parts)
        return torch.cat([torch.einsum("s,soi->oi", c, a) for c, a in zip(self.coefficients, atoms, strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight)


def share_atoms(spec: ModelSpec, blocks: nn.ModuleList) -> MatrixAtoms | None:
    """Make the projections of the "attention" layers from shared atoms, when the spec says so."""
    if spec.atoms is None:
        return None
    found: list[Attention] = [block.mixer for block in blocks if type(block.mixer) is Attention]
    if not found:
        raise InputError("atoms: no layer of mixer 'attention' makes keys and values; leave atoms out or add one")
    shapes = {(mixer.width, mixer.heads, mixer.kv_heads, mixer.head_dim) for mixer in found}
    if len(shapes) > 1 or any(mixer.qkv_proj.bias is not None for mixer in found):
        raise InputError("atoms: the attention layers must agree in width, heads, kv_heads and head_dim, without bias")
    atoms = MatrixAtoms(spec.atoms, found[0])
    for mixer in found:
        mixer.qkv_proj = AtomLinear(atoms, "q", "k", "v")  # type: ignore[assignment]
        mixer.out_proj = AtomLinear(atoms, "out")  # type: ignore[assignment]
    return atoms
