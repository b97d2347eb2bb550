"""`Measurement`: the state of one measuring run, a streaming PCA for every input and the checks on them."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evatune.activations.layer_type import Rows
from evatune.activations.layers.starved import is_expert, stand_ins
from evatune.activations.layers.targets import TargetModule
from evatune.activations.rows import RowMasks
from evatune.activations.stopping import StoppingMonitor, is_check
from evatune.allocation import ComponentVariances, allocate
from evatune.errors import EvaError, EvaWarning
from evatune.pca import AnyPCA, Look, StreamingPCA
from evatune.pca.threads import on_one_thread_each
from evatune.settings import Planning
from evatune.spectra import Spectrum, Target

SHOWN_ERROR = 0.01
"""Estimated share of the best captured variance that components may miss without a word to the user."""


def warn_of_errors(spectra: Mapping[str, Spectrum]) -> None:
    """Tell the user how many of the inputs have components that seem to miss much."""
    errors = {
        key: error for key, spectrum in spectra.items() if (error := spectrum.captured_error or 0.0) > SHOWN_ERROR
    }
    if errors:
        worst = max(errors, key=lambda key: errors[key])
        warnings.warn(
            f"the components of {len(errors)} of {len(spectra)} inputs seem to miss more than {SHOWN_ERROR:.1%} of the "
            f"variance that the best ones capture, those of {worst!r} {errors[worst]:.1%}; where that matters and "
            "memory allows, measure with backend='exact'.",
            EvaWarning,
            stacklevel=3,
        )


def _look(pca: AnyPCA) -> None:
    """Find components good enough for checks; they stay known until more rows come."""
    pca.look()


def _finish(pca: AnyPCA) -> None:
    """Find the final components."""
    _ = pca.refresh().components_


def _moved(rows: Rows, device: torch.device) -> Rows:
    """Return rows, as a layer type hands them over, on a device."""
    return rows.to(device) if isinstance(rows, Tensor) else [part.to(device) for part in rows]


class Measurement:
    """The state of one call of `measure`: a streaming PCA per input, and the checks.

    Args:
        targets: the targets, in the order of the model.
        new_pca: makes the streaming PCA of an input that keeps so many components.
        n_components: how many that are at most.
        monitor: follows the inputs through the checks.
        planned: what the later plan depends on, if known: checks then look only at the components that it needs.
        alone: whether this process checks by itself, or only together with others (`adopt`).
        state_device: where states are kept and rows are multiplied, if not where the rows are.
    """

    def __init__(
        self,
        *,
        targets: Sequence[TargetModule],
        new_pca: Callable[[int], StreamingPCA],
        n_components: int,
        monitor: StoppingMonitor,
        planned: Planning | None = None,
        alone: bool = True,
        state_device: torch.device | None = None,
    ) -> None:
        self.targets = {target.name: target for target in targets}
        self.new_pca = new_pca
        self.n_components = n_components
        self.monitor = monitor
        self.planned = planned
        self.alone = alone
        self.state_device = state_device
        self.pcas: dict[str, AnyPCA] = {}
        self.is_encoder_output: Callable[[Tensor], bool] = lambda activation: False
        self.history: list[dict[str, Any]] = []
        self._n_batches = 0
        self._masks = RowMasks()
        self._before: dict[str, Look] = {}
        self._side_by_side = True  # an accelerator is busy with one factorization
        self._needed: dict[str, int] = {}
        self._variances: dict[str, ComponentVariances] = {}
        self.input_of: dict[str, str] = {}
        self._started = time.perf_counter()
        self._warned_of_padding = False

    def begin_batch(self, n_batches: int, masks: RowMasks) -> None:
        """Prepare for the batch after `n_batches`."""
        self._n_batches, self._masks = n_batches, masks
        if self._checks(n_batches + 1):
            compared = {key: pca for key, pca in self.pcas.items() if pca.is_fitted and self.monitor.compares(key)}
            self._each(_look, compared.values())
            self._before = {key: pca.look() for key, pca in compared.items()}

    def consume(self, key: str, number: int, entering: Any) -> bool:
        """Take the input of a target, as its layer type hands it over."""
        target = self.targets[key]
        in_decoder = "decoder" in key.split(".") and not any(
            map(self.is_encoder_output, target.layer.tensors(entering)[:1])
        )
        if not self._warned_of_padding and is_expert(key) and self._hidden_among(entering):
            self._warned_of_padding = True
            warnings.warn(
                f"rows that enter the expert {key!r} cannot be told from the padding that is routed with them; "
                "measure with batches without padding.",
                EvaWarning,
                stacklevel=2,
            )
        pieces = target.layer.rows(target.module, entering, self._masks, in_decoder=in_decoder)
        while True:
            try:
                rows = next(pieces, None)
            except EvaError as error:
                raise EvaError(f"target {key!r} {error}") from None
            if rows is None:
                break
            if self.state_device is not None:
                rows = _moved(rows, self.state_device)
            self._side_by_side &= (rows if isinstance(rows, Tensor) else rows[0]).device.type == "cpu"
            pca = self.pcas.get(key)
            if pca is None:
                pca = self.pcas[key] = target.layer.new_pca(target.module, self.n_components, self.new_pca)
            try:
                pca.partial_fit(rows)
            except EvaError as error:
                raise EvaError(f"the input of {key!r} in batch {self._n_batches + 1}: {error}") from None
        return True

    def _hidden_among(self, entering: Any) -> bool:
        gathered = isinstance(entering, Tensor) and entering.ndim == 2 and len(entering) > 0
        return gathered and self._masks.hide_some and self._masks.fitting(entering.shape[:-1]) is None

    def _checks(self, n_batches: int) -> bool:
        # Processes check together, see `adopt`.
        return self.alone and self.monitor.rule.has_rule and is_check(n_batches)

    def end_batch(self, input_of: Mapping[str, str]) -> None:
        """Note how far things are, and see whether they are far enough."""
        self.input_of = dict(input_of)
        n_batches = self._n_batches + 1
        if self._checks(n_batches):
            self._check()
        if self.alone and is_check(n_batches):
            self._note(n_batches)

    def _check(self) -> None:
        undone = {key: pca for key, pca in self.pcas.items() if pca.is_fitted and key not in self.monitor.done}
        self._each(_look, undone.values())
        self._plan()
        self._each(self._judge, undone)
        self._before = {}
        self.monitor.conclude()
        self._each(self._begin_check, [key for key in undone if key not in self.monitor.done])

    def _each(self, action: Callable[[Any], None], items: Iterable[Any]) -> None:
        if self._side_by_side:
            on_one_thread_each(action, items)
        else:
            for item in items:
                action(item)

    def _judge(self, key: str) -> None:
        pca, n_needed = self.pcas[key], self._n_needed(key)
        before, now = self._before.get(key), pca.look()
        if before is not None and now.n_samples_seen > before.n_samples_seen:
            self.monitor.compare_update(key, now.components, before.components, n_needed=n_needed)
        self.monitor.score_unseen(key, pca, n_needed=n_needed)

    def _begin_check(self, key: str) -> None:
        self.monitor.begin_check(key, self.pcas[key].look().components, self.pcas[key])

    def pool(self, own: Mapping[str, AnyPCA], add: Callable[[Tensor], Tensor]) -> None:
        """Score the rows that all processes have seen since the last check: `own` here, summed by `add`."""
        self.monitor.pool(own, n_needed=self._n_needed, add=add)

    def adopt(
        self, input_of: Mapping[str, str], pcas: dict[str, AnyPCA], own: Mapping[str, AnyPCA], *, n_batches: int
    ) -> None:
        """Go on with what several processes have measured together, and check it.

        Args:
            input_of: key of the input of every target that any process has reached.
            pcas: the merged state of every input.
            own: the states of this process.
            n_batches: how many batches all have passed.
        """
        self.input_of, self.pcas = dict(input_of), pcas
        self._plan()
        for key, pca in pcas.items():
            before_kd = self.monitor.last_components(key)
            if before_kd is not None and self.monitor.compares(key):
                self.monitor.compare_update(key, pca.look().components, before_kd, n_needed=self._n_needed(key))
        self.monitor.conclude()
        for key, pca in pcas.items():
            if key not in self.monitor.done:
                self.monitor.begin_check(key, pca.look().components, own.get(key))
        self._note(n_batches)

    def _plan(self) -> None:
        if self.planned is not None:
            self._needed = self._components_needed(self.planned)

    def _n_needed(self, key: str) -> int:
        return self._needed.get(key, self.n_components)

    def _note(self, n_batches: int) -> None:
        gains = list(self.monitor.gains.values())
        self.history.append(
            {
                "batch": n_batches,
                "rows": self._most_rows(),
                "done": len(self.monitor.done),
                "inputs": len(self.pcas),
                "mean_gain": sum(gains) / len(gains) if gains else None,
                "seconds": time.perf_counter() - self._started,
            }
        )

    def split(self, key: str, new: str) -> None:
        """Begin an input with what another one has seen so far."""
        if key in self.pcas:
            self.pcas[new] = copy.deepcopy(self.pcas[key])

    def all_done(self) -> bool:
        """Tell whether every input is done."""
        return bool(self.pcas) and len(self.monitor.done) == len(self.pcas)

    def progress_text(self) -> str:
        """Return what the bar shows beside the batches and the time left."""
        return f"{len(self.monitor.done)}/{len(self.pcas)} inputs converged, {self._most_rows():,} rows"

    def target_table(self, input_of: Mapping[str, str], *, n_batches: int) -> dict[str, Target]:
        """Return the targets that were reached, in the order of the model."""
        if n_batches == 0:
            raise EvaError(
                "there was no batch to measure: the iterable is empty, or a generator that is used up already."
            )
        self.input_of = dict(input_of)
        standing_in = self._stand_ins(n_batches)
        if standing_in:
            warnings.warn(
                f"{len(standing_in)} of {len(self.pcas.keys() | standing_in.keys())} inputs are of experts that got "
                f"fewer than {self.n_components} rows in {n_batches} batches, the first is "
                f"{next(iter(standing_in))!r}; they start from what the other experts of their block have seen.",
                EvaWarning,
                stacklevel=3,
            )
        input_of = {name: name for name in self.targets if name in standing_in} | dict(input_of)
        unreached = [name for name in self.targets if name not in input_of]
        if unreached:
            warnings.warn(
                f"{len(unreached)} of {len(self.targets)} targets got no input in {n_batches} batches and have no "
                f"spectrum, the first is {unreached[0]!r}; an adapter there starts as LoRA does, with its rank and "
                "at random, unless exclude_modules leaves it out.",
                EvaWarning,
                stacklevel=3,
            )
        return {
            name: Target(
                name=name, input=input_of[name], in_features=target.in_features, out_features=target.out_features
            )
            for name, target in self.targets.items()
            if name in input_of
        }

    def spectra(self, stopped: str, *, n_batches: int) -> dict[str, Spectrum]:
        """Return the spectrum of every input, in the order of the model."""
        n_rows = self._most_rows()
        if n_rows == 0:
            raise EvaError(
                f"all rows of all {n_batches} batches are masked; check attention_mask"
                " and labels, or measure without use_label_mask."
            )
        if n_rows < self.n_components:
            raise EvaError(
                f"{n_rows} rows in {n_batches} batches are fewer than the {self.n_components} components asked for; "
                "give more or longer batches, or a smaller rank, rho or n_components."
            )
        spectra = self._stand_ins(n_batches)
        self._each(_finish, [pca for pca in self.pcas.values() if pca.is_fitted])
        for key in self.targets:
            if key not in self.pcas or key in spectra:
                continue
            pca = self.pcas[key]
            if not pca.is_fitted:
                raise EvaError(f"every row that entered {key!r} is masked; leave it out with exclude_modules.")
            error = pca.captured_error_
            spectra[key] = Spectrum(
                components=pca.components_.float().cpu(),
                singular_values=pca.singular_values_.float().cpu(),
                mean=pca.mean_.float().cpu(),
                total_variance=pca.total_variance_,
                n_rows=pca.n_samples_seen_,
                n_batches=n_batches,
                stopped=self.monitor.done.get(key, stopped),
                backend=pca.backend_,
                captured_error=None if math.isnan(error) else error,
            )
        return {key: spectra[key] for key in self.targets if key in spectra}

    def _stand_ins(self, n_batches: int) -> dict[str, Spectrum]:
        return stand_ins(self.targets, self.pcas, self.input_of, n_components=self.n_components, n_batches=n_batches)

    def _components_needed(self, planned: Planning) -> dict[str, int]:
        """Return how many components of each input a plan from the present spectra would use."""
        variances = self._variances
        for name, key in self.input_of.items():
            pca, target = self.pcas[key], self.targets[name]
            # What is done changes little, and looking at it costs a factorization.
            if pca.is_fitted and not (name in variances and key in self.monitor.done):
                variances[name] = ComponentVariances(
                    explained_variance=pca.look().explained_variance.double().cpu().numpy(),
                    total_variance=pca.total_variance_,
                    n_rows=pca.n_samples_seen_,
                    in_features=target.in_features,
                    out_features=target.out_features,
                )
        needed: dict[str, int] = {}
        if variances:
            for name, n_used in allocate(variances, settings=planned).ranks.items():
                key = self.input_of[name]
                needed[key] = max(needed.get(key, 0), n_used)
        return needed

    def _most_rows(self) -> int:
        return max((pca.n_samples_seen_ for pca in self.pcas.values() if pca.is_fitted), default=0)
