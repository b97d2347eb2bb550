"""The example of parts of speech: what it reads of CoNLL-U, and in which file each sentence is."""

from __future__ import annotations

import pytest

from evatune.tasks.examples import gather
from evatune.tasks.understanding.settings import UnderstandingData
from evatune.tasks.understanding.token_classification import TokenClassification


@pytest.fixture
def module(example):
    return example("tags")


def sentence(number: int) -> str:
    lines = [f"# sent_id = page:{number}", "# text = Git!"]
    for place, (word, tag) in enumerate([(f"Git{number}", "VERB"), ("!", "PUNCT")], start=1):
        lines.append("\t".join([str(place), word, "_", tag, ".", "_", "0", "root", "_", "_"]))
    return "\n".join(lines)


def test_the_files_have_the_split_of_the_package(module, tmp_path, monkeypatch, capsys):
    (tmp_path / "site" / "turkish_treebanks").mkdir(parents=True)
    (tmp_path / "site" / "turkish_treebanks" / "__init__.py").write_text("raise ImportError('it is only read')")
    (tmp_path / "site" / "data").mkdir()
    for name, count in (("web", 20), ("wiki", 9)):
        text = "\n\n".join(sentence(number) for number in range(count)) + "\n\n"
        (tmp_path / "site" / "data" / f"{name}.conllu").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr("sys.argv", ["tags.py", "--output", str(tmp_path / "out")])
    module.main()
    told = capsys.readouterr().out
    kind = TokenClassification(data=UnderstandingData())
    folder = tmp_path / "out" / "treebank"

    def converter(row, source, file):
        return kind.converter(row, file)

    read = {name: list(gather(folder / f"{name}.jsonl", converter)) for name in ("train", "dev", "test")}
    assert {name: len(rows) for name, rows in read.items()} == {"train": 24, "dev": 3, "test": 2}
    assert f"{folder}/train.jsonl: 24 sentences, 48 parts of words" in told
    assert {tagged.words for tagged in read["test"]} == {("Git9", "!"), ("Git19", "!")}
    assert {tagged.tags for tagged in read["dev"]} == {("VERB", "PUNCT")}
