"""Reading episodes from disk."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evatune.errors import EvaError
from evatune.tasks.control.episodes import load_episodes


def test_a_folder_of_data_sets_or_one_of_them(reach_episodes: Path) -> None:
    ours, theirs = load_episodes(reach_episodes), load_episodes(reach_episodes / "reach-v3", limit=2)
    assert (len(ours), len(theirs)) == (3, 2)
    first = ours[0]
    assert first.environment == "reach-v3"
    assert (first.states.shape, first.actions.shape, len(first)) == ((200, 39), (200, 4), 200)
    assert first.total_return == pytest.approx(first.rewards.sum())
    assert np.abs(first.actions).max() <= 1
    np.testing.assert_array_equal(theirs[1].states, ours[1].states)


@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_file_cut_short_is_named(kept: float, reach_episodes: Path, tmp_path: Path) -> None:
    shutil.copytree(reach_episodes / "reach-v3", tmp_path / "reach-v3")
    path = tmp_path / "reach-v3" / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(EvaError, match=r"cannot read .*reach-v3: .*; it may be cut short"):
        load_episodes(tmp_path)


def test_what_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaError, match="holds no episodes: neither Minari data sets nor"):
        load_episodes(tmp_path)
    with pytest.raises(EvaError, match="missing holds no episodes"):
        load_episodes(tmp_path / "missing")


def test_a_data_set_of_another_environment_is_refused(reach_episodes: Path, tmp_path: Path) -> None:
    shutil.copytree(reach_episodes / "reach-v3", tmp_path / "other")
    path = tmp_path / "other" / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset_id": "D4RL/reacher-v2"}))
    with pytest.raises(EvaError, match=r"no environment 'reacher-v2' \(did you mean 'reach-v3'"):
        load_episodes(tmp_path)


def transitions(*, size: int = 39, episodes: int = 2, steps: int = 5, axis: bool = True) -> dict[str, np.ndarray]:
    """Transitions as Schmied et al. store them, with an axis for the one environment; the last episode is cut short."""
    chance, n = np.random.default_rng(0), episodes * steps + 2
    dones = np.zeros(n)
    dones[steps - 1 : episodes * steps : steps] = 1
    rows = {
        "observations": chance.standard_normal((n, size)),
        "next_observations": chance.standard_normal((n, size)),
        "actions": chance.uniform(-1, 1, (n, 4)),
        "rewards": chance.uniform(0, 1, n),
        "dones": dones,
    }
    return {name: values[:, None] for name, values in rows.items()} if axis else rows


@pytest.mark.parametrize("axis", [True, False])
def test_arrays_of_transitions_are_cut_at_the_ends_of_episodes(axis: bool, tmp_path: Path) -> None:
    content = transitions(axis=axis)
    np.savez(tmp_path / "hammer-v2.npz", **content)  # type: ignore[arg-type]
    first, second = load_episodes(tmp_path)
    assert len(load_episodes(tmp_path / "hammer-v2.npz")) == 2
    assert first.environment == "hammer-v3"
    assert (len(first), len(second), first.seed) == (5, 5, None)
    np.testing.assert_allclose(second.states, content["observations"].reshape(-1, 39)[5:10], rtol=1e-6)
    np.testing.assert_allclose(second.rewards, content["rewards"].reshape(-1)[5:10], rtol=1e-6)


class ReplayBuffer:
    """Like the class of a library that is not installed here."""

    def __init__(self, **content: Any) -> None:
        self.__dict__.update(content)


class Harmful:
    """What a malicious file may hold: something that runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickled_buffer_is_read_without_running_it(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    buffer = ReplayBuffer(**transitions(), device=Harmful(touched), observation_space=ReplayBuffer(), pos=3)
    with (tmp_path / "hammer-v2.pkl").open("wb") as file:
        pickle.dump(buffer, file)
    episodes = load_episodes(tmp_path, limit=1)
    assert [len(episode) for episode in episodes] == [5]
    assert not touched.exists()


def test_observations_of_another_size_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "hammer-v2.npz", **transitions(size=12))  # type: ignore[arg-type]
    with pytest.raises(EvaError, match=r"hammer-v2.npz holds observations of shape \(5, 12\) for 5 rewards; hammer-v3"):
        load_episodes(tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    content = transitions()
    content["rewards"][3] = np.nan
    np.savez(tmp_path / "hammer-v2.npz", **content)  # type: ignore[arg-type]
    with pytest.raises(EvaError, match="numbers that are not finite"):
        load_episodes(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "no key", "no end"])
def test_damaged_transitions_are_named(damage: str, tmp_path: Path) -> None:
    content, path = transitions(), tmp_path / "hammer-v2.npz"
    if damage == "no key":
        del content["dones"]
    if damage == "no end":
        content["dones"][:] = 0
    np.savez(path, **content)  # type: ignore[arg-type]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EvaError, match=r"hammer-v2.npz"):
        load_episodes(tmp_path)
