"""Streaming principal component analysis on torch tensors; knows nothing of models."""

from evatune.pca.contract import AnyPCA, Snapshot
from evatune.pca.kinds import from_state
from evatune.pca.many import groups_of, learn_all, make_room, on_host, settle_all, snapshot_all
from evatune.pca.streaming import StreamingPCA

__all__ = [
    "AnyPCA",
    "Snapshot",
    "StreamingPCA",
    "from_state",
    "groups_of",
    "learn_all",
    "make_room",
    "on_host",
    "settle_all",
    "snapshot_all",
]
