"""Memories that are fitted to the tokens while these are read (test-time training and regression)."""
