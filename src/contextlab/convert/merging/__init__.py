"""Conversions that make one model of several."""
