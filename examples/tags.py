"""Parts of speech without a hub, for a tag on every word: sentences of the Turkish Web Treebank.

    pip install evatune && pip install --no-deps turkish-treebanks
    python examples/tags.py --output tags

The Python package turkish-treebanks (Apache-2.0) holds 4,851 sentences of Turkish web pages and of the Turkish
Wikipedia, tagged by hand. They are written as files that `data.kind: token-classification` reads:

    tags/treebank/train.jsonl      to learn from: the first eight of every ten sentences
    tags/treebank/dev.jsonl        the ninth, to choose settings on
    tags/treebank/test.jsonl       the tenth, to score on

This is the package's own split. A word of Turkish may have several parts (`imkan` + `sız`: possibility + without), and
each part has a tag. recipes/small/minilm-pos.yaml reads the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from package_data import package_folder

from evatune.files import write_json_lines

SPLITS = {"train": range(8), "dev": (8,), "test": (9,)}
"""Places of their sentences among ten."""
WORD, TAG = 1, 3
"""Columns of the format CoNLL-U."""


def sentences(text: str) -> Iterator[dict[str, Any]]:
    """Yield the words and the tags of each sentence in a CoNLL-U file."""
    for block in text.strip().split("\n\n"):
        columns = [line.split("\t") for line in block.split("\n") if not line.startswith("#")]
        yield {"tokens": [column[WORD] for column in columns], "pos_tags": [column[TAG] for column in columns]}


def main() -> None:
    """Write the files, and say how many sentences they have."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("tags"), help="folder of the files")
    folder = parser.parse_args().output / "treebank"
    data = package_folder("turkish_treebanks", package="turkish-treebanks").parent / "data"
    files = [list(sentences((data / f"{name}.conllu").read_text(encoding="utf-8"))) for name in ("web", "wiki")]
    for name, chosen in SPLITS.items():
        rows = [row for file in files for number, row in enumerate(file) if number % 10 in chosen]
        path = write_json_lines(folder / f"{name}.jsonl", rows)
        print(f"{path}: {len(rows)} sentences, {sum(len(row['tokens']) for row in rows)} parts of words")


if __name__ == "__main__":
    main()
