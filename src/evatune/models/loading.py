"""Loading pretrained models and their tokenizers: from a hub, a folder, a GGUF file or a Python package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evatune.errors import EvaError, near_misses
from evatune.models.calls import check_choice, explained, no_progress_bars
from evatune.models.sources import DTYPES, find_source, locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEADS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "base": "AutoModel",
}
"""Transformers' class by the head that a model is loaded with; `base` has none."""


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    head: str = "causal-lm",
    labels: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Load a pretrained model, in evaluation mode.

    A GGUF file is dequantized once; the result stays in the user's cache (`EVATUNE_CACHE`, by default
    `~/.cache/evatune`), so that the next load takes a second.

    Args:
        name_or_path: hub id, local folder, path that ends in `.gguf`, or `package:NAME` for the one model inside an
            installed Python package: a `.gguf` file, or a folder with `config.json`.
        gguf_file: name of a GGUF file inside the folder or hub repository.
        dtype: `float32`, `bfloat16` or `float16`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with a hub model.
        head: `causal-lm`, `seq2seq-lm`, `sequence-classification`, `token-classification`, `question-answering`,
            `image-classification` or `base` (no head).
        labels: names of the classes, for a head that classifies; it is new, and random, where the model has none for
            as many classes.

    Returns:
        A transformers model whose `name_or_path` is `name_or_path` as given. Its `new_weights` are the names of the
        parameters that the checkpoint does not have: those of a new head, or of a pooler.

    Raises:
        EvaError: there is no such model, it does not fit the head, or an argument is not one of the known values.
    """
    import transformers

    check_choice("dtype", dtype, DTYPES)
    check_choice("head", head, HEADS)
    source = find_source(name_or_path, gguf_file, dtype=dtype, revision=revision)
    loader = getattr(transformers, HEADS[head])
    classes: dict[str, Any] = {}
    if labels is not None:
        classes["id2label"] = dict(enumerate(labels))
        classes["label2id"] = {label: number for number, label in enumerate(labels)}
        classes["ignore_mismatched_sizes"] = True  # a head for other classes is replaced
    options = {"dtype": DTYPES[dtype], "revision": revision, "trust_remote_code": trust_remote_code, **classes}
    with explained(name_or_path, "model"), no_progress_bars():
        model, found = loader.from_pretrained(source, output_loading_info=True, **options)
        if _is_mostly_new(model, found["missing_keys"]):
            # Under some heads transformers gives the pretrained part a name that checkpoints do not have.
            renamed = {r"^model\.": f"{model.base_model_prefix}."}
            model, found = loader.from_pretrained(source, output_loading_info=True, key_mapping=renamed, **options)
    if _is_mostly_new(model, found["missing_keys"]):
        raise EvaError(
            f"{os.fspath(name_or_path)!r} has no weights for most of a {type(model).__name__}, which would be random; "
            "choose another model or another head."
        )
    model.new_weights = tuple(sorted(found["missing_keys"]))
    model.name_or_path = model.config._name_or_path = os.fspath(name_or_path)
    return model.eval()


def _is_mostly_new(model: Any, missing: Iterable[str]) -> bool:
    """Return whether a checkpoint lacks most weights of the pretrained part of a model."""
    own = [name for name, _ in model.named_parameters() if name.startswith(f"{model.base_model_prefix}.")]
    return 2 * len(set(own) & set(missing)) > len(own) > 0


def load_config(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """Return the configuration of a pretrained model; the arguments are those of `load_model`.

    Raises:
        EvaError: there is no such model.
    """
    from transformers import AutoConfig

    source = find_source(name_or_path, gguf_file, dtype=None, revision=revision)
    with explained(name_or_path, "configuration"):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def load_positions(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int | None:
    """Return how many tokens a pretrained model can read, or None where its configuration does not say it.

    Raises:
        EvaError: there is no such model.
    """
    config = load_config(name_or_path, gguf_file=gguf_file, revision=revision, trust_remote_code=trust_remote_code)
    return getattr(config, "max_position_embeddings", None)


def local_config(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig | None:
    """Return the configuration of a model without asking a hub, or None if it is not here.

    Args:
        name_or_path: see `load_model`; or a file with a configuration.
        gguf_file: see `load_model`.
        revision: see `load_model`.
        trust_remote_code: see `load_model`.

    Raises:
        EvaError: there is no such folder or file, or it holds no configuration.
    """
    from transformers import AutoConfig

    path = Path(name_or_path).expanduser()
    if path.suffix == ".json":
        if not path.is_file():
            siblings = [child.name for child in path.parent.glob("*.json")]
            raise EvaError(f"there is no configuration file {path}{near_misses(path.name, siblings)}.")
        with explained(path, "configuration"):
            return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    found = locate(name_or_path, gguf_file)
    if isinstance(found, Path):
        where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        where |= {} if found.is_dir() else {"gguf_file": found.name}
        with explained(name_or_path, "configuration"):
            return AutoConfig.from_pretrained(found if found.is_dir() else found.parent, **where)
    try:
        return AutoConfig.from_pretrained(
            found, revision=revision, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError):  # not in the hub's cache
        return None


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | os.PathLike[str] | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a pretrained model, or one in a folder of its own; the arguments are those of `load_model`.

    `chat_template` is a file with a template (Jinja), for a tokenizer that has none or another one than wanted.

    Raises:
        EvaError: there is no such model, it has no tokenizer, or there is no such file.
    """
    from transformers import AutoTokenizer

    folder = Path(name_or_path).expanduser()
    is_tokenizer = gguf_file is None and (folder / "tokenizer_config.json").is_file()  # also without a model
    source = folder if is_tokenizer else find_source(name_or_path, gguf_file, dtype=None, revision=revision)
    template = Path(chat_template).expanduser() if chat_template is not None else None
    if template is not None and not template.is_file():
        siblings = [child.name for child in template.parent.glob("*")]
        raise EvaError(f"there is no file {template} with a chat template{near_misses(template.name, siblings)}.")
    with explained(name_or_path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if template is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer
