"""Streaming principal component analysis on torch tensors; knows nothing of models."""

from evatune.pca.contract import AnyPCA, Look
from evatune.pca.kinds import from_state
from evatune.pca.many import groups_of, learn_all, look_all, make_room, on_host, settle_all
from evatune.pca.streaming import StreamingPCA

__all__ = [
    "AnyPCA",
    "Look",
    "StreamingPCA",
    "from_state",
    "groups_of",
    "learn_all",
    "look_all",
    "make_room",
    "on_host",
    "settle_all",
]
