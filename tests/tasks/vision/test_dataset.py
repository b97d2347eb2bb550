"""Which pictures are learned, which are held out, and how classes are numbered."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from evatune.errors import EvaError
from evatune.tasks import open_task
from evatune.tasks.settings import ModelSettings
from evatune.tasks.vision import images
from evatune.tasks.vision.settings import VisionData


def load(seed: int = 0, **settings):
    data = VisionData(**{"image_size": 8, "normalization": "imagenet"} | settings)
    task = open_task("vision", data, model=ModelSettings(name="none"), seed=seed)
    return task.train, task.held_out


def names(pictures) -> list[str]:
    return [picture.name for picture in pictures.checked.pictures]


def linked(folder, **targets):
    for name, target in targets.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    return str(folder)


def test_a_fifth_of_each_class_is_held_out_whatever_the_seed(photos):
    train, held_out = load(train=str(photos))
    assert Counter(train.labels) == {0: 16, 1: 16}
    assert Counter(held_out.labels) == {0: 4, 1: 4}
    assert train.classes == held_out.classes == ("blue", "red")
    assert not set(names(train)) & set(names(held_out))

    other, other_held_out = load(seed=1, train=str(photos))
    assert names(other) != names(train)
    assert sorted(names(other)) == sorted(names(train))
    assert names(other_held_out) == names(held_out)


def test_a_source_with_a_test_split_keeps_its_training_pictures(tmp_path, photos):
    folder = linked(tmp_path / "splits", train=photos, test=photos)
    assert [len(split) for split in load(train=folder)] == [40, 40]
    assert [len(split) for split in load(train=folder, validate=True)] == [32, 8]


def test_pictures_to_choose_by_are_not_those_that_are_reported(photos):
    """Without test pictures, a share is held out for the report; a search leaves it alone and holds out another."""
    _, reported = load(train=str(photos))
    train, chosen_by = load(train=str(photos), validate=True)
    assert len(train) + len(chosen_by) + len(reported) == 40
    assert not set(names(reported)) & (set(names(train)) | set(names(chosen_by)))


def test_limits_keep_the_shares_of_the_classes_and_do_not_depend_on_the_seed(photos):
    train, held_out = load(train=str(photos), eval=str(photos), max_train_examples=10, max_eval_examples=6)
    assert Counter(train.labels) == {0: 5, 1: 5}
    assert Counter(held_out.labels) == {0: 3, 1: 3}
    assert sorted(names(load(seed=7, train=str(photos), max_train_examples=10, eval=str(photos))[0])) == sorted(
        names(train)
    )


def test_several_sources_are_mixed(tmp_path, photos):
    more = linked(tmp_path / "more", red=photos / "red", white=photos / "blue")
    train, _ = load(train=(str(photos), more), eval=str(photos))
    assert train.classes == ("blue", "red", "white")
    assert Counter(train.labels) == {0: 20, 1: 40, 2: 20}


def test_numbers_become_classes_in_their_order(tmp_path, photos):
    lines = [
        f"{photos}/{colour}/{n:02d}.png {label}" for colour, label in (("red", 10), ("blue", 9)) for n in range(20)
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    train, _ = load(train=str(tmp_path / "list.txt"))
    assert train.classes == ("9", "10")
    assert Counter(train.labels) == {0: 16, 1: 16}


def test_pixels_are_the_same_kept_in_memory_or_not(photos, monkeypatch):
    kept, _ = load(train=str(photos))
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    read, _ = load(train=str(photos))
    assert kept.checked.pixels is not None
    assert read.checked.pixels is None
    assert all(torch.equal(kept[index]["pixels"], read[index]["pixels"]) for index in range(len(kept)))


def test_a_held_out_class_that_was_never_learned_is_named(tmp_path, photos):
    strange = linked(tmp_path / "strange", reds=photos / "red", blue=photos / "blue")
    with pytest.raises(
        EvaError, match=r"is of class 'reds' \(did you mean 'red'\?\), but the training pictures have no"
    ):
        load(train=str(photos), eval=strange)


def test_one_class_is_not_enough(tmp_path, photos):
    with pytest.raises(EvaError, match="one class only, 'red'"):
        load(train=linked(tmp_path / "one", red=photos / "red"))


def test_bad_pictures_are_skipped_on_request_and_counted(tmp_path, photos):
    folder = tmp_path / "photos"
    linked(folder / "red", **{f"{n}.png": photos / "red" / f"{n:02d}.png" for n in range(5)})
    linked(folder / "blue", **{f"{n}.png": photos / "blue" / f"{n:02d}.png" for n in range(5)})
    (folder / "red" / "torn.png").write_bytes(b"torn")
    with pytest.raises(EvaError, match=r"1 of 11 pictures cannot be used: .*torn\.png is no picture.*bad_images: skip"):
        load(train=str(folder))
    train, held_out = load(train=str(folder), bad_images="skip")
    assert len(train) + len(held_out) == 10
    assert (train.notes(), held_out.notes()) == (" (1 skipped)", "")
