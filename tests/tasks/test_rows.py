"""Rows of files: every kind, columns by other names, and mistakes that name their line."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from evatune.errors import EvaError
from evatune.tasks.rows import files_of, read_rows


def rows(path, **options):
    return [row for _, row in read_rows(str(path), **options)]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    for name, text in (("a.csv", "text,label\nhi,1\n"), ("a.jsonl", '{"text": "hi", "label": "1"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert rows(tmp_path / name) == [{"text": "hi", "label": "1"}]


def test_csv_fields_may_be_long_and_hold_lines(tmp_path):
    limit = csv.field_size_limit()
    long = "word " * 40_000
    (tmp_path / "a.csv").write_text(f'text,label\n"one\ntwo",1\n"{long}",2\n')
    assert rows(tmp_path / "a.csv") == [{"text": "one\ntwo", "label": "1"}, {"text": long, "label": "2"}]
    assert csv.field_size_limit() == limit


def test_quotes_mean_nothing_in_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"so" it goes\t0\n"not closed\t1\n')
    assert [row["text"] for row in rows(tmp_path / "a.tsv")] == ['"so" it goes', '"not closed']


def test_columns_by_other_names_and_by_number(tmp_path):
    (tmp_path / "a.tsv").write_text("good film\t1\nbad film\t0\n")
    assert rows(tmp_path / "a.tsv", columns={"text": "1", "label": "2"})[1] == {
        "1": "bad film",
        "2": "0",
        "text": "bad film",
        "label": "0",
    }
    (tmp_path / "a.jsonl").write_text('{"q": "why?", "a": "so"}\n')
    (row,) = rows(tmp_path / "a.jsonl", columns={"prompt": "q", "completion": "a"})
    assert (row["prompt"], row["completion"]) == ("why?", "so")
    with pytest.raises(EvaError, match=r"a\.jsonl, line 1 has no column 'qq' \(did you mean 'q'.*it has q, a"):
        rows(tmp_path / "a.jsonl", columns={"prompt": "qq"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', r"line 2 is not JSON: Expecting value at column 7\."),
        ("a.jsonl", b'{"a": 1}\n\n"x"\n', "line 3 is not a JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"line 2 is not UTF-8 text \(byte 0xff\); convert the file"),
        ("a.jsonl", b'{"a": "\\ud83d"}\n', "line 1 holds half of a surrogate pair"),
        ("a.json", b'[{"a": 1},\n 2]', "must hold a list of objects, and item 2 is a int"),
        ("a.json", b'[{"a": 1},\n }]', r"a\.json is not JSON: .* at line 2, column 2"),
        ("a.json", b"3", "must hold a list of objects"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, and the first line has 2"),
        ("a.csv", b'a,b\n1,"2\n', "line 2 is not CSV: unexpected end of data"),
        ("a.csv", b"a,b\n1,\xe9\n", "line 2 is not UTF-8 text"),
    ],
)
def test_mistakes_name_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaError, match=message):
        rows(tmp_path / name)


def test_whole_surrogate_pairs_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": "\U0001f600"}) + "\n")
    assert rows(tmp_path / "a.jsonl") == [{"a": "\U0001f600"}]


def test_each_row_says_where_it_stands(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    path = tmp_path / "a.jsonl"
    assert [where for where, _ in read_rows(str(path))] == [f"{path}, line 1", f"{path}, line 3"]


def test_a_folder_means_its_data_files_those_of_the_split_if_some_are(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    assert [Path(name).name for name in files_of(str(tmp_path), split="train")] == ["train-0.jsonl", "train-1.jsonl"]
    message = r"has no files of split 'validation'; it has test\.jsonl, train-0\.jsonl, .*; set the split, or name its"
    with pytest.raises(EvaError, match=message):  # else what was trained on would be scored
        files_of(str(tmp_path), split="validation")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.jsonl", "testimony.jsonl"):
        (other / name).write_text("{}")
    assert [Path(name).name for name in files_of(str(other), split="train")] == ["a.jsonl", "testimony.jsonl"]
    (other / "Training_1.jsonl").write_text("{}")
    with pytest.raises(EvaError, match=r"has no files of split 'eval'; it has Training_1\.jsonl; set the split"):
        files_of(str(other), split="eval")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EvaError, match="holds no data file; their endings are"):
        files_of(str(empty), split="train")


def test_a_folder_inside_with_the_name_of_the_split_is_the_split(tmp_path):
    """Else test data would be trained on in silence."""
    for name in ("train/a.jsonl", "train/deep/b.jsonl", "test/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [Path(name).name for name in files_of(str(tmp_path), split="train")] == ["a.jsonl", "b.jsonl"]
    assert [Path(name).name for name in files_of(str(tmp_path), split="test")] == ["c.jsonl"]
    with pytest.raises(EvaError, match=r"it has test/c\.jsonl, train/a\.jsonl, train/deep/b\.jsonl; set the split"):
        files_of(str(tmp_path), split="validation")
    (tmp_path / "train" / "test-a.jsonl").write_text("{}")  # the folder tells, whatever its files are called
    assert len(files_of(str(tmp_path), split="train")) == 3


def test_what_datasets_saves_to_disk_is_read_without_its_descriptions(tmp_path):
    import datasets

    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    for folder, split in (("both", "train"), ("both", "test"), ("one", "train")):
        (file,) = files_of(str(tmp_path / folder), split=split)
        assert [row for _, row in read_rows(file)] == [{"text": split}]


def test_a_pattern_means_the_files_that_fit(tmp_path):
    for name in ("a/1.jsonl", "a/2.jsonl", "b/3.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert len(files_of(f"{tmp_path}/a/*.jsonl", split="train")) == 2
    assert len(files_of(f"{tmp_path}/**/*.jsonl", split="train")) == 3
    assert len(files_of(f"{tmp_path}/[ab]", split="train")) == 3  # folders that fit
    with pytest.raises(EvaError, match=r"no file fits the pattern '.*\*\.csv'"):
        files_of(f"{tmp_path}/*.csv", split="train")


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_of_both_kinds(kind, tmp_path):
    table = pyarrow.table({"text": ["a", "b"]})
    path = tmp_path / "rows.arrow"
    writer = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with writer(str(path), table.schema) as file:
        file.write_table(table)
    assert [row for _, row in read_rows(str(path))] == [{"text": "a"}, {"text": "b"}]
    path.write_bytes(b"no arrow")
    with pytest.raises(EvaError, match="cannot read"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_of_large_tables_are_values_a_few_at_a_time(suffix, tmp_path):
    table = pyarrow.table({"text": [f"{number} " * 500 for number in range(6000)]})
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    tracemalloc.start()
    last = None
    for where, row in read_rows(str(path)):
        last = (where, row["text"][:5])
    assert last == (f"{path}, row 6000", "5999 ")
    assert tracemalloc.get_traced_memory()[1] < table.nbytes / 2
    tracemalloc.stop()
