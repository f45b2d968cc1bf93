"""Zeroth-order training of language models, alone or together, replayable bit for bit."""

__version__ = "0.1.0"
