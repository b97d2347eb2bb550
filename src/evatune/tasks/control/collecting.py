"""Collecting episodes of the scripted policies into Minari data sets.

Every environment gets a data set of its own, `FOLDER/NAME/data`, which Minari opens with `MINARI_DATASETS_PATH=FOLDER`.
Attempt i has the i-th seed, so a data set can be resumed and enlarged, and its first episodes are those of a smaller
one.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evatune.errors import EvaError
from evatune.tasks.control.environments import (
    ACTION_SIZE,
    environment_spec,
    episode_seed,
    make_environment,
    quiet,
    scripted_policy,
)
from evatune.tasks.control.names import environment_names

N_WRITTEN_AT_ONCE = 25
"""Episodes between two writes; an interruption loses at most these."""

HOPELESS = 50
"""Attempts without a single success after which a policy is given up."""

ATTEMPTS_AN_EPISODE = 10
"""Collecting stops after this many attempts for each episode that is wanted."""


_KEY = "collected"


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The episodes of one environment that a data set holds; all of them have succeeded."""

    environment: str
    """Its name."""
    episodes: int
    """Episodes in the data set."""
    attempts: int
    """Episodes that were played for them."""
    mean_return: float
    """Mean sum of the rewards of an episode."""
    best_return: float
    """The largest sum of rewards."""

    @property
    def success_rate(self) -> float:
        """Share of the attempts that succeeded."""
        return self.episodes / self.attempts


def collect_episodes(
    names: Iterable[str],
    folder: str | Path,
    *,
    episodes: int,
    noise: float = 0.1,
    seed: int = 0,
    processes: int = 1,
    tell: Callable[[Collected], object] = lambda _: None,
) -> list[Collected]:
    """Collect episodes that succeed, one data set an environment.

    A data set that is there already is kept, and enlarged if it is too small.

    Args:
        names: environments, or the groups `MT40` and `CW10`.
        folder: holds the data sets.
        episodes: wanted in each environment.
        noise: standard deviation of the noise on the policy's actions, which run from -1 to 1.
        seed: of goal positions and noise.
        processes: environments that are played at the same time.
        tell: called with what was collected whenever an environment is done.

    Returns:
        What each data set holds, in the order of the names.

    Raises:
        EvaError: there is no such environment, a data set of another seed or noise stands there, or a policy never
            succeeded; the other environments are finished and kept then.

    Cost: 0.1 to 0.6 s of one core an attempt.
    """
    wanted = environment_names(names)
    make_environment(wanted[0]).close()  # raise an error for a missing package before processes start
    folder = Path(folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    one = partial(_collect_one, folder=folder, episodes=episodes, noise=noise, seed=seed)
    results: dict[str, Collected] = {}
    errors: list[EvaError] = []
    with contextlib.ExitStack() as stack:
        outcomes: Iterable[Callable[[], Collected]] = [partial(one, name) for name in wanted]
        if processes > 1 and len(wanted) > 1:
            # A fork would copy threads of libraries in an unknown state.
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(min(processes, len(wanted)), mp_context=spawn))
            outcomes = (future.result for future in as_completed([pool.submit(one, name) for name in wanted]))
        for outcome in outcomes:
            try:
                result = outcome()
            except EvaError as error:
                errors.append(error)
            else:
                results[result.environment] = result
                tell(result)
    if errors:
        raise EvaError(" ".join(str(error) for error in errors))
    return [results[name] for name in wanted]


def _collect_one(name: str, *, folder: Path, episodes: int, noise: float, seed: int) -> Collected:
    """Collect in one environment, in a hidden folder that gets its final name when it is complete."""
    from filelock import FileLock

    final, growing = folder / name, folder / f".{name}.growing"
    with FileLock(folder / f".{name}.lock"):
        done = _progress(final)
        if done and (done["seed"], done["noise"]) != (seed, noise):
            raise EvaError(
                f"{final} was collected with seed {done['seed']} and noise {done['noise']:g}, not {seed} and "
                f"{noise:g}; choose another folder."
            )
        if done and len(done["returns"]) >= episodes:
            return _collected(name, done)
        if not _can_grow(growing, seed=seed, noise=noise):
            shutil.rmtree(growing, ignore_errors=True)
            if done:
                shutil.copytree(final, growing)
        progress = _grow(growing, name, episodes=episodes, noise=noise, seed=seed)
        shutil.rmtree(final, ignore_errors=True)
        growing.rename(final)
        return _collected(name, progress)


