"""moelm: train, compare and understand Mixture-of-Experts language models. Importing it starts nothing."""

__version__ = "0.1.0"
