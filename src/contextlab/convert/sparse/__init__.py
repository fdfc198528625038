"""Conversions that set weights to zero."""
