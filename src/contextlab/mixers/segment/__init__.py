"""Attention within segments, with a memory handed from each segment to the next."""
