"""Sizes and counts in words."""

from __future__ import annotations

import pytest

from contextlab.words import bytes_in_words, count_in_words, flat


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (4096, "4 KiB"),
        (1023 << 10, "1023 KiB"),
        (114_400, "111.7 KiB"),
        (3 << 40, "3 TiB"),
        (1 << 60, "1 EiB"),
    ],
)
def test_bytes_in_words(size, words):
    assert bytes_in_words(size) == words


@pytest.mark.parametrize(
    ("count", "words"), [(12, "12"), (999.4, "999"), (213_000, "213 k"), (999_600, "1 M"), (2_500_000_000, "2.5 G")]
)
def test_count_in_words(count, words):
    assert count_in_words(count) == words


def test_flat_names_nested_keys():
    record = {"a": {"b": 1, "c": [1, 2]}, "gpu": [{"name": "x", "memory": 2}], "d": "", "e": None}
    assert flat(record) == [("a.b", "1"), ("a.c", "1, 2"), ("gpu", "name: x, memory: 2"), ("d", "none"), ("e", "None")]
