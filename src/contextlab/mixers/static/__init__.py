"""Mixing by fixed places: convolutions, shifts, n-grams."""
