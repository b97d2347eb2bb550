"""The task of control: a Decision Transformer learns from episodes, and is scored by acting in environments."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from evatune.errors import EvaError
from evatune.files import check_takes_files, user_cache
from evatune.hardware import autocast
from evatune.models import load_config, load_model
from evatune.tables import text_table
from evatune.tasks.control.collecting import collect_episodes
from evatune.tasks.control.environments import ACTION_SIZE, EPISODE_STEPS, STATE_SIZE, episode_seed
from evatune.tasks.control.episodes import Episode, load_episodes
from evatune.tasks.control.filmstrip import write_video
from evatune.tasks.control.model import DecisionTransformer, DecisionTransformerConfig, checked_config
from evatune.tasks.control.names import environment_names
from evatune.tasks.control.outline import outline
from evatune.tasks.control.preview import preview
from evatune.tasks.control.rollout import Outcome, roll_out
from evatune.tasks.control.settings import ControlData
from evatune.tasks.control.windows import Windows, padded, state_statistics
from evatune.tasks.outline import Outline
from evatune.tasks.scores import Metric, Scores
from evatune.tasks.settings import ModelSettings
from evatune.tasks.task import Needs, Preview, evaluating

EMBEDDINGS = ("embed_state", "embed_action", "embed_return", "embed_reward", "embed_time")
"""They stay frozen and without an adapter: the paper adapts "all pre-trained weight matrices except for the embedding
layer". The action head is trained whole: it has so few rows that an adapter could express any change of it as well."""

SMALLEST_SCALE = 0.02
"""Lower bound of the scale of a state's numbers, most of which are metres: movements below 2 cm are not scaled up."""

METRICS = {
    "success": Metric(columns=("success",), form=".1%"),
    "return": Metric(columns=("return",), form=".1f"),
}
"""`success`: share of the episodes in which the environment reported success. `return`: mean sum of rewards."""


def open_task(data: ControlData, *, model: ModelSettings, seed: int) -> Control:
    """Return the task; see `evatune.tasks.open_task`."""
    return Control(data=data, source=model, seed=seed)


def collect(data: ControlData, *, folder: str | Path, processes: int, say: Callable[[str], None]) -> Preview:
    """Collect the episodes that `data` asks for; see `evatune.tasks.collect`."""
    collected = collect_episodes(
        data.train,
        folder,
        episodes=data.episodes,
        noise=data.noise,
        seed=data.episode_seed,
        processes=processes,
        tell=lambda one: say(f"collected {one.environment}: {one.episodes} episodes in {one.attempts} attempts"),
    )
    rows = [
        [one.environment, one.episodes, f"{one.success_rate:.1%}", f"{one.mean_return:.1f}", f"{one.best_return:.1f}"]
        for one in collected
    ]
    return Preview(
        text=text_table(["environment", "episodes", "success of the policy", "mean return", "best return"], rows),
        content=[{**asdict(one), "success_rate": one.success_rate} for one in collected],
    )


