"""Conversions of attention to mixers of constant state, each a small file over the engine in `convert.transfer`."""
