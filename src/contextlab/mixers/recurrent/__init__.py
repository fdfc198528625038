"""Recurrent networks with gates, element by element or with matrices between the steps."""
