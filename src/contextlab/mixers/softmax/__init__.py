"""Softmax attention and its kin: scores of queries with the keys of all tokens or of a window."""
