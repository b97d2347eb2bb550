"""Callbacks for transformers' `Trainer`; `RequireEva` and `JsonLinesCallback` also serve scripts of your own."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evatune import launch
from evatune.files import json_text, write_checksums, write_text
from evatune.interruption import ENDS_STEP, ENDS_TOGETHER, held_interrupts
from evatune.tables import duration


class RequireEva(TrainerCallback):
    """Raise an error before training if the adapter asks for EVA and was never initialized.

    Args:
        adapter_name: the adapter.
        asked: True demands EVA; None goes by the adapter's configuration (`init_lora_weights="eva"`).

    Example:
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[RequireEva()])  # doctest: +SKIP
    """

    def __init__(self, adapter_name: str = "default", *, asked: bool | None = None) -> None:
        self.adapter_name = adapter_name
        self.asked = asked

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model.

        Raises:
            EvaError: EVA was asked for and the adapter does not start from it.
        """
        from evatune.adapters import require_initialized

        require_initialized(kwargs["model"], self.adapter_name, asked=self.asked)


def require_eva(resume_from: Any = None) -> RequireEva:
    """Return the callback of methods whose adapter starts from EVA."""
    return RequireEva(asked=True)


class JsonLinesCallback(TrainerCallback):
    """Write one JSON object for each logged step; after resuming, the file contains each step once.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file with what the checkpoint remembers."""
        if state.is_world_process_zero:
            write_text(self.path, "".join(json_text(entry) + "\n" for entry in state.log_history))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the newest entry."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(state.log_history[-1]) + "\n")


class ConsoleCallback(TrainerCallback):
    """Print a line for each logged step, and on a terminal a progress bar below."""

    def __init__(self) -> None:
        self._started = 0.0
        self._first = 0
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._started, self._first = time.perf_counter(), state.global_step
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=None, leave=False
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the newest entry."""
        entry = state.log_history[-1]
        text = f"  step {entry['step']:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "loss" in entry:
            pace = (time.perf_counter() - self._started) / max(state.global_step - self._first, 1)
            left = duration(pace * (state.max_steps - state.global_step))
            text += f"  loss {entry['loss']:.4f}  grad norm {entry.get('grad_norm', float('nan')):.3f}"
            text += f"  lr {entry['learning_rate']:.1e}  {pace:.1f} s/step  {left} left"
        else:
            numbers = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
            if not numbers:
                return
            text += "  held-out " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        tqdm.write(text, file=sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


class ChecksumCallback(TrainerCallback):
    """Write the checksums of a checkpoint's files last: a checkpoint that has them is complete."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write `checksums.json`, once all processes have written their part."""
        launch.wait()
        if state.is_world_process_zero:
            write_checksums(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


class LastStepCallback(TrainerCallback):
    """Log the last step, also if it is not a multiple of the logging steps, and write its checkpoint.

    Args:
        saves: whether the checkpoint is wanted, from which the run can be extended.
    """

    def __init__(self, *, saves: bool) -> None:
        self.saves = saves

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for both at the end."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_save = control.should_save or self.saves


class InterruptCallback(TrainerCallback):
    """Let Ctrl-C finish the current step, save a checkpoint and stop; a second one stops at once.

    Several processes stop at the same step, though they may hear of it in different ones; a launcher repeats what it
    hears, so only the fourth stops them at once.
    """

    def __init__(self) -> None:
        self._was_pressed: Callable[[], bool] = lambda: False
        self._is_stopped = False

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed while this was listening, in this process or another."""
        return self._is_stopped or self._was_pressed()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch Ctrl-C while the block runs (only in the main thread, as Python demands)."""
        said = "\n  interrupted: finishing this step, then saving a checkpoint"
        held = ENDS_STEP if launch.n_processes() == 1 else ENDS_TOGETHER
        with held_interrupts(held=held, say=said) as self._was_pressed:
            yield

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if asked."""
        self._is_stopped = launch.any_of(self._was_pressed())
        if self._is_stopped:
            control.should_save = control.should_training_stop = True
