"""Mixers that read both ways and keep no state."""