def _grow(folder: Path, name: str, *, episodes: int, noise: float, seed: int) -> dict[str, Any]:
    """Play until a data set has enough episodes, writing some at a time; return its progress."""
    progress = _progress(folder) or {"seed": seed, "noise": noise, "attempts": 0, "returns": []}
    environment = make_environment(name)
    waiting: list[Any] = []
    while len(progress["returns"]) < episodes and progress["attempts"] < episodes * ATTEMPTS_AN_EPISODE:
        if progress["attempts"] >= HOPELESS and not progress["returns"]:
            break
        with quiet():
            played = _play(
                environment, name, seed=episode_seed(seed, progress["attempts"], stream="train"), noise=noise
            )
        progress["attempts"] += 1
        if played is not None:
            waiting.append(played)
            progress["returns"].append(float(np.sum(played.rewards)))
        if len(waiting) == N_WRITTEN_AT_ONCE:
            _write(folder, environment, waiting, progress)
            waiting = []
    environment.close()
    if not progress["returns"]:
        raise EvaError(
            f"the scripted policy of {name} never succeeded in {progress['attempts']} attempts with noise {noise:g}, "
            "so no data set was written; use less noise."
        )
    _write(folder, environment, waiting, progress)
    return progress


def _play(environment: Any, name: str, *, seed: int, noise: float) -> Any:
    """Return one episode of the scripted policy as Minari's buffer, or None if it failed."""
    from minari.data_collector import EpisodeBuffer

    chance, policy = np.random.default_rng(seed), scripted_policy(name)
    observation, _ = environment.reset(seed=seed)
    observations, actions, rewards, successes, ended = [observation], [], [], [False], False
    while not ended:
        action = policy.get_action(observation.astype(np.float64)) + noise * chance.standard_normal(ACTION_SIZE)
        actions.append(np.clip(action, -1, 1).astype(np.float32))
        observation, reward, _, ended, info = environment.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        successes.append(info["success"])
    if not any(successes):
        return None
    last = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        seed=seed,
        observations=np.array(observations),  # type: ignore[arg-type]
        actions=np.array(actions),  # type: ignore[arg-type]
        rewards=np.array(rewards, dtype=np.float32),  # type: ignore[arg-type]
        terminations=np.zeros_like(last),  # type: ignore[arg-type]
        truncations=last,  # type: ignore[arg-type]
        infos={"success": np.array(successes)},
    )


def _write(folder: Path, environment: Any, played: list[Any], progress: dict[str, Any]) -> None:
    """Add episodes to a data set, which is made if needed."""
    import minari
    from minari.dataset.minari_storage import MinariStorage

    data = folder / "data"
    if data.is_dir():
        storage = MinariStorage.read(data)
    else:
        data.mkdir(parents=True)
        name = environment.get_wrapper_attr("environment_name")
        storage = MinariStorage.new(
            data, environment.observation_space, environment.action_space, environment_spec(name)
        )
        storage.update_metadata(
            {
                "dataset_id": name,
                "minari_version": minari.__version__,
                "algorithm_name": "Meta-World's scripted policy, failed episodes left out",
            }
        )
    storage.update_episodes(played)
    storage.update_metadata({_KEY: progress})


def _progress(folder: Path) -> dict[str, Any] | None:
    """Return the progress that a data set records; None if there is none, or it was not collected by evatune."""
    try:
        metadata = json.loads((folder / "data" / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return metadata.get(_KEY)


def _can_grow(folder: Path, *, seed: int, noise: float) -> bool:
    """Return whether an interrupted data set is consistent; a write that was cut short leaves one that is not."""
    from minari.dataset.minari_storage import MinariStorage

    progress = _progress(folder)
    if progress is None or (progress["seed"], progress["noise"]) != (seed, noise):
        return False
    try:
        storage = MinariStorage.read(folder / "data")
        whole = [facts["total_steps"] for facts in storage.get_episode_metadata(range(storage.total_episodes))]
    except (OSError, KeyError, ValueError):
        return False
    return len(whole) == len(progress["returns"])


def _collected(name: str, progress: dict[str, Any]) -> Collected:
    returns = progress["returns"]
    return Collected(
        environment=name,
        episodes=len(returns),
        attempts=progress["attempts"],
        mean_return=float(np.mean(returns)),
        best_return=float(np.max(returns)),
    )
