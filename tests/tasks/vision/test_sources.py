"""Finding labelled pictures in every kind of source, and what cannot be found."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from evatune.errors import EvaError
from evatune.tasks.vision.sources import Columns, has_test_split, read_source


def png(colour: tuple[int, int, int] = (1, 2, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def table(**columns: list) -> pyarrow.Table:
    images = [{"bytes": png((number, 0, 0)), "path": None} for number in range(3)]
    return pyarrow.table({"image": images, "label": [2, 0, 1]} | columns)


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray, *, compress: bool = False) -> None:
    for array, name in ((images, "images-idx3"), (labels, "labels-idx1")):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        content = head + array.astype(np.uint8).tobytes()
        path = folder / f"{prefix}-{name}-ubyte{'.gz' if compress else ''}"
        path.write_bytes(gzip.compress(content) if compress else content)


def test_class_folders(photos):
    source = read_source(str(photos))
    assert source.classes == ("blue", "red")
    assert [picture.label for picture in source.pictures] == ["blue"] * 20 + ["red"] * 20
    assert source.pictures[21].read() == photos / "red" / "01.png"


def test_a_folder_of_splits(tmp_path, photos):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(photos)
    assert has_test_split(str(tmp_path))
    assert not has_test_split(str(photos))
    assert len(read_source(str(tmp_path), split="train").pictures) == 40
    assert len(read_source(str(tmp_path), split="test").pictures) == 40


def test_hidden_folders_and_other_files_are_no_pictures(tmp_path):
    for name in ("a/1.JPG", "a/notes.txt", "b/deep/2.webp", ".cache/3.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    source = read_source(str(tmp_path))
    assert [Path(picture.name).name for picture in source.pictures] == ["1.JPG", "2.webp"]
    assert source.classes == ("a", "b")


def test_pictures_outside_of_a_class_are_named(tmp_path):
    """They were left out in silence."""
    for name in ("a/1.jpg", "b/2.jpg", "7.jpg", "8.PNG", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    with pytest.raises(
        EvaError, match=r"^pictures lie in .* itself, outside of a class \(2, the first is 7\.jpg\); put"
    ):
        read_source(str(tmp_path))


def test_an_empty_class_folder_is_named(tmp_path, photos):
    (tmp_path / "red").symlink_to(photos / "red")
    (tmp_path / "green").mkdir()
    with pytest.raises(EvaError, match=r"class folder .*green holds no picture .*; fill or remove it"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("suffix", ["parquet", "arrow-stream", "arrow-file"])
def test_tables_with_encoded_pictures(tmp_path, suffix):
    path = tmp_path / f"train.{suffix.partition('-')[0]}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table(), path)
    else:
        kind = pyarrow.ipc.new_stream if suffix.endswith("stream") else pyarrow.ipc.new_file
        with kind(str(path), table().schema) as writer:
            writer.write_table(table())
    source = read_source(str(path))
    assert [picture.label for picture in source.pictures] == [2, 0, 1]
    assert source.pictures[1].read() == png((1, 0, 0))
    assert source.classes is None


def test_class_names_that_the_library_datasets_wrote(tmp_path):
    info = {"info": {"features": {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}}}
    named = table().replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(named, tmp_path / "a.parquet")
    source = read_source(str(tmp_path / "a.parquet"))
    assert source.classes == ("ant", "bee", "cat")
    assert [picture.label for picture in source.pictures] == ["cat", "ant", "bee"]

    few = {"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}
    pyarrow.parquet.write_table(
        table().replace_schema_metadata({"huggingface": json.dumps(few)}), tmp_path / "b.parquet"
    )
    with pytest.raises(EvaError, match=r"row 0 has the label 2, but there are names for 2 classes"):
        read_source(str(tmp_path / "b.parquet"))


def test_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table(kind=["x", "y", "x"]), path)
    assert [p.label for p in read_source(str(path), columns=Columns(label="kind")).pictures] == ["x", "y", "x"]
    doubled = Columns(derive=lambda row: 2 * row["label"])
    assert [p.label for p in read_source(str(path), columns=doubled).pictures] == [4, 0, 2]
    with pytest.raises(
        EvaError, match=r"no column kinds \(did you mean 'kind'\?\); it has image, label, kind: .*label_column"
    ):
        read_source(str(path), columns=Columns(label="kinds"))


def test_a_row_without_label_is_named(tmp_path):
    pyarrow.parquet.write_table(table(label=[1, None, 0]), tmp_path / "a.parquet")
    with pytest.raises(EvaError, match=r"a.parquet, row 1 has no label"):
        read_source(str(tmp_path / "a.parquet"))


def test_a_folder_of_tables_by_split(tmp_path):
    for name, rows in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 1)):
        pyarrow.parquet.write_table(table().slice(0, rows), tmp_path / f"{name}.parquet")
    assert len(read_source(str(tmp_path), split="train").pictures) == 5
    assert len(read_source(str(tmp_path), split="test").pictures) == 1


def test_lists_of_paths_and_labels(tmp_path, photos):
    (tmp_path / "images").symlink_to(photos)
    (tmp_path / "list.txt").write_text("images/red/00.png 1\nimages/blue/00.png 0\n\n")
    (tmp_path / "list.csv").write_text("﻿file_name,label\nimages/red/00.png,red\n", encoding="utf-8")
    source = read_source(str(tmp_path / "list.txt"))
    assert [picture.label for picture in source.pictures] == [1, 0]
    assert source.pictures[1].read() == tmp_path / "images/blue/00.png"
    (picture,) = read_source(str(tmp_path / "list.csv")).pictures
    assert (picture.label, picture.read()) == ("red", tmp_path / "images/red/00.png")

    (tmp_path / "bad.txt").write_text("images/red/00.png\n")
    with pytest.raises(EvaError, match=r"bad.txt, line 1: 'images/red/00.png' is not a path, a space and a label"):
        read_source(str(tmp_path / "bad.txt"))


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(tmp_path, compress):
    images = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    write_idx(tmp_path, "train", images, np.array([7, 0, 3]), compress=compress)
    write_idx(tmp_path, "t10k", images[:1], np.array([2]), compress=compress)
    source = read_source(str(tmp_path), split="train")
    assert [picture.label for picture in source.pictures] == [7, 0, 3]
    assert np.array_equal(source.pictures[2].read(), images[2])
    assert has_test_split(str(tmp_path))
    assert [picture.label for picture in read_source(str(tmp_path), split="test").pictures] == [2]


def test_idx_files_that_do_not_fit(tmp_path):
    write_idx(tmp_path, "train", np.zeros((3, 4, 4)), np.array([1, 2]))
    with pytest.raises(EvaError, match=r"holds 3 pictures, but .* 2 labels"):
        read_source(str(tmp_path))
    whole = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(whole[:-5])
    with pytest.raises(EvaError, match=r"cannot read .*train-images-idx3-ubyte"):
        read_source(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\x01" + whole[1:])
    with pytest.raises(EvaError, match="it is not an idx file of bytes"):
        read_source(str(tmp_path))


def test_digits():
    source = read_source("sklearn:digits")
    assert len(source.pictures) == 1797
    pixels = source.pictures[0].read()
    assert pixels.shape == (8, 8)
    assert pixels.max() == 239  # 15 of 16 grey levels


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photo", r"no folder or file .*photo \(did you mean 'photos'\?\)"),
        ("a.pdf", r"cannot read .*a.pdf: its ending must be one of \.parquet"),
        ("empty", r"empty holds no picture"),
    ],
)
def test_sources_that_are_not_there(tmp_path, photos, name, message):
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "a.pdf").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaError, match=message):
        read_source(str(tmp_path / name))


def test_a_damaged_table_is_one_sentence(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(EvaError, match=r"^cannot read .*a\.parquet: [^\n]*$"):
        read_source(str(tmp_path / "a.parquet"))
