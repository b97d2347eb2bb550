"""Episodes: what happened at every step, and reading them from data sets on disk."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evatune.errors import EvaError
from evatune.tasks.control.environments import ACTION_SIZE, STATE_SIZE
from evatune.tasks.control.names import environment_names

_METADATA = Path("data") / "metadata.json"
_SUFFIXES = (".npz", ".pkl")


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One episode of T steps."""

    environment: str
    """Its name, for example `hammer-v3`."""
    states: np.ndarray
    """(T, 39): what was observed before each step."""
    actions: np.ndarray
    """(T, 4), in [-1, 1]."""
    rewards: np.ndarray
    """(T,): after each step."""
    seed: int | None = None
    """Seed of the goal position, where known."""

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def total_return(self) -> float:
        """Sum of the rewards."""
        return float(self.rewards.sum())


def load_episodes(source: str | Path, *, limit: int | None = None) -> list[Episode]:
    """Read episodes, environment after environment.

    Args:
        source: a Minari data set, a file of Schmied et al. (2024), `NAME.npz` or `NAME.pkl`, or a folder of several.
        limit: read this many of each environment, the first ones.

    Raises:
        EvaError: there is nothing to read, a file is damaged, or observations or actions have another size.
    """
    source = Path(source).expanduser()
    if (source / _METADATA).is_file() or source.suffix in _SUFFIXES:
        paths = [source]
    else:
        paths = sorted(path.parent.parent for path in source.glob(f"*/{_METADATA}"))
        paths += sorted(path for path in source.glob("*") if path.suffix in _SUFFIXES)
    if not paths:
        raise EvaError(f"{source} holds no episodes: neither Minari data sets nor .npz or .pkl files.")
    episodes: list[Episode] = []
    for path in paths:
        found = _read(path, limit=limit)
        if not found:
            raise EvaError(f"{path} holds no complete episode.")
        episodes += found
    return episodes


def _read(path: Path, *, limit: int | None) -> list[Episode]:
    try:
        return list(islice(_minari(path) if path.is_dir() else _transitions(path), limit))
    except EvaError:
        raise
    except Exception as error:  # h5py, zipfile and pickle fail in many ways on a file that was cut short
        raise EvaError(
            f"cannot read {path}: {' '.join(str(error).split()).rstrip('.')}; it may be cut short."
        ) from error


def _minari(path: Path) -> Iterator[Episode]:
    """Yield the episodes of a Minari data set."""
    try:
        from minari.dataset.minari_storage import MinariStorage
    except ModuleNotFoundError as error:
        raise EvaError(f"reading {path} needs the package {error.name}; run: pip install 'evatune[control]'.") from None
    metadata = json.loads((path / _METADATA).read_text(encoding="utf-8"))
    (name,) = environment_names([str(metadata["dataset_id"]).rpartition("/")[2]])
    storage = MinariStorage.read(path / "data")
    indices = range(storage.total_episodes)
    for facts, content in zip(storage.get_episode_metadata(indices), storage.get_episodes(indices), strict=True):
        yield _episode(
            path,
            name,
            content["observations"][: len(content["rewards"])],
            content["actions"],
            content["rewards"],
            seed=facts.get("seed"),
        )


def _transitions(path: Path) -> Iterator[Episode]:
    """Yield the episodes of a file of transitions in the layout of Schmied et al. (2024).

    It holds `observations`, `actions`, `rewards` and `dones`, one row a transition, with or without an axis of length 1
    for the environment. Rows after the last `done` are an incomplete episode, which is left out.
    """
    (name,) = environment_names([path.stem])
    if path.suffix == ".pkl":
        with path.open("rb") as file:
            content = vars(_ArraysOnly(file).load())
    else:
        content = dict(np.load(path, allow_pickle=False))
    rows = {key: np.asarray(content[key]) for key in ("observations", "actions", "rewards", "dones")}
    rows = {key: array.reshape(len(array), -1) for key, array in rows.items()}
    start = 0
    for end in (np.flatnonzero(rows["dones"][:, 0]) + 1).tolist():
        part = {key: array[start:end] for key, array in rows.items()}
        yield _episode(path, name, part["observations"], part["actions"], part["rewards"])
        start = end


def _episode(path: Path, name: str, states: Any, actions: Any, rewards: Any, *, seed: int | None = None) -> Episode:
    for what, array, size in (("observations", states, STATE_SIZE), ("actions", actions, ACTION_SIZE)):
        if array.shape != (len(rewards), size):
            raise EvaError(
                f"{path} holds {what} of shape {tuple(array.shape)} for {len(rewards)} rewards; {name} needs "
                f"({len(rewards)}, {size})."
            )
    arrays = [np.ascontiguousarray(array, dtype=np.float32) for array in (states, actions, np.ravel(rewards))]
    if not all(np.isfinite(array).all() for array in arrays):
        raise EvaError(f"{path} holds an episode with numbers that are not finite.")
    return Episode(environment=name, states=arrays[0], actions=arrays[1], rewards=arrays[2], seed=seed)


class _Inert:
    """Placeholder for any object of a pickle that is not an array; it stores the state and does nothing."""

    def __new__(cls, *args: Any, **options: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _ArraysOnly(pickle.Unpickler):
    """Reads the arrays of a pickled replay buffer; nothing else of the file is imported or run."""

    # What NumPy's arrays are rebuilt with, under the names of NumPy 1 and 2. None of them runs code from the file.
    _REBUILD = frozenset({"_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._REBUILD:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        return _Inert
