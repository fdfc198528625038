"""The places of a model that have a name: what can be taken there (`capture`) or put there (`patch`).

Layers are counted from 0, those of a looped model over all its loops. Of layer N there are

    blocks.N.input, blocks.N.output         the residual stream before and after it, [B, T, D]
    blocks.N.mixer.input, .output           what its mixer reads (normed) and adds, [B, T, D]
    blocks.N.mixer.state                    what it remembers after the call, a `State`; of `Model.read` alone
    blocks.N.mixer.q, .k, .v, .heads, ...   what the mixer itself names (`Mixer.site`), [B, T, H, ...]
    blocks.N.mlp.input, .output, .units     likewise

and of the whole `embedded` (the read-in's vectors), `final` (what the read-out reads) and `logits`. The input and the
output of every module inside are places, too: blocks.0.mixer.in_proj.output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contextlab.errors import InputError, unknown
from contextlab.mixers.sites import Sited, Tap, tapped
from contextlab.spec import describe

ENDS = ("input", "output")
STATE = "state"
WHOLE = ("embedded", "final", "logits")
PROBED = 4
"""Tokens by which it is found what places a mixer names."""
THEIR_MIXERS = (
    "self_attn",
    "linear_attn",
    "attention",
    "attn",
    "mixer",
    "mamba",
    "temporal_block",
    "conv",
    "short_conv",
)
THEIR_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "ff", "moe")


@dataclass(frozen=True)
class Site:
    """One place.

    name: as it is asked for. module: whose place it is. point: "input", "output", "state", or what the module names.
    use: which of the module's calls in one reading is meant: layers may share a module.
    layers: that call it, in this order; none of what is no layer's.
    routed: whether it is inside a layer that some tokens skip (`LayerSpec.skip`).
    """

    name: str
    module: nn.Module
    point: str
    use: int = 0
    layers: tuple[int, ...] = ()
    routed: bool = False


class Layer(NamedTuple):
    """A layer and its parts, None where it has none."""

    name: str
    block: nn.Module
    mixer: nn.Module | None
    mlp: nn.Module | None

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of what the layer has."""
        for name, module in (("mixer", self.mixer), ("mlp", self.mlp)):
            if module is not None:
                yield f"{self.name}.{name}", module


class Plan:
    """Where a model has its layers, and how often a reading calls each module.

    read_in, read_out: of the whole. layers: in the order of the reading; one that is read in several loops stands here
    as often. Raises InputError where the model has none.
    """

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "heard"):
            raise InputError(
                f"inspect: expected a Model or a HuggingFaceModel (contextlab.models.load), got {type(model).__name__}"
            )
        self.read_in, self.read_out, self.layers = _ours(model) or _theirs(model)
        self.roots = {layer.name: layer.block for layer in self.layers}
        self.roots |= {name: module for layer in self.layers for name, module in layer.parts()}
        self.users: dict[int, list[str]] = {}
        for name, module in self.roots.items():
            self.users.setdefault(id(module), []).append(name)

    def site(self, name: str, root: str, point: str, inside: nn.Module | None = None) -> Site:
        """A place of a root, or of a module inside it."""
        module = self.roots[root]
        users = self.users[id(module)]
        layers = tuple(int(user.split(".")[1]) for user in users)
        block: Any = self.layers[int(root.split(".")[1])].block
        if getattr(block, "router", None) is None:
            return Site(name, module if inside is None else inside, point, users.index(root), layers)
        if point == STATE and inside is None:  # the layer's: its mixer is called for some rows at a time
            return Site(name, block, point)
        return Site(name, module if inside is None else inside, point, routed=module is not block)


Parts = tuple[nn.Module, nn.Module, list[Layer]]


def _ours(model: Any) -> Parts | None:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not hasattr(model, "spec"):
        return None
    found, spec = [], model.spec
    for number in range(len(blocks) * spec.loops):
        block: Any = blocks[number % len(blocks)]
        mlp = getattr(getattr(block, "body", block), "mlp", None)
        found.append(Layer(f"blocks.{number}", block, block.mixer, mlp))
    if spec.exit is not None and len({id(layer.mixer) for layer in found}) < len(found):
        raise InputError(
            "inspect: tokens leave this model early, and its layers share weights: no call can be told apart"
        )
    routed = [id(layer.block) for layer in found if getattr(layer.block, "router", None) is not None]
    if len(set(routed)) < len(routed):
        raise InputError(
            "inspect: tokens skip layers of this model that share weights: no call of these can be told apart"
        )
    return model.read_in, model.read_out, found


