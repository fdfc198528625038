"""Parameters that a training leaves as they are (`TrainSpec.freeze`), by patterns over their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from contextlab.errors import InputError, nearest


@contextmanager
def frozen(model: nn.Module, patterns: Sequence[str] | None) -> Iterator[None]:
    """Within, the parameters that a pattern names need no gradient; afterwards they are as before.

    They then have no optimiser state and no weight decay, either. Raises InputError as `to_freeze` does.
    """
    found = [each for each in to_freeze(model, patterns or ()) if each.requires_grad]
    for parameter in found:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in found:
            parameter.requires_grad_(True)


def to_freeze(model: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters that patterns such as "blocks.0.*" or "*.mlp.*" name; one that has several names by any of them.

    Raises InputError for a pattern that names none, with the nearest name, and where nothing would be trained.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {id(named[name]): named[name] for name in matching(patterns, named, "train.freeze", "parameter")}
    if patterns and all(id(each) in found or not each.requires_grad for each in named.values()):
        raise InputError(f"train.freeze: {', '.join(patterns)} freezes all parameters; leave some to be trained")
    return list(found.values())


def matching(patterns: Sequence[str], names: Iterable[str], where: str, what: str) -> list[str]:
    """The names that a pattern matches, in their order.

    where: the key that holds the patterns. what: a name is of. Raises InputError for a pattern that matches none.
    """
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            within = f"{pattern.rstrip('.')}.*"
            near = within if any(fnmatchcase(name, within) for name in known) else nearest(pattern, known)
            hint = f"; did you mean {near!r}?" if near else f" (such as {', '.join(known[:3])})"
            raise InputError(f"{where}: {pattern!r} matches no {what}{hint}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]
