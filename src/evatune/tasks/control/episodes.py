"""Episodes: what happened at every step, and reading them from data sets on disk."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evatune.errors import EvaError
from evatune.tasks.control.environments import ACTION_SIZE, STATE_SIZE
from evatune.tasks.control.names import environment_names, is_environment

_METADATA = Path("data") / "metadata.json"
_SUFFIXES = (".npz", ".pkl", ".hdf5")
_ORDER = "episode_trjids.json"
"""A file beside files of one episode each, which numbers them."""


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
        source: a Minari data set; data of Schmied et al. (2024): a file of transitions that is named after its
            environment, `hammer-v2.npz`, or a folder of that name with one file an episode; or a folder of several.
        limit: read this many of each environment, the first ones.

    Raises:
        EvaError: there is nothing to read, a file is damaged, or observations or actions have another size.
    """
    source = Path(source).expanduser()
    paths = _data_sets(source)
    if not paths:
        unpacked = "; unpack it first" if ".tar" in source.suffixes else ""
        raise EvaError(f"{source} holds no episodes: neither Minari data sets nor .npz, .hdf5 or .pkl files{unpacked}.")
    episodes: list[Episode] = []
    for path in paths:
        found = _read(path, limit=limit)
        if not found:
            raise EvaError(f"{path} holds no complete episode.")
        episodes += found
    return episodes


def _data_sets(source: Path) -> list[Path]:
    """Return the data sets of a source, each of one environment."""
    if (source / _METADATA).is_file() or source.suffix in _SUFFIXES:
        return [source]
    files = _files(source)
    if files and not any(is_environment(file.stem) for file in files):
        return [source]
    folders = [path for path in source.glob("*") if path.is_dir() and not path.name.startswith(".")]
    return sorted([*files, *(path for path in folders if (path / _METADATA).is_file() or _files(path))])


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that may hold episodes, 2 before 10."""

    def parts(path: Path) -> list[tuple[int, str]]:
        return [(int(part or 0), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.stem)]

    return sorted((path for path in folder.glob("[!.]*") if path.suffix in _SUFFIXES), key=parts)


def _read(path: Path, *, limit: int | None) -> list[Episode]:
    read = _transitions if path.is_file() else _minari if (path / _METADATA).is_file() else _one_each
    try:
        return list(islice(read(path), limit))
    except EvaError:
        raise
    except Exception as error:  # h5py fails in many ways on a file that was cut short
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> EvaError:
    return EvaError(f"cannot read {path}: {' '.join(str(error).split()).rstrip('.')}; it may be cut short.")


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
    rows = _arrays(path, "observations", "actions", "rewards", "dones")
    start = 0
    for end in (np.flatnonzero(rows["dones"][:, 0]) + 1).tolist():
        part = {key: array[start:end] for key, array in rows.items()}
        yield _episode(path, name, part["observations"], part["actions"], part["rewards"])
        start = end


def _one_each(folder: Path) -> Iterator[Episode]:
    """Yield the episodes of a folder in the other layout of Schmied et al. (2024): one file an episode.

    A file holds `states`, `actions` and `rewards`, one row a step. The files come in the order that
    `episode_trjids.json` gives, else in that of their names.
    """
    files, name = _files(folder), folder.absolute().name
    if not is_environment(name):
        raise EvaError(
            f"neither {folder} nor {files[0].name} in it is named after an environment, as a folder with one file an "
            "episode must be, and a file of transitions: hammer-v2, for example."
        )
    (name,) = environment_names([name])
    if (folder / _ORDER).is_file():
        order = json.loads((folder / _ORDER).read_text(encoding="utf-8"))
        files.sort(key=lambda file: order.get(file.stem, len(order)))
    for path in files:
        rows = _arrays(path, "states", "actions", "rewards")
        yield _episode(path, name, rows["states"], rows["actions"], rows["rewards"])


def _arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Return the arrays of a file that have these names, each with one row a step."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                return _named(path, content, names)
        if path.suffix == ".hdf5":
            import h5py

            with h5py.File(path) as content:
                return _named(path, content, names)
        with path.open("rb") as file:
            content = _ArraysOnly(file).load()
        return _named(path, content if isinstance(content, dict) else vars(content), names)
    except EvaError:
        raise
    except Exception as error:  # zipfile, h5py and pickle fail in many ways on a file that was cut short
        raise _damaged(path, error) from error


def _named(path: Path, content: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    missing = [name for name in names if name not in content]
    if missing:
        raise EvaError(
            f"{path} holds no {' and no '.join(missing)}; it has {', '.join(map(str, content)) or 'nothing'}."
        )
    arrays = {name: np.asarray(content[name]) for name in names}
    return {name: array.reshape(len(array), -1) for name, array in arrays.items()}


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

    def __setitem__(self, name: Any, value: Any) -> None:
        self.__dict__[str(name)] = value  # it stands for a kind of dictionary


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
