"""YAML from strangers: plain data only, bounded before it is built, no key twice."""

from __future__ import annotations

from typing import Any

import yaml

from contextlab.errors import InputError, first_line
from contextlab.spec import describe

LARGEST_TEXT = 1 << 20
MOST_VALUES = 20_000
DEEPEST = 40
MOST_MERGED = 16
"""Mappings that one `<<` may merge; each may hold `MOST_VALUES` keys at most."""
MERGE = "tag:yaml.org,2002:merge"


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text, None of an empty one. source: what it is of, for messages.

    Raises InputError in one line when it is not YAML, too large, nested too deeply or has a key twice.
    """
    if len(text) > LARGEST_TEXT:
        raise InputError(f"{source}: {len(text)} characters; expected at most {LARGEST_TEXT}")
    loader = None
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except _Refused as refused:
        raise InputError(f"{source}: {refused}") from None
    except RecursionError:
        raise InputError(f"{source}: nested more than {DEEPEST} levels deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{source}: not valid YAML{where}: {' '.join(str(problem).split())[:200]}") from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # What PyYAML says of values that are not what their tag or look promises, such as !!bool maybe or 2001-13-45.
        raise InputError(f"{source}: a value cannot be read ({first_line(error)[:200]})") from None
    finally:
        if loader is not None:
            loader.dispose()
    check_tree(value, source)
    return value


def check_tree(value: Any, source: str) -> None:
    """Refuse data of too many values or levels; aliases can make a small text stand for a huge tree.

    Raises InputError. It walks with a bound, before anything else does.
    """
    stack, values = [(value, 1)], 0
    while stack:
        item, depth = stack.pop()
        values += 1
        if values > MOST_VALUES:
            raise InputError(f"{source}: stands for more than {MOST_VALUES} values; a recipe is far smaller")
        if depth > DEEPEST:
            raise InputError(f"{source}: nested more than {DEEPEST} levels deep")
        if isinstance(item, dict):
            stack.extend((each, depth + 1) for pair in item.items() for each in pair)
        elif isinstance(item, list | tuple | set):
            stack.extend((each, depth + 1) for each in item)


class _Refused(Exception):
    """Why a text is not read on."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which counts while it reads and refuses a key that stands twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._values += 1
        self._depth += 1
        if self._values > MOST_VALUES:
            raise _Refused(f"stands for more than {MOST_VALUES} values; a recipe is far smaller")
        if self._depth > DEEPEST:
            raise _Refused(f"nested more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        for key, value in node.value:
            merged = key.tag == MERGE and isinstance(value, yaml.SequenceNode)
            if merged and len(value.value) > MOST_MERGED:
                raise _Refused(f"merges more than {MOST_MERGED} mappings into one")
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise _Refused(f"stands for more than {MOST_VALUES} values; a recipe is far smaller")

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key_node, _ in node.value:
                if isinstance(key_node, yaml.ScalarNode) and key_node.tag != MERGE:
                    key = self.construct_object(key_node)
                    if key in seen:
                        place = key_node.start_mark
                        raise _Refused(
                            f"line {place.line + 1}, column {place.column + 1}: the key {describe(key)} stands twice "
                            "in one mapping; remove one of them"
                        )
                    seen.add(key)
        return super().construct_mapping(node, deep)
