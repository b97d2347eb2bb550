"""Collecting episodes of scripted policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evatune.errors import EvaError
from evatune.tasks.control import collecting
from evatune.tasks.control.collecting import collect_episodes
from evatune.tasks.control.environments import make_environment
from evatune.tasks.control.episodes import Episode, load_episodes


def same(ours: list[Episode], theirs: list[Episode]) -> bool:
    """Whether two lists hold the same episodes."""
    return len(ours) == len(theirs) and all(
        a.seed == b.seed and np.array_equal(a.states, b.states) and np.array_equal(a.actions, b.actions)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_the_data_set_is_one_of_minari(reach_episodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(reach_episodes))
    data = minari.load_dataset("reach-v3")
    assert data.total_episodes == 3
    assert data.total_steps == 600
    assert all(content.infos["success"].any() for content in data)
    environment = data.recover_environment()
    assert environment.reset(seed=1)[0].shape == (39,)


def test_played_again_the_same_happens(reach_episodes: Path) -> None:
    first = load_episodes(reach_episodes)[0]
    environment = make_environment("reach")
    observation, _ = environment.reset(seed=first.seed)
    for step in range(30):
        np.testing.assert_array_equal(observation, first.states[step])
        observation, reward, *_ = environment.step(first.actions[step])
        assert np.float32(reward) == first.rewards[step]


def test_a_larger_set_begins_with_the_smaller_one(reach_episodes: Path, tmp_path: Path) -> None:
    collect_episodes(["reach"], tmp_path, episodes=2)
    two = load_episodes(tmp_path)
    (collected,) = collect_episodes(["reach"], tmp_path, episodes=3)
    assert (collected.episodes, collected.attempts) == (3, 3)
    assert same(two, load_episodes(reach_episodes)[:2])
    assert same(load_episodes(tmp_path), load_episodes(reach_episodes))


def test_what_is_there_is_kept(reach_episodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_play", lambda *args, **options: pytest.fail("nothing is to be played"))
    (collected,) = collect_episodes(["reach"], reach_episodes, episodes=2)
    assert collected.episodes == 3
    assert collected.success_rate == 1.0
    assert collected.best_return >= collected.mean_return > 0


def interrupted_after(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the collecting be interrupted when the n-th episode has been played."""
    play, played = collecting._play, []

    def counted(*args: Any, **options: Any) -> Any:
        if len(played) == n:
            raise KeyboardInterrupt
        played.append(None)
        return play(*args, **options)

    monkeypatch.setattr(collecting, "_play", counted)


def test_an_interrupted_set_is_gone_on_with(
    reach_episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "N_WRITTEN_AT_ONCE", 1)
    with monkeypatch.context() as patched:
        interrupted_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            collect_episodes(["reach"], tmp_path, episodes=3)
    assert not (tmp_path / "reach-v3").exists()
    interrupted_after(1, monkeypatch)
    collect_episodes(["reach"], tmp_path, episodes=3)
    assert same(load_episodes(tmp_path), load_episodes(reach_episodes))


@pytest.mark.parametrize("damaged", ["main_data.hdf5", "metadata.json"])
def test_a_write_cut_short_is_begun_again(
    damaged: str, reach_episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "N_WRITTEN_AT_ONCE", 1)
    with monkeypatch.context() as patched:
        interrupted_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            collect_episodes(["reach"], tmp_path, episodes=3)
    path = tmp_path / ".reach-v3.growing" / "data" / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    collect_episodes(["reach"], tmp_path, episodes=3)
    assert same(load_episodes(tmp_path), load_episodes(reach_episodes))


def test_another_seed_or_noise_is_refused(reach_episodes: Path) -> None:
    with pytest.raises(EvaError, match=r"was collected with seed 0 and noise 0\.1, not 1 and 0\.1; choose another"):
        collect_episodes(["reach"], reach_episodes, episodes=2, seed=1)


def test_failures_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play, calls = collecting._play, []

    def sometimes(*args: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        return None if len(calls) == 1 else play(*args, **options)

    monkeypatch.setattr(collecting, "_play", sometimes)
    (collected,) = collect_episodes(["reach"], tmp_path, episodes=1)
    assert (collected.episodes, collected.attempts, collected.success_rate) == (1, 2, 0.5)
    assert load_episodes(tmp_path)[0].seed == calls[1]


def test_a_policy_that_never_succeeds_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "HOPELESS", 1)
    with pytest.raises(EvaError, match=r"policy of pick-place-v3 never succeeded in 1 attempts with noise 9.*use less"):
        collect_episodes(["pick-place"], tmp_path, episodes=1, noise=9.0)
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".lock"]


def test_one_failing_environment_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play = collecting._play
    monkeypatch.setattr(collecting, "HOPELESS", 1)
    monkeypatch.setattr(
        collecting, "_play", lambda e, name, **options: None if name == "push-v3" else play(e, name, **options)
    )
    with pytest.raises(EvaError, match="policy of push-v3 never succeeded"):
        collect_episodes(["push", "reach"], tmp_path, episodes=1)
    assert json.loads((tmp_path / "reach-v3" / "data" / "metadata.json").read_text())["total_episodes"] == 1


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    for processes in (1, 2):
        collect_episodes(["reach", "drawer-close"], tmp_path / str(processes), episodes=2, processes=processes)
    assert same(load_episodes(tmp_path / "1"), load_episodes(tmp_path / "2"))