def _theirs(model: Any) -> Parts:
    inner = getattr(model, "model", model)
    config = inner.config.get_text_config() if hasattr(inner, "config") else None
    depth = getattr(config, "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    layers = next((each for each in lists if len(each) == depth), None) if depth else None
    if layers is None:
        expected = "expected a model of ours or of transformers with a list of layers"
        raise InputError(f"inspect: no layers are found in {type(inner).__name__}; {expected}")

    def part(layer: nn.Module, names: Iterable[str]) -> nn.Module | None:
        return next((each for each in (getattr(layer, name, None) for name in names) if each is not None), None)

    found = [
        Layer(f"blocks.{i}", layer, part(layer, THEIR_MIXERS), part(layer, THEIR_MLPS))
        for i, layer in enumerate(layers)
    ]
    return inner.get_input_embeddings(), inner.get_output_embeddings(), found


def sites(model: nn.Module, named: bool = True) -> dict[str, Site]:
    """Every place that has a name of its own, by name, in the order of the layers.

    The inputs and outputs of modules further inside (blocks.0.mixer.in_proj.output) are places, too, and not listed.
    named: with those that mixers and MLPs name themselves, for which the model reads a few tokens.
    Raises InputError where the model has no layers.
    """
    plan = Plan(model)
    places = _places(model, plan) if named else {}
    kept = getattr(getattr(model, "spec", None), "pool", None) is None  # a model that answers once keeps no state
    found = {"embedded": Site("embedded", plan.read_in, "output")}

    def add(root: str, point: str, name: str | None = None, inside: nn.Module | None = None) -> None:
        name = f"{root}.{point}" if name is None else name
        found[name] = plan.site(name, root, point, inside)

    for layer in plan.layers:
        add(layer.name, "input")
        for root, module in layer.parts():
            add(root, "input")
            for name, inside, point in places.get(id(module), ()):
                add(root, point, root + name, inside)
            if getattr(module, "causal", False) and kept and not getattr(layer.block, "reads_shared", False):
                add(root, STATE)
            add(root, "output")
        add(layer.name, "output")
    found["final"] = Site("final", plan.read_out, "input")
    found["logits"] = Site("logits", plan.read_out, "output")
    return found


def _places(model: nn.Module, plan: Plan) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """id of a mixer or MLP -> (name after its own, module, point) of each place that is named in it.

    They are found by reading a few tokens.
    """
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}

    def listening(root: nn.Module, path: str, part: Sited) -> Tap:
        def tap(name: str, value: Tensor) -> Tensor:
            told = (f".{path}.{name}" if path else f".{name}", part, name)
            names = found.setdefault(id(root), [])
            if told not in names:
                names.append(told)
            return value

        return tap

    with ExitStack() as stack:
        for root in {id(module): module for layer in plan.layers for _, module in layer.parts()}.values():
            stack.enter_context(tapped(root, partial(listening, root)))
        read_some(model)
    return found


_quiet = False


def quiet() -> bool:
    """Whether a model reads just to find its places, and nobody else is told."""
    return _quiet


@contextmanager
def unnoticed() -> Iterator[None]:
    """Within it nobody is told of what flows."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def probed(model: Any) -> int:
    """How many tokens of a model are read to find its places: as many as it can read where that is less."""
    return min(PROBED, getattr(getattr(model, "spec", None), "max_length", None) or PROBED)


@torch.no_grad()
def read_some(model: Any, keep_state: bool = False) -> None:
    """Read a few tokens, as a model that is not in training, unnoticed by what looks on.

    keep_state: as a text that may go on.
    """
    spec: Any = getattr(model, "spec", None)
    like = next(model.parameters())
    length = probed(model)
    tokens = torch.zeros(1, length, dtype=torch.int64, device=like.device)
    if spec is not None and spec.read_in == "vector":
        tokens = like.new_zeros(1, length, spec.input_size)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with unnoticed():
            model.read(tokens) if keep_state else model(tokens)
    finally:
        for module in training:
            module.training = True


def chosen(model: nn.Module, asked: str | Iterable[str], known: dict[str, Site] | None = None) -> dict[str, Site]:
    """The places that are asked for, by name; each is a name or a pattern.

    In a pattern `*` stands for one part of a name or a piece of it (blocks.*.mixer.state), `**` for any number of parts
    (blocks.0.**), and `*` alone for all places.
    known: the model's `sites`, where they are at hand. Raises InputError where there is none of this name, with the
    nearest.
    """
    names = [asked] if isinstance(asked, str) else list(asked) if isinstance(asked, Iterable) else [asked]
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"sites: expected names such as 'blocks.0.output', got {describe(name)}")
    if known is None:  # the model need not be read to find what every layer has
        known = sites(model, named=any(name.rpartition(".")[2] not in (*WHOLE, *ENDS, STATE) for name in names))
    found: dict[str, Site] = {}
    for name in names:
        matching = [each for each in known if name == "*" or _matches(each.split("."), name.split("."))]
        if name in known or not matching:
            found[name] = known[name] if name in known else _inside(model, name)
        else:
            found |= {each: known[each] for each in matching}
    return found


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _inside(model: nn.Module, name: str) -> Site:
    """The input or output of a module inside a layer, which is not listed."""
    path, _, point = name.rpartition(".")
    plan = Plan(model)
    root = next((each for each in sorted(plan.roots, key=len, reverse=True) if path.startswith(f"{each}.")), None)
    if root is not None and point in ENDS:
        try:
            return plan.site(name, root, point, plan.roots[root].get_submodule(path[len(root) + 1 :]))
        except AttributeError:  # no such module
            pass
    if any(sign in name for sign in "*?["):
        raise InputError(f"no site matches {name!r}; `contextlab inspect MODEL --sites` lists them")
    known = list(sites(model))
    if root is not None:
        inside = (path for path, _ in plan.roots[root].named_modules() if path)
        known = list({*known, *(f"{root}.{path}.{end}" for path in inside for end in ENDS)})
    raise InputError(unknown("site", name, known))
