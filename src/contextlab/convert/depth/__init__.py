"""Conversions of a model's depth: blocks dropped, merged, repeated, added."""
