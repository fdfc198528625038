"""Conversions that make the state of attention smaller, or its reach longer, most of them without training."""
