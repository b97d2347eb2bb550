"""The record of a run: recipe, data, machine, times and results."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evatune.errors import EvaError
from evatune.files import write_json
from evatune.hardware import versions_of
from evatune.tasks.scores import score_rows
from evatune.training.folder import RECORD


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished fine-tuning run, as `run.json` keeps it."""

    recipe: dict[str, Any]
    """The complete recipe, defaults included."""
    steps: int
    """Optimizer steps."""
    precision: str
    """`fp32` or `bf16`."""
    parameters: dict[str, int]
    """`base`, `trainable`, `targets`, `without_adapter` (rank 0), `components` (sum of ranks)."""
    log: list[dict[str, float]]
    """Of each logged step: step, loss (mean since the last entry), grad_norm, learning_rate; also evaluations."""
    before: dict[str, Any] | None
    """Scores before training (`evatune.tasks.scores.Scores.to_json`); None without held-out data or if not asked."""
    after: dict[str, Any] | None
    """Scores after training."""
    data: dict[str, Any]
    """What the task tells of its data: examples, dropped rows, ..."""
    seconds: dict[str, float]
    """Wall time of `load`, `measure`, `prepare`, `train` and `evaluate`; of the last session if the run was resumed."""
    resumed_from: int | None
    """Step of the checkpoint that the last session started from."""
    versions: dict[str, str]
    """Versions of Python and the libraries."""
    machine: dict[str, Any]
    """Processor, cores, threads, memory, accelerators."""
    started: str
    """Date and time, UTC."""
    fingerprints: dict[str, Any] = field(default_factory=dict)
    """Hashes of what the result depends on: `model` (some of its weights), `data` (each file), `code` (of evatune)."""
    peak_memory_gib: float | None = None
    """Most memory that the process held, or most that was allocated on the accelerator."""

    @property
    def losses(self) -> list[dict[str, float]]:
        """The entries of the log that carry a training loss."""
        return [entry for entry in self.log if "loss" in entry]

    @property
    def first_grad_norm(self) -> float | None:
        """Gradient norm of the first step."""
        return next((entry.get("grad_norm") for entry in self.losses if entry["step"] == 1), None)

    def summary(self) -> str:
        """Return a short table of what came out."""
        rows = [("steps", f"{self.steps}"), ("trainable parameters", f"{self.parameters['trainable']:,}")]
        if self.losses:
            norm = self.first_grad_norm
            rows += [("gradient norm, first step", f"{norm:.3f}")] if norm is not None else []
            rows.append(("training loss", f"{self.losses[0]['loss']:.4f} to {self.losses[-1]['loss']:.4f}"))
        for when, scores in (("before", self.before), ("after", self.after)):
            if scores:
                rows += [(f"held-out {name} {when}", f"{value} ({ends})") for name, value, ends in score_rows(scores)]
        rows += [(f"seconds to {name}", f"{value:.1f}") for name, value in self.seconds.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `load` restores the record from them."""
        return asdict(self) | {"first_grad_norm": self.first_grad_norm}

    def save(self, directory: str | Path) -> Path:
        """Write `run.json` into a folder."""
        return write_json(Path(directory) / RECORD, self.to_json(), indent=2)

    @classmethod
    def load(cls, directory: str | Path) -> RunRecord:
        """Read the record of a run.

        Raises:
            EvaError: the folder holds no record of a finished run.
        """
        path = Path(directory) / RECORD
        if not path.is_file():
            raise EvaError(f"{directory} holds no finished run: it has no {RECORD}.")
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("first_grad_norm", None)
        return cls(**content)


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    names = ("evatune", "torch", "transformers", "peft", "accelerate", "numpy")
    return {"python": platform.python_version()} | versions_of(*names)
