"""Conversions that make weights of small rank."""
