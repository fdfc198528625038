"""The probes, one instrument a file: each measures one thing inside a trained model (see `contextlab.inspect.look`)."""

from contextlab.inspect.probes import heads, linear

__all__ = ["heads", "linear"]
