"""`finetune`: one recipe from pretrained model to trained adapter.

A run is a folder:

    recipe.yaml        the complete recipe
    spectra/           what was measured (EVA)
    plan.json          the ranks (EVA); `adapter.plan` of another run takes it
    initial_adapter/   the adapter before training (not converted, where the method changed the base weights)
    before.json        the evaluation before training, with the outcome of every example; after.json the one after it
    before.jsonl       what each of these examples was (question, expected, given, right); after.jsonl the same
    checkpoints/       what resuming needs
    adapter/           the trained adapter, an ordinary PEFT folder; after full fine-tuning `model/` instead
    log.jsonl          one line a logged step
    tensorboard/       the same for TensorBoard, where installed
    origin.json        fingerprints of the model and the data, which resuming checks
    run.json           the record; it is written last, so a folder that has it is complete
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from evatune import launch
from evatune.adapters.attach import quiet_peft, save_adapter
from evatune.adapters.counting import count_adapter
from evatune.allocation import RankPlan
from evatune.errors import EvaError
from evatune.files import write_json, write_json_lines, write_text
from evatune.fingerprint import modules_with_matrices, sampled_weights
from evatune.hardware import describe_machine, peak_memory_gib, reset_peak_memory
from evatune.methods import at_home
from evatune.models import save_model
from evatune.models.calls import no_progress_bars
from evatune.recipe import Recipe
from evatune.spectra import Spectra
from evatune.tasks.scores import Scores, score_line
from evatune.tasks.task import Task
from evatune.training.arguments import check_processes, learning_rate, total_steps, training_arguments
from evatune.training.callbacks import (
    ChecksumCallback,
    ConsoleCallback,
    InterruptCallback,
    JsonLinesCallback,
    LastStepCallback,
)
from evatune.training.card import adapter_card
from evatune.training.folder import (
    ADAPTER,
    CHECKPOINTS,
    INITIAL,
    LOG,
    MODEL,
    PLAN,
    RECORD,
    SPECTRA,
    check_length,
    check_output,
    check_same_recipe,
    check_still_there,
    checkpoint_step,
    go_on,
    last_checkpoint,
    saved_train_settings,
    start_folder,
    writing_run,
)
from evatune.training.layerwise import layerwise_optimizer
from evatune.training.origin import (
    check_data,
    check_model,
    data_of,
    fingerprints,
    held_out_and_trained,
    write_origin,
)
from evatune.training.record import RunRecord, library_versions
from evatune.training.rescue import saved_elsewhere
from evatune.training.setup import (
    checkpoint_gradients,
    is_interrupted,
    load_base,
    measure_recipe,
    measures,
    new_adapter,
    open_recipe,
    planned,
    quantize_as_asked,
    resumed_adapter,
    use_threads,
    uses_bf16,
)
from evatune.training.trainer import FiniteGradientCallback, RateCallback, TaskTrainer
from evatune.training.zero import Zero, ZeroCallback, check_resumes, launched_zero


def finetune(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, force: bool = False, progress: bool = True
) -> RunRecord:
    """Fine-tune an adapter as the recipe says.

    Method `eva` measures the model on the training data, redistributes the ranks and initializes the adapter; `lora`
    starts at random with uniform ranks; `evatune.methods` has them all. Every method sees the same examples in the same
    order for the same seed.

    Args:
        recipe: what to do; model, data and output must be given.
        overwrite: replace an output folder that holds a run.
        resume: go on from the last checkpoint in the output folder. A finished run is returned as it is, unless the
            recipe gives it more steps: then it is extended, and the learning rate of its new steps is that of a run of
            the new length.
        force: take spectra of another model, and resume with another model or changed data, without an error.
        progress: report on standard error.

    Returns:
        The record of the run, which is also in `run.json`.

    Raises:
        EvaError: something is wrong with the recipe, the model, the data or the output folder.
        KeyboardInterrupt: Ctrl-C; a checkpoint has been saved.
    """
    recipe.require("model", "data", "output")
    recipe, plan = planned(recipe.with_absolute_paths())
    check_processes(recipe.train)
    run = _Run(
        recipe=recipe,
        plan=plan,
        zero=launched_zero(recipe),
        task=open_recipe(recipe),
        folder=Path(recipe.output),
        say=_printer(progress),
        progress=progress,
        force=force,
        seconds={},
        weights={},
    )
    resume = resume and run.folder.exists()
    if resume:
        check_same_recipe(run.folder, recipe)
        if (run.folder / RECORD).is_file() and run.n_steps == run.n_steps_before():
            run.say(f"done      {run.folder} is finished; nothing to resume (--steps N extends it)")
            return RunRecord.load(run.folder)
        check_length(run.folder, n_steps=run.n_steps)
        if not force:
            check_data(run.folder, run.data)
    else:
        check_output(run.folder, overwrite=overwrite)
        if recipe.measure.spectra and measures(recipe):
            Spectra.load(recipe.measure.spectra)  # what is wrong with them is told before weights are loaded
        if both := held_out_and_trained(recipe):
            run.say(f"note      {', '.join(both)} is trained on and held out: the scores after training are of memory")
    use_threads(recipe)
    launch.wait()  # from here on, the first process may write into the folder that all have looked at
    return run.execute(resume=resume)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run on its way."""

    recipe: Recipe
    plan: RankPlan | None
    zero: Zero | None
    task: Task
    folder: Path
    say: Callable[[str], None]
    progress: bool
    force: bool
    seconds: dict[str, float]
    weights: dict[str, list[float]]

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.recipe.train, n_examples=len(self.task.train))

    @cached_property
    def data(self) -> dict[str, list[str]]:
        """Hashes of the data, which are read for it once."""
        return data_of(self.recipe)

    def n_steps_before(self) -> int:
        """Return the steps of the whole run as it was started or last extended."""
        return total_steps(saved_train_settings(self.folder), n_examples=len(self.task.train))

    def execute(self, *, resume: bool) -> RunRecord:
        recipe, started = self.recipe, datetime.now(UTC)
        reset_peak_memory()
        with self._timed("load"):
            # Data before weights, so that an error in the data is raised within seconds.
            facts = self.task.facts()
            model = load_base(recipe, self.task, quantizes=True)
        self.weights.update(sampled_weights(model, modules_with_matrices(model, without=self.task.needs(model).heads)))
        if resume and not self.force:
            check_model(self.folder, model)
        n_base = sum(parameter.numel() for parameter in model.parameters())
        self.say(f"model     {recipe.model.name}, {n_base:,} parameters")
        self.say(f"data      {self.task.summary()}")
        if self.zero:
            self.say(f"zero      stage {self.zero.stage}, offload {self.zero.offload!r}")
        adapted, checkpoint = self._resumed(model) if resume else (None, None)
        if adapted is None:
            adapted = self._new_adapter(model)
        before = self._before(adapted)
        trainer, resumed_from = self._train(adapted, checkpoint=checkpoint)
        if launch.is_first():
            check_still_there(self.folder)
            with writing_run(self.folder):
                self._save(adapted)
        after = self._evaluated("after", adapted)
        record = RunRecord(
            recipe=recipe.to_dict(),
            steps=trainer.state.global_step,
            precision="bf16" if uses_bf16(recipe.train) else "fp32",
            parameters=count_adapter(adapted, self._plan()) | {"base": n_base},
            log=[entry for entry in trainer.state.log_history if "train_runtime" not in entry],
            before=before,
            after=after,
            data=facts,
            seconds={name: round(value, 3) for name, value in self.seconds.items()},
            resumed_from=resumed_from,
            versions=library_versions(),
            machine=describe_machine()
            | {"processes": launch.n_processes()}
            | ({"zero": self.zero.to_json()} if self.zero else {}),
            started=started.isoformat(timespec="seconds"),
            fingerprints=fingerprints(weights=self.weights, data=self.data),
            peak_memory_gib=peak_memory_gib(),
        )
        if launch.is_first():
            self._complete(record)
        self.say(f"saved     {self.folder}")
        return record

    def _complete(self, record: RunRecord) -> None:
        """Write the record, which shows that the run is complete, and remove what only resuming needs."""
        check_still_there(self.folder)
        if not self._is_full():
            write_text(self.folder / ADAPTER / "README.md", adapter_card(self.recipe, record))
        record.save(self.folder)
        if not self.recipe.train.keep_checkpoints:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def _resumed(self, model: Any) -> tuple[Any, Path | None]:
        """Return the model with the adapter of a run that was stopped, and the last checkpoint, if there is any.

        The adapter's shape differs from layer to layer, so it is built before weights are loaded from a checkpoint.
        Both are None if the run was stopped before it had an adapter.
        """
        if not (self.folder / INITIAL).is_dir() and not self._is_full():
            return None, None
        adapted = resumed_adapter(self.recipe, model, self.folder / INITIAL, task=self.task)
        checkpoint = last_checkpoint(self.folder, say=self.say)
        if checkpoint:
            check_resumes(checkpoint, self.zero)
        self._go_on(checkpoint)
        return adapted, checkpoint

    def _save(self, adapted: Any) -> None:
        if self._is_full():
            save_model(adapted, self.folder / MODEL, overwrite=True)
        else:
            save_adapter(adapted, self.folder / ADAPTER, overwrite=True)
            self._write_origin(self.folder / ADAPTER)
        self.task.save_processor(self.folder / (MODEL if self._is_full() else ADAPTER))

    def _go_on(self, checkpoint: Path | None) -> None:
        """Tell of a run that is made longer or shorter, and note its recipe."""
        step, before = checkpoint_step(checkpoint) if checkpoint else 0, self.n_steps_before()
        if before != self.n_steps:
            rate = learning_rate(self.recipe.train, step=step + 1, n_steps=self.n_steps)
            self.say(
                f"length    {self.n_steps} steps instead of {before}; the learning rate is that of a run of "
                f"{self.n_steps} steps, {rate:.1e} at step {step + 1}"
            )
        if launch.is_first():
            go_on(self.folder, self.recipe)

    def _new_adapter(self, model: Any) -> Any:
        """Return the adapter, ready for training, and create the folder only now, after all checks."""
        quantize_as_asked(self.recipe, model, self.task.needs(model))
        spectra = self._spectra(model) if measures(self.recipe) else None
        with self._timed("prepare"):
            adapted, plan = new_adapter(
                self.recipe,
                model,
                spectra,
                task=self.task,
                plan=self.plan,
                total_steps=self.n_steps,
                force=self.force,
            )
        if launch.is_first():
            self._start_folder(spectra)
            if plan is not None:
                write_json(self.folder / PLAN, plan.to_json(), indent=2)
            if not self._is_full():
                save_adapter(adapted, self.folder / INITIAL, convert=False)
                self._write_origin(self.folder / INITIAL)
        launch.wait()  # the others read the plan
        if plan is not None:
            ranks = plan.ranks.values()
            self.say(
                f"plan      {len(plan.ranks)} targets, ranks {min(ranks)} to {max(ranks)}, {plan.n_parameters:,} "
                f"trainable parameters ({plan.uniform_parameters:,} with uniform ranks)"
            )
        return adapted

    def _spectra(self, model: Any) -> Spectra:
        if self.recipe.measure.spectra:
            self.say(f"spectra   {self.recipe.measure.spectra}")
            return Spectra.load(self.recipe.measure.spectra)
        settings = self.recipe.measure
        self.say(f"measure   at most {settings.max_batches} batches of {settings.batch_size} examples")
        with launch.result_protected():
            with self._timed("measure"):
                spectra = measure_recipe(self.recipe, model, task=self.task, plan=self.plan, progress=self.progress)
            if launch.is_first() and is_interrupted(spectra):
                self._start_folder(spectra)
        n_batches = max(spectrum.n_batches for spectrum in spectra.inputs.values())
        self.say(f"measured  {len(spectra.inputs)} inputs in {n_batches} batches, {self.seconds['measure']:.1f} s")
        if is_interrupted(spectra):
            self.say(f"saved     {self.folder / SPECTRA}, what was measured so far")
            raise KeyboardInterrupt
        return spectra

    def _start_folder(self, spectra: Spectra | None) -> None:
        try:
            start_folder(self.folder, self.recipe)
            self._write_origin(self.folder)
            if spectra is not None:
                spectra.save(self.folder / SPECTRA)
        except EvaError as error:
            if spectra is None or self.recipe.measure.spectra:
                raise
            raise saved_elsewhere(spectra, error) from error

    def _write_origin(self, folder: Path) -> None:
        write_origin(folder, weights=self.weights, data=self.data)

    def _train(self, model: Any, *, checkpoint: Path | None) -> tuple[TaskTrainer, int | None]:
        settings, task = self.recipe.train, self.task
        n_examples, needs = len(task.train), task.needs(model)
        if settings.gradient_checkpointing:
            checkpoint_gradients(model)
        interrupt = InterruptCallback()
        trainer = TaskTrainer(
            settings=settings,
            score=partial(self._evaluate, model) if len(task.held_out) else None,
            model=model,
            args=training_arguments(
                settings,
                checkpoints=self.folder / CHECKPOINTS,
                n_examples=n_examples,
                evaluates=len(task.held_out) > 0,
                further={**needs.arguments, **(self.zero.arguments(settings) if self.zero else {})},
            ),
            train_dataset=task.train,
            eval_dataset=task.held_out,
            data_collator=task.collate,
            callbacks=self._callbacks(interrupt, checkpoint),
            make_optimizer=partial(self._optimizer, model),
            counts_tokens=needs.counts_tokens,
        )
        trainer.add_callback(ChecksumCallback())  # after all that write into checkpoints
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        step = checkpoint_step(checkpoint) if checkpoint else None
        self.say(
            f"train     {self.n_steps} steps of {settings.batch_size * settings.gradient_accumulation} examples"
            + (f", from step {step}" if step else "")
        )
        set_seed(settings.seed)
        check_still_there(self.folder)
        with self._timed("train"), writing_run(self.folder), interrupt.listening(), quiet_peft(), no_progress_bars():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if interrupt.interrupted and trainer.state.global_step < self.n_steps:
            self.say(f"stopped   at step {trainer.state.global_step}; go on with --resume")
            raise KeyboardInterrupt
        return trainer, step

    def _callbacks(self, interrupt: InterruptCallback, checkpoint: Path | None) -> list[TrainerCallback]:
        settings, skip = self.recipe.train, self.recipe.train.allow_nonfinite
        callbacks: list[TrainerCallback] = [
            ZeroCallback(self.zero, skip=skip) if self.zero else FiniteGradientCallback(skip=skip),
            JsonLinesCallback(self.folder / LOG),
            RateCallback(),
            LastStepCallback(saves=settings.keep_checkpoints > 0),
            interrupt,
        ]
        callbacks += [at_home(home)(resume_from=checkpoint) for home in self.recipe.adapter.choice.method.callbacks]
        callbacks += [ConsoleCallback()] if self.progress else []
        if launch.is_first() and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            callbacks.append(TensorBoardCallback(SummaryWriter(str(self.folder / "tensorboard"))))
        return callbacks

    def _optimizer(self, model: Any) -> torch.optim.Optimizer | None:
        """Return the optimizer of the method or of layer-wise decay, or None for the Trainer's own."""
        settings = self.recipe.train
        if settings.layer_decay < 1:
            return layerwise_optimizer(
                model,
                learning_rate=settings.learning_rate,
                decay=settings.layer_decay,
                weight_decay=settings.weight_decay,
            )
        home = self.recipe.adapter.choice.optimizer
        return at_home(home)(model, settings) if home else None

    def _evaluated(self, when: str, model: Any) -> dict[str, Any] | None:
        """Evaluate and keep the outcomes of all examples in a file; return what the record holds."""
        if not len(self.task.held_out):
            return None
        with self._timed("evaluate"):
            scores = self._evaluate(model)
        content = scores.to_json()
        launch.wait()  # all have looked whether there is such a file
        if launch.is_first():
            check_still_there(self.folder)
            write_json(self.folder / f"{when}.json", content | {"outcomes": scores.outcomes})
        if scores.examples and launch.is_first():
            write_json_lines(self.folder / f"{when}.jsonl", scores.examples)
        self.say(f"{when:<10}{score_line(content)}")
        for note in scores.notes:
            self.say(f"{'':<10}{note}")
        return content

    def _evaluate(self, model: Any) -> Scores:
        return self.task.evaluate(model, bf16=uses_bf16(self.recipe.train), progress=self.progress)

    def _before(self, adapted: Any) -> dict[str, Any] | None:
        """Evaluate before training, or remember it; all methods but LoRA-One start as the base model."""
        path = self.folder / "before.json"
        if not path.is_file():
            return self._evaluated("before", adapted) if self.recipe.train.eval_before else None
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in content.items() if name != "outcomes"}

    def _is_full(self) -> bool:
        return not self.recipe.adapter.choice.method.has_adapter

    def _plan(self) -> RankPlan | None:
        path = self.folder / PLAN
        return RankPlan.load(path) if path.is_file() else None

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


def _printer(progress: bool) -> Callable[[str], None]:
    return (lambda text: print(text, file=sys.stderr, flush=True)) if progress else (lambda text: None)
