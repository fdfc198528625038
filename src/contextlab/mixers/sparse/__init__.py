"""Attention that chooses, for each query, which keys it reads."""