@dataclass(frozen=True, kw_only=True)
class Control:
    """Episodes for a Decision Transformer; see `evatune.tasks.task.Task`."""

    data: ControlData
    source: ModelSettings
    seed: int

    @cached_property
    def episodes(self) -> list[Episode]:
        """The training episodes; those of scripted policies are collected now, if they are not in the user's cache."""
        data = self.data
        paths = [Path(name).expanduser() for name in data.train if Path(name).expanduser().exists()]
        scripted = environment_names(name for name in data.train if not Path(name).expanduser().exists())
        if scripted:
            folder = user_cache() / "episodes" / f"noise-{data.noise:g}-seed-{data.episode_seed}"
            with tqdm(total=len(scripted), desc="collect", unit="environment", leave=False, disable=None) as bar:
                collect_episodes(
                    scripted,
                    folder,
                    episodes=data.episodes,
                    noise=data.noise,
                    seed=data.episode_seed,
                    tell=lambda _: bar.update(),
                )
            paths += [folder / name for name in scripted]
        return [episode for path in paths for episode in load_episodes(path, limit=data.episodes)]

    @cached_property
    def train(self) -> Windows:
        """The training windows."""
        return Windows(self.episodes, context=self.config.context, seed=self.seed)

    @cached_property
    def held_out(self) -> list[tuple[str, int]]:
        """Environments to act in and seeds of goal positions: one episode of each environment, then the next."""
        return [
            (name, episode_seed(self.seed, number, stream="eval"))
            for number in range(self.data.eval_episodes)
            for name in self.targets
        ]

    @cached_property
    def targets(self) -> dict[str, float]:
        """The return that is asked for in each environment to act in."""
        best: dict[str, float] = {}
        for episode in self.episodes:
            best[episode.environment] = max(best.get(episode.environment, -math.inf), episode.total_return)
        names, asked = environment_names(self.data.eval) or tuple(best), self.data.target_return
        if asked is not None:
            return dict.fromkeys(names, asked)
        missing = [name for name in names if name not in best]
        if missing:
            raise EvaError(
                f"there are no training episodes of {', '.join(missing)} to take the best return of; set "
                "data.target_return."
            )
        return {name: best[name] for name in names}

    @cached_property
    def config(self) -> DecisionTransformerConfig:
        """The sizes of the model: those of a pretrained one, or of `new:LAYERSxHEADSxWIDTH`."""
        data, name = self.data, self.source.name
        if not name.startswith("new:"):
            if Path(name).is_relative_to(user_cache()) and not Path(name).exists():
                raise EvaError(
                    f"the user's cache holds no model {name} yet; make it with "
                    "evatune finetune recipes/small/metaworld-pretrain.yaml."
                )
            return checked_config(load_config(name, revision=self.source.revision), name=name, context=data.context)
        sizes = re.fullmatch(r"new:(\d+)x(\d+)x(\d+)", name)
        layers, heads, width = map(int, sizes.groups()) if sizes else (0, 0, 0)
        if not (layers and heads and width) or width % heads:
            raise EvaError(
                f"model {name!r} is not new:LAYERSxHEADSxWIDTH with a width that the heads divide, such as new:4x8x512."
            )
        return DecisionTransformerConfig(
            state_size=STATE_SIZE,
            action_size=ACTION_SIZE,
            context=data.context or 50,
            reward_tokens=data.reward_tokens,
            time_steps=EPISODE_STEPS if data.time_steps else 0,
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            resid_pdrop=data.dropout,
            embd_pdrop=data.dropout,
            attn_pdrop=data.dropout,
        )

    def kinds(self) -> list[str]:
        """Return the environment of each training window."""
        return [self.train.episode(index).environment for index in range(len(self.train))]

    def outline(self) -> Outline:
        """Return what is known without weights and without a hub."""
        return outline(self)

    def load_model(self) -> DecisionTransformer:
        """Return the pretrained model, or a new one, which standardizes states as the training episodes need it."""
        source, config = self.source, self.config
        if not source.name.startswith("new:"):
            model: Any = load_model(source.name, dtype=source.dtype, revision=source.revision, head="base")
            return model
        model = DecisionTransformer(config)
        mean, scale = state_statistics(self.episodes, floor=SMALLEST_SCALE)
        model.state_mean.copy_(mean)
        model.state_scale.copy_(scale)
        model.name_or_path = source.name
        return model.eval()

    def needs(self, model: Any) -> Needs:
        """Return what the model needs; PEFT has no task type for it."""
        return Needs(
            heads=("action_head",),
            without_adapter=tuple(name for name in EMBEDDINGS if getattr(model, name) is not None),
            row_mask=lambda batch: model.token_mask(batch["attention_mask"]),
        )

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return windows as a padded batch."""
        return padded(rows, context=self.config.context)

    def evaluate(self, model: Any, *, limit: int | None = None, bf16: bool = False, progress: bool = True) -> Scores:
        """Let a model act."""
        if self.data.video:
            check_takes_files(self.data.video)
        started = time.perf_counter()
        chosen = self.held_out[:limit]
        seeds: dict[str, list[int]] = {}
        for name, seed in chosen:
            seeds.setdefault(name, []).append(seed)
        with (
            evaluating(model),
            tqdm(total=len(chosen), desc="act", unit="episode", leave=False, disable=None if progress else True) as bar,
            autocast(next(model.parameters()).device, "bfloat16" if bf16 else None),
        ):
            outcomes = roll_out(model, seeds, self.targets, context=self.config.context, tell=bar.update)
        if self.data.video:
            self._write_videos(outcomes)
        succeeded = {
            f"succeeded in {name}": sum(o.success for o in outcomes if o.environment == name) for name in seeds
        }
        return Scores(
            headline="success",
            metrics=METRICS,
            outcomes={
                "success": [float(outcome.success) for outcome in outcomes],
                "return": [outcome.total_return for outcome in outcomes],
            },
            counts={"episodes": len(outcomes), "environments": len(seeds)} | succeeded,
            seconds=time.perf_counter() - started,
        )

    def preview(self, n: int) -> Preview:
        """Return the first windows and a filmstrip of their episodes."""
        return preview([(self.train.episode(index), self.train[index]) for index in range(min(n, len(self.train)))])

    def summary(self) -> str:
        """Return the numbers of episodes, steps and environments."""
        facts = self.facts()
        return (
            f"{facts['episodes']} episodes of {facts['environments']} environments, {facts['train']} steps, windows of "
            f"{self.config.context}"
        )

    def facts(self) -> dict[str, Any]:
        """Return the counts for the record."""
        return {
            "train": len(self.train),
            "episodes": len(self.episodes),
            "environments": len({episode.environment for episode in self.episodes}),
            "held_out": len(self.held_out),
            "targets": {name: round(value, 3) for name, value in self.targets.items()},
        }

    def save_processor(self, folder: Path) -> None:
        """Write nothing: the mean and scale of states are saved with the weights."""

    def check_saved(self, folder: Path) -> None:
        """Check nothing: observations and actions have the same sizes everywhere."""

    def _write_videos(self, outcomes: Sequence[Outcome]) -> None:
        shown: set[str] = set()
        for outcome in outcomes:
            if outcome.environment not in shown:
                shown.add(outcome.environment)
                path = Path(str(self.data.video)).expanduser() / f"{outcome.environment}.gif"
                write_video(path, outcome.environment, seed=outcome.seed, actions=outcome.actions)
