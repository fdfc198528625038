"""The short convolution is short."""

from __future__ import annotations

import pytest

from contextlab import build_mixer
from contextlab.errors import InputError


@pytest.mark.parametrize("name", ["gla", "mamba2", "attention"])
def test_a_short_convolution_over_a_million_tokens_is_refused(name):
    with pytest.raises(InputError, match="short convolution over 1000000 tokens: at most 4096"):
        build_mixer(name, width=16, heads=2, short_conv=10**6)
