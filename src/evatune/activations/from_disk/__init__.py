"""Measuring models that are larger than memory, one block after the other."""
