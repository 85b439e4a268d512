"""The device: what serves a model, watches it and updates it."""

__version__ = "0.1.0"
