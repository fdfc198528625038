"""Conversions that store weights in fewer bits: linear layers get another form."""
