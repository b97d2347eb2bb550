"""Reading episodes from disk."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import h5py
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


def one_file_each(folder: Path, *, suffix: str, episodes: int) -> list[np.ndarray]:
    """Write files of one episode each, as the later code of Schmied et al. reads them; return the states."""
    folder.mkdir(parents=True)
    chance, written = np.random.default_rng(0), []
    for number in range(episodes):
        rows = {
            "states": chance.standard_normal((5, 39)).astype(np.float32),
            "actions": chance.uniform(-1, 1, (5, 4)),
            "rewards": chance.uniform(0, 1, 5),
            "returns_to_go": np.zeros(5),
            "dones": np.array(True),
        }
        path = folder / f"{number}{suffix}"
        if suffix == ".npz":
            np.savez_compressed(path, **rows)  # type: ignore[arg-type]
        elif suffix == ".hdf5":
            with h5py.File(path, "w") as file:
                for name, values in rows.items():
                    file[name] = values
        else:
            path.write_bytes(pickle.dumps(defaultdict(list, rows)))
        written.append(rows["states"])
    return written


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".pkl"])
def test_folders_with_one_file_an_episode(suffix: str, tmp_path: Path) -> None:
    states = one_file_each(tmp_path / "hammer-v2", suffix=suffix, episodes=11)
    one_file_each(tmp_path / "push", suffix=suffix, episodes=1)
    both = load_episodes(tmp_path)
    assert [episode.environment for episode in both] == ["hammer-v3"] * 11 + ["push-v3"]
    np.testing.assert_array_equal(both[10].states, states[10])  # 10 comes after 9
    assert (both[0].actions.shape, both[0].rewards.shape) == ((5, 4), (5,))
    order = {str(number): 10 - number for number in range(11)}
    (tmp_path / "hammer-v2" / "episode_trjids.json").write_text(json.dumps(order))
    (first,) = load_episodes(tmp_path / "hammer-v2", limit=1)
    np.testing.assert_array_equal(first.states, states[10])


def test_one_file_an_episode_says_which_is_wrong(tmp_path: Path) -> None:
    one_file_each(tmp_path / "hammer-v2", suffix=".npz", episodes=2)
    path = tmp_path / "hammer-v2" / "1.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    with pytest.raises(EvaError, match=r"cannot read .*hammer-v2/1\.npz: .*; it may be cut short"):
        load_episodes(tmp_path)
    np.savez(path, states=np.zeros((5, 39)), rewards=np.zeros(5))
    with pytest.raises(EvaError, match=r"1\.npz holds no actions; it has states, rewards\."):
        load_episodes(tmp_path)
    np.savez(path, states=np.zeros((5, 39)), actions=np.zeros((5, 6)), rewards=np.zeros(5))
    with pytest.raises(EvaError, match=r"1\.npz holds actions of shape \(5, 6\) for 5 rewards; hammer-v3 needs"):
        load_episodes(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "hammer-v2").rename(tmp_path / "mine")
    with pytest.raises(EvaError, match=r"neither .*mine nor 0\.npz in it is named after an environment"):
        load_episodes(tmp_path)


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "hammer-v2.tar.gz"
    path.write_bytes(b"")
    with pytest.raises(EvaError, match=r"holds no episodes: .*; unpack it first\."):
        load_episodes(path)


def test_a_data_set_that_still_grows_is_left_out(reach_episodes: Path, tmp_path: Path) -> None:
    shutil.copytree(reach_episodes / "reach-v3", tmp_path / "reach-v3")
    shutil.copytree(reach_episodes / "reach-v3", tmp_path / ".reach-v3.growing")
    assert len(load_episodes(tmp_path)) == 3


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
