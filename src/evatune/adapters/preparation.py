"""`Preparation`: everything that the start of a method gets."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel
from torch import nn

from evatune.activations import measure
from evatune.activations.gradients import Loss
from evatune.activations.layers.targets import TargetModule
from evatune.activations.measure import Forward, RowMask
from evatune.adapters.fit import Fit, fit_spectra
from evatune.allocation import RankPlan
from evatune.errors import EvaError
from evatune.settings import Measuring, Preparing
from evatune.spectra import Spectra

Finish = Callable[[PeftModel], None]
"""What remains to do once the PEFT model is there."""


@contextlib.contextmanager
def preprocessing() -> Iterator[None]:
    """Raise an `EvaError` that names PEFT's preprocessing for any error inside of it."""
    try:
        yield
    except EvaError:
        raise
    except Exception as error:
        raise EvaError(f"PEFT's preprocessing failed: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that the start of a method gets."""

    model: nn.Module
    """The base model."""
    targets: Sequence[TargetModule]
    """The modules that get the adapter."""
    config: Any
    """The PEFT configuration."""
    settings: Preparing
    """All options."""
    batches: Iterable[Any] | None = None
    """Batches as the model takes them."""
    spectra: Spectra | None = None
    """Spectra that were measured before."""
    plan: RankPlan | None = None
    """Ranks and alphas that were decided before."""
    loss: Loss | None = None
    """Computes the loss of a batch, if the model itself does not."""
    forward: Forward | None = None
    """Calls the model with a batch, if the default does not fit."""
    row_mask: RowMask | None = None
    """Says which rows count."""
    force: bool = False
    """Whether spectra may be of another model."""
    progress: bool = True
    """Whether measuring shows a bar."""

    @property
    def scaling(self) -> float:
        """The factor on B A at uniform ranks."""
        alpha, rank = self.settings.lora_alpha, self.settings.rank
        return alpha / (rank**0.5 if self.config.use_rslora else rank)

    def pattern(self) -> str:
        """Return one regular expression that matches exactly the targets."""
        return "|".join(re.escape(target.name) for target in self.targets)

    def given_batches(self) -> Iterable[Any]:
        """Return the batches; an earlier check has made sure that there are some."""
        assert self.batches is not None
        return self.batches

    def measured(self, **options: Any) -> Fit:
        """Return the spectra that were given, or measure the targets.

        Args:
            options: options of `evatune.measure` that replace those in the settings.
        """
        spectra = self.spectra
        if spectra is None:
            wanted = {"target_modules": self.pattern(), "exclude_modules": None, "layers_to_transform": None}
            settings = replace(self.settings.part(Measuring), **wanted | {"layers_pattern": None} | options)
            spectra = measure(
                self.model,
                self.given_batches(),
                settings=settings,
                forward=self.forward,
                row_mask=self.row_mask,
                progress=self.progress,
            )
        widths = {target.name: target.in_features for target in self.targets}
        return fit_spectra(spectra, widths, model=self.model, force=self.force, warn=self.spectra is not None)
