"""The options of training: the recipe's section `train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from evatune.errors import EvaError
from evatune.settings.section import Section, number


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
    """How the adapter is trained."""

    section: ClassVar[str] = "train"
    main: ClassVar[str] = "steps"

    steps: int | None = number(None, low=1)
    """Optimizer steps; overrides `epochs`."""
    epochs: float = number(1.0, above=0)
    """Passes over the training data."""
    batch_size: int = number(8, low=1)
    """Examples in one forward pass."""
    gradient_accumulation: int = number(1, low=1)
    """Forward passes in one optimizer step."""
    learning_rate: float = number(5e-4, above=0)
    """Highest learning rate of AdamW."""
    lora_plus_ratio: float = number(16.0, low=1)
    """Learning rate of B divided by that of A, with `lora+`."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up."""
    final_learning_rate: float = number(0.0, low=0)
    """Learning rate that a schedule which falls ends at."""
    warmup_ratio: float = number(0.03, low=0, high=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = number(0.0, low=0)
    """Weight decay of AdamW."""
    layer_decay: float = number(1.0, above=0, high=1)
    """Learning rate of a block divided by that of the next higher block, for full fine-tuning; 1 keeps them equal."""
    max_grad_norm: float = number(1.0, low=0)
    """Gradients with a larger norm are scaled down to this norm; 0 switches this off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` is autocast; `auto` uses it if this machine computes it fast."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""
    allow_nonfinite: bool = False
    """Skip steps whose loss or gradient is not finite, instead of ending the run."""
    logging_steps: int = number(5, low=1)
    """Log every so many steps."""
    eval_before: bool = True
    """Evaluate the held-out data before training too."""
    eval_steps: int | None = number(None, low=1)
    """Also evaluate the held-out data every so many steps."""
    save_steps: int | None = number(None, low=1)
    """Write a checkpoint every so many steps; by default only the last step and an interruption write one."""
    keep_checkpoints: int = number(1, low=0)
    """Newest checkpoints that stay on disk; 0 leaves none of a finished run, which then cannot be extended."""
    seed: int = number(0, low=0)
    """Seed of data order, sampling, dropout and random initialization."""
    threads: int | None = number(None, low=1, high=1024)
    """Processor threads; by default what PyTorch chooses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        final, highest = self.final_learning_rate, self.learning_rate
        if final > highest or (final and self.schedule == "constant"):
            raise EvaError(
                f"train.final_learning_rate is {final:g}, but must be at most train.learning_rate ({highest:g}), and "
                "train.schedule one that falls (linear or cosine)."
            )
