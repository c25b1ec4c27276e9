"""Penjing: from a trained network to a smaller, proven artifact."""

__version__ = "0.1.0"
