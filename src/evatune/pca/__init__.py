"""Streaming principal component analysis on torch tensors; knows nothing of models."""

from evatune.pca.streaming import StreamingPCA

__all__ = ["StreamingPCA"]
