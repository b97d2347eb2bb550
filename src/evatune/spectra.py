"""`Spectra`: what was measured of a model's activations, as a value that can be saved, loaded and planned from.

A folder of spectra holds `spectra.safetensors` (the numbers) and `spectra.json` (what they are). Nothing is unpickled.
Planning needs neither the model nor the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evatune.allocation import ComponentVariances, RankPlan, allocate
from evatune.errors import EvaError, near_misses
from evatune.files import check_tensors, json_text, replace_folder
from evatune.settings import Planning, Reason, takes
from evatune.tables import text_table

FORMAT_VERSION = 1
_TENSORS = ("components", "singular_values", "mean")


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """The leading part of the principal component analysis of one input."""

    components: Tensor
    """Orthonormal rows by descending variance, (k, in_features)."""
    singular_values: Tensor
    """Singular values of the centred rows, (k,)."""
    mean: Tensor
    """Mean of the rows, (in_features,)."""
    total_variance: float
    """Sum of the variances of all features, with n_rows - 1 in the denominator."""
    n_rows: int
    """How many rows were seen."""
    n_batches: int
    """In how many batches."""
    stopped: Reason
    """Why measuring ended; `stopped.text` says what that means and which setting changes it."""
    backend: str
    """The backend of `StreamingPCA` that was used."""
    captured_error: float | None = None
    """Estimate of the variance that these components miss, as a share of what the best k capture; None if unknown."""
    padding: str = "none"
    """What became of padding: "none" among the rows, "dropped", "removed" before the pass, or "unknown"."""
    unsure_share: float = 0.0
    """Share of the rows that may be padding, where that is unknown."""

    @property
    def explained_variance(self) -> Tensor:
        """Variance along each component, (k,)."""
        return self.singular_values.square() / max(self.n_rows - 1, 1)

    @property
    def explained_variance_ratio(self) -> Tensor:
        """Share of the total variance along each component, (k,); zeros if the input has no variance."""
        if self.total_variance <= 0:
            return torch.zeros_like(self.singular_values)
        return self.explained_variance / self.total_variance


@dataclass(frozen=True, kw_only=True)
class Target:
    """A module whose weight gets an adapter."""

    name: str
    """Its name in the base model."""
    input: str
    """Key of its input in `Spectra.inputs`; targets that receive the same tensor object share one."""
    in_features: int
    """Width of its input."""
    out_features: int
    """Width of its output."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectra(Mapping[str, Spectrum]):
    """The spectra of all inputs of a model's targets; a mapping from target name to `Spectrum`."""

    targets: dict[str, Target]
    """The targets by name, in the order of the model."""
    inputs: dict[str, Spectrum]
    """The measured inputs; the key is the name of the first target that receives the input."""
    model_name: str = ""
    """Name or path of the model."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was measured."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that measured it."""
    seconds: float = 0.0
    """How long measuring took."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per convergence check: batch, rows, converged inputs, seconds."""
    weights: dict[str, list[float]] = field(default_factory=dict)
    """A few weights of the model that was measured, by target: see `evatune.fingerprint`."""
    unreached: tuple[str, ...] = ()
    """Names of targets that got no input, or only rows that are masked, and so have no spectrum."""

    def __getitem__(self, name: str) -> Spectrum:
        if name not in self.targets:
            raise KeyError(f"no target {name!r} in these spectra{near_misses(name, self.targets)}")
        return self.inputs[self.targets[name].input]

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def n_components(self) -> int:
        """How many components the widest inputs keep."""
        return max(spectrum.components.shape[0] for spectrum in self.inputs.values())

    @takes(Planning)
    def plan(
        self,
        rank: int | Mapping[str, int] | None = None,
        rho: float | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        settings: Planning | None = None,
        **options: Any,
    ) -> RankPlan:
        """Redistribute a rank budget over the targets by explained variance (Section 3.3 of the paper).

        Args:
            rank: rank r of uniform LoRA, for all targets or by target name; the budget is its sum. By default 16.
            rho: a target gets at most round(rho * r) components; 1 keeps the ranks uniform. By default 2.
            weights: factor on the scores of each target, by name; by default 1.
            settings: all options in one object; other arguments override its fields.
            options: see the list below.

        Returns:
            The plan; neither model nor data are needed, and it takes milliseconds.

        Raises:
            EvaError: a value is out of range, or fewer components were kept than rho * rank asks for.
        """
        variances = {
            name: ComponentVariances(
                explained_variance=self[name].explained_variance.double().cpu().numpy(),
                total_variance=self[name].total_variance,
                n_rows=self[name].n_rows,
                in_features=target.in_features,
                out_features=target.out_features,
            )
            for name, target in self.targets.items()
        }
        given = {name: value for name, value in (("rank", rank), ("rho", rho)) if value is not None}
        return allocate(variances, weights=weights, settings=settings, **options | given)

    def summary(self) -> str:
        """Return a table of the inputs: rows, explained variance, why measuring stopped."""
        rows = []
        for key, spectrum in self.inputs.items():
            n_sharing = sum(target.input == key for target in self.targets.values())
            ratios = spectrum.explained_variance_ratio
            half = ratios[: max(1, len(ratios) // 2)].sum()
            rows.append(
                [
                    key + (f" (+{n_sharing - 1})" if n_sharing > 1 else ""),
                    spectrum.components.shape[1],
                    f"{spectrum.n_rows:,}",
                    f"{float(ratios[0]):.3f}",
                    f"{float(half):.3f}",
                    f"{float(ratios.sum()):.3f}",
                    spectrum.backend,
                    spectrum.stopped,
                ]
            )
        k = self.n_components
        explained = ["first", f"first {max(1, k // 2)}", f"first {k}"]
        return text_table(["input (+ shared by)", "width", "rows", *explained, "backend", "stopped"], rows)

    def overview(self) -> str:
        """Return how much was measured, and why it ended, a line for each reason."""
        inputs = list(self.inputs.values())
        rows = max(spectrum.n_rows for spectrum in inputs)
        batches = max(spectrum.n_batches for spectrum in inputs)
        reasons = Counter(spectrum.stopped for spectrum in inputs).most_common()
        stopped = "".join(f"{count:>6} {reason}: {reason.text}\n" for reason, count in reasons)
        captured = sum(float(spectrum.explained_variance_ratio.sum()) for spectrum in inputs) / len(inputs)
        return (
            f"{len(self)} targets with {len(inputs)} different inputs, {rows:,} rows in {batches} batches, "
            f"{self.seconds:.0f} s\n"
            f"measuring ended, by number of inputs:\n{stopped}"
            f"{self.n_components} components explain {captured:.1%} of the variance, mean over inputs"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything but the tensors, for programs."""
        inputs = {
            key: {
                "n_rows": spectrum.n_rows,
                "n_batches": spectrum.n_batches,
                "n_components": spectrum.components.shape[0],
                "total_variance": spectrum.total_variance,
                "explained_variance_ratio": float(spectrum.explained_variance_ratio.sum()),
                "stopped": spectrum.stopped,
                "backend": spectrum.backend,
                "captured_error": spectrum.captured_error,
                "padding": spectrum.padding,
                "unsure_share": spectrum.unsure_share,
            }
            for key, spectrum in self.inputs.items()
        }
        return {
            "format": "evatune spectra",
            "format_version": FORMAT_VERSION,
            "model_name": self.model_name,
            "settings": self.settings,
            "versions": self.versions,
            "seconds": self.seconds,
            "targets": [asdict(target) for target in self.targets.values()],
            "inputs": inputs,
            "history": self.history,
            "weights": self.weights,
            "unreached": list(self.unreached),
        }

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the spectra to a folder.

        Args:
            directory: the folder; it appears only when it is complete.
            overwrite: replace a folder that exists.

        Returns:
            The folder.

        Raises:
            EvaError: it exists and `overwrite` is false, or it cannot be written.
        """
        tensors = {
            f"{index}.{name}": getattr(spectrum, name).contiguous()
            for index, spectrum in enumerate(self.inputs.values())
            for name in _TENSORS
        }
        with replace_folder(directory, holds="spectra.json", overwrite=overwrite) as folder:
            save_file(tensors, folder / "spectra.safetensors")
            (folder / "spectra.json").write_text(json_text(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return Path(directory)

    @classmethod
    def load(cls, directory: str | Path) -> Spectra:
        """Read spectra that `save` wrote.

        Raises:
            EvaError: the folder or a file is missing, damaged or of a later format.
        """
        directory = Path(directory)
        manifest_path, tensors_path = directory / "spectra.json", directory / "spectra.safetensors"
        for path in (manifest_path, tensors_path):
            if not path.is_file():
                raise EvaError(
                    f"{directory} is not a folder of spectra: {path.name} is missing; run `evatune measure`."
                )
        check_tensors(tensors_path)
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            if manifest["format_version"] > FORMAT_VERSION:
                raise EvaError(f"{manifest_path} is of format {manifest['format_version']}; update evatune to read it.")
            with safe_open(tensors_path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            inputs = {}
            for index, (key, entry) in enumerate(manifest["inputs"].items()):
                facts = {name: entry[name] for name in ("n_rows", "n_batches", "total_variance", "stopped", "backend")}
                facts |= {"stopped": Reason(entry["stopped"]), "captured_error": entry.get("captured_error")}
                facts |= {name: entry[name] for name in ("padding", "unsure_share") if name in entry}
                inputs[key] = Spectrum(**{name: tensors[f"{index}.{name}"] for name in _TENSORS}, **facts)
            targets = {entry["name"]: Target(**entry) for entry in manifest["targets"]}
            for target in targets.values():
                _ = inputs[target.input]
            facts = {name: manifest[name] for name in ("model_name", "settings", "versions", "seconds", "history")}
            facts["weights"] = dict(manifest.get("weights", {}))
            facts["unreached"] = tuple(manifest.get("unreached", ()))
        except (SafetensorError, OSError) as error:
            raise EvaError(
                f"{tensors_path} cannot be read ({error}); it is damaged or cut short: measure again."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise EvaError(f"{manifest_path} is damaged ({error!r}); measure again.") from None
        return cls(targets=targets, inputs=inputs, **facts)
