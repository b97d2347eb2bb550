"""VTAB-1K: labels as VTAB derives them, its lists on disk, the plan of runs, and the means."""

from __future__ import annotations

from collections import Counter

import pytest

from evatune.errors import EvaError
from evatune.tasks import open_task
from evatune.tasks.settings import ModelSettings
from evatune.tasks.vision import vtab
from evatune.tasks.vision.settings import VisionData
from evatune.tasks.vision.sources import Picture, Source


def scene(*depths: float) -> dict:
    return {"objects": [{"pixel_coords": [1.0, 2.0, depth]} for depth in depths]}


def test_the_table():
    assert len(vtab.TASKS) == 19
    assert Counter(task.group for task in vtab.TASKS.values()) == {"natural": 7, "specialized": 4, "structured": 8}
    # The sums of the paper's Table 21.
    assert sum(task.classes for task in vtab.TASKS.values()) == 940
    assert sum(task.train_size for task in vtab.TASKS.values()) == 2_244_437
    assert len({task.folder for task in vtab.TASKS.values()}) == len({task.hub for task in vtab.TASKS.values()}) == 19


@pytest.mark.parametrize(("n_objects", "label"), [(3, 0), (10, 7)])
def test_clevr_counts(n_objects, label):
    assert vtab.clevr_count(scene(*[9.0] * n_objects)) == label


@pytest.mark.parametrize(("nearest", "label"), [(7.9, 0), (8.0, 0), (8.01, 1), (8.7, 2), (9.2, 3), (9.9, 4), (10.1, 5)])
def test_clevr_distances(nearest, label):
    assert vtab.clevr_distance(scene(12.0, nearest)) == label
    one_list_a_field = {"objects": {"pixel_coords": [[0, 0, 12.0], [0, 0, nearest]]}}
    assert vtab.clevr_distance(one_list_a_field) == label


@pytest.mark.parametrize(
    ("objects", "label"),
    [
        ([("Car", 5.0), ("Van", 30.0)], 0),
        ([("Truck", 8.1)], 1),
        ([(0, 20.5), (1, 25.0)], 2),
        ([("Pedestrian", 3.0), (3, 1.0)], 3),
        ([], 3),
    ],
)
def test_kitti_distance_of_the_nearest_vehicle(objects, label):
    row = {"objects": [{"type": kind, "location": [0.0, 1.0, z]} for kind, z in objects]}
    assert vtab.kitti_distance(row) == label


def test_sprites_are_binned_evenly():
    places = Counter(vtab.binned({"cls": value}, column="label_x_position", values=32, bins=16) for value in range(32))
    assert places == dict.fromkeys(range(16), 2)
    turns = Counter(
        vtab.binned({"label_orientation": v}, column="label_orientation", values=40, bins=16) for v in range(40)
    )
    assert sorted(turns) == list(range(16))
    assert set(turns.values()) == {2, 3}  # 40 values in 16 bins of 2.5
    assert vtab.binned({"cls": 4}, column="label_orientation", values=40, bins=16) == 1
    assert vtab.binned({"cls": 5}, column="label_orientation", values=40, bins=16) == 2


def hub_with(monkeypatch, splits):
    asked = []

    def read(name, *, split, columns):
        asked.append((name, split))
        rows = splits[split]
        labels = [columns.derive(row) if columns.derive else row[columns.label] for row in rows]
        return Source(
            pictures=tuple(
                Picture(name=f"{split} {n}", label=label, read=lambda: __import__("numpy").zeros((4, 4), "uint8"))
                for n, label in enumerate(labels)
            )
        )

    monkeypatch.setattr(vtab, "read_source", read)
    return asked


def load(seed: int = 0, **settings):
    data = VisionData(**{"image_size": 8, "normalization": "imagenet"} | settings)
    task = open_task("vision", data, model=ModelSettings(name="none"), seed=seed)
    return task.train, task.held_out


def test_from_the_hub_1000_are_drawn_and_divided_for_the_search(monkeypatch):
    rows = [{"cls": number % 40} for number in range(4000)]
    asked = hub_with(monkeypatch, {"train": rows, "test": rows[:80]})
    train, held_out = load(train="vtab:dspr-ori")
    assert (len(train), len(held_out)) == (1000, 80)
    assert len(train.classes) == 16
    assert asked == [("clip-benchmark/wds_vtab-dsprites_label_orientation", split) for split in ("train", "test")]

    asked.clear()
    train, held_out = load(train="vtab:dspr-ori", validate=True)
    assert (len(train), len(held_out)) == (800, 200)
    assert [split for _, split in asked] == ["train"]  # the search does not see the test set


def test_labels_derived_already_are_taken(monkeypatch):
    rows = [{"cls": number % 4} for number in range(40)]
    hub_with(monkeypatch, {"train": rows, "test": rows})
    assert Counter(load(train="vtab:kitti-dist")[0].labels) == dict.fromkeys(range(4), 10)


def test_wrong_numbers_of_classes_are_named(monkeypatch):
    rows = [{"cls": number % 7} for number in range(70)]
    hub_with(monkeypatch, {"train": rows, "test": rows})
    with pytest.raises(EvaError, match=r"train 6 is of class 6.*, but vtab:dmlab has the classes 0 to 5"):
        load(train="vtab:dmlab")


def test_lists_on_disk_say_which_pictures(tmp_path, photos):
    home = tmp_path / "patch_camelyon"
    home.mkdir()
    (home / "images").symlink_to(photos)
    red = [f"images/red/{number:02d}.png 1" for number in range(20)]
    blue = [f"images/blue/{number:02d}.png 0" for number in range(20)]
    for name, lines in {
        "train800": red[:8] + blue[:8],
        "val200": red[8:10] + blue[8:10],
        "train800val200": red[:10] + blue[:10],
        "test": red[10:] + blue[10:],
    }.items():
        (home / f"{name}.txt").write_text("\n".join(lines))
    settings = {"train": "vtab:camelyon", "vtab_folder": str(tmp_path)}
    assert [len(split) for split in load(**settings)] == [20, 20]
    assert [len(split) for split in load(**settings, validate=True)] == [16, 4]


def test_unknown_tasks_have_near_names():
    with pytest.raises(EvaError, match=r"VTAB-1K has no task 'clevr-dst' \(did you mean 'clevr-dist'"):
        load(train="vtab:clevr-dst")


def test_a_task_stands_alone(photos):
    with pytest.raises(EvaError, match="vtab:dtd has training and test pictures of its own"):
        load(train="vtab:dtd", eval=str(photos))
