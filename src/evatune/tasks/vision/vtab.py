"""VTAB-1K as data: the 19 tasks. `sweeps/paper/vtab1k.yaml` runs the protocol and says which means are reported.

Zhai et al., 2019: A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from evatune.errors import EvaError, near_misses
from evatune.tasks.vision.sources import Columns, Source, read_source

PREFIX = "vtab:"
"""What a source's name begins with if it is a task of VTAB-1K."""
N_EXAMPLES = 1000
"""Training examples of a task, of which 200 are for validation during the search."""

Row = Mapping[str, Any]


def _objects(row: Row, field: str) -> list[Any]:
    """Return a field of every object of a scene; tables hold a list of objects, or one list a field."""
    objects = row["objects"]
    return list(objects[field]) if isinstance(objects, Mapping) else [found[field] for found in objects]


def _band(value: float, thresholds: Sequence[float]) -> int:
    """Return in which band a value lies: the number of thresholds below it."""
    return sum(value > threshold for threshold in thresholds)


def clevr_count(row: Row) -> int:
    """Return the number of objects, 3 to 10, as classes 0 to 7."""
    return len(_objects(row, "pixel_coords")) - 3


def clevr_distance(row: Row) -> int:
    """Return the distance of the nearest object to the camera in 6 bands."""
    return _band(min(place[2] for place in _objects(row, "pixel_coords")), (8.0, 8.5, 9.0, 9.5, 10.0))


_VEHICLES = ("Car", "Van", "Truck")


def kitti_distance(row: Row) -> int:
    """Return the distance of the nearest car, van or truck: up to 8 m, up to 20 m, beyond, none (class 3)."""
    kinds, places = _objects(row, "type"), _objects(row, "location")
    ahead = [z for kind, (_, _, z) in zip(kinds, places, strict=True) if kind in (0, 1, 2) or kind in _VEHICLES]
    return _band(min(ahead, default=1000.0), (8.0, 20.0, 999.0))


def binned(row: Row, *, column: str, values: int, bins: int) -> int:
    """Return an attribute of `values` values in `bins` bins of equal width."""
    return int(row[column if column in row else "cls"]) * bins // values


@dataclass(frozen=True, kw_only=True)
class VtabTask:
    """One of the 19 tasks."""

    group: Literal["natural", "specialized", "structured"]
    """Its group."""
    classes: int
    """How many classes it has."""
    train_size: int
    """Pictures for training and validation in the whole data set, of which VTAB-1K takes 1,000."""
    test_size: int
    """Pictures in the test set."""
    folder: str
    """Its folder in a copy of VTAB-1K on disk."""
    hub: str
    """Hub id of the whole data set, with the splits `train` and `test`."""
    label: str = "cls"
    """Column of the label where nothing is derived."""
    derive: Callable[[Row], int] | None = None
    """How VTAB makes the label from other columns."""
    raw: str = ""
    """The column that `derive` reads; without it the label is derived already."""


_HUB = "clip-benchmark/wds_vtab-"
_NATURAL: dict[str, Any] = {"group": "natural"}
_SPECIALIZED: dict[str, Any] = {"group": "specialized"}
_CLEVR: dict[str, Any] = {"group": "structured", "train_size": 70_000, "test_size": 15_000, "raw": "objects"}
_SPRITES: dict[str, Any] = {"group": "structured", "train_size": 663_552, "test_size": 73_728, "classes": 16}
_NORB: dict[str, Any] = {"group": "structured", "train_size": 36_450, "test_size": 12_150}

TASKS: dict[str, VtabTask] = {
    "caltech101": VtabTask(
        classes=102, train_size=3060, test_size=6084, folder="caltech101", hub=_HUB + "caltech101", **_NATURAL
    ),
    "cifar100": VtabTask(
        classes=100, train_size=50_000, test_size=10_000, folder="cifar", hub=_HUB + "cifar100", **_NATURAL
    ),
    "dtd": VtabTask(classes=47, train_size=3760, test_size=1880, folder="dtd", hub=_HUB + "dtd", **_NATURAL),
    "flowers102": VtabTask(
        classes=102, train_size=2040, test_size=6149, folder="oxford_flowers102", hub=_HUB + "flowers", **_NATURAL
    ),
    "pets": VtabTask(
        classes=37, train_size=3680, test_size=3669, folder="oxford_iiit_pet", hub=_HUB + "pets", **_NATURAL
    ),
    "sun397": VtabTask(
        classes=397,
        train_size=87_003,
        test_size=21_750,
        folder="sun397",
        hub="clip-benchmark/wds_sun397",
        **_NATURAL,
    ),
    "svhn": VtabTask(classes=10, train_size=73_257, test_size=26_032, folder="svhn", hub=_HUB + "svhn", **_NATURAL),
    "eurosat": VtabTask(
        classes=10, train_size=21_600, test_size=5400, folder="eurosat", hub=_HUB + "eurosat", **_SPECIALIZED
    ),
    "resisc45": VtabTask(
        classes=45, train_size=25_200, test_size=6300, folder="resisc45", hub=_HUB + "resisc45", **_SPECIALIZED
    ),
    "camelyon": VtabTask(
        classes=2, train_size=294_912, test_size=32_768, folder="patch_camelyon", hub=_HUB + "pcam", **_SPECIALIZED
    ),
    "retinopathy": VtabTask(
        classes=5,
        train_size=46_032,
        test_size=42_670,
        folder="diabetic_retinopathy",
        hub=_HUB + "diabetic_retinopathy",
        **_SPECIALIZED,
    ),
    "clevr-count": VtabTask(
        classes=8, folder="clevr_count", hub=_HUB + "clevr_count_all", derive=clevr_count, **_CLEVR
    ),
    "clevr-dist": VtabTask(
        classes=6, folder="clevr_dist", hub=_HUB + "clevr_closest_object_distance", derive=clevr_distance, **_CLEVR
    ),
    "dspr-loc": VtabTask(
        folder="dsprites_loc",
        hub=_HUB + "dsprites_label_x_position",
        derive=partial(binned, column="label_x_position", values=32, bins=16),
        **_SPRITES,
    ),
    "dspr-ori": VtabTask(
        folder="dsprites_ori",
        hub=_HUB + "dsprites_label_orientation",
        derive=partial(binned, column="label_orientation", values=40, bins=16),
        **_SPRITES,
    ),
    "snorb-azim": VtabTask(
        classes=18,
        folder="smallnorb_azi",
        hub=_HUB + "smallnorb_label_azimuth",
        derive=partial(binned, column="label_azimuth", values=18, bins=18),
        **_NORB,
    ),
    "snorb-ele": VtabTask(
        classes=9,
        folder="smallnorb_ele",
        hub=_HUB + "smallnorb_label_elevation",
        derive=partial(binned, column="label_elevation", values=9, bins=9),
        **_NORB,
    ),
    "dmlab": VtabTask(
        group="structured", classes=6, train_size=88_178, test_size=22_735, folder="dmlab", hub=_HUB + "dmlab"
    ),
    "kitti-dist": VtabTask(
        group="structured",
        classes=4,
        train_size=5711,
        test_size=711,
        folder="kitti",
        hub=_HUB + "kitti_closest_vehicle_distance",
        derive=kitti_distance,
        raw="objects",
    ),
}
"""The tasks by the names of the paper's Table 22, in the order of its Table 21."""


def find_task(name: str) -> VtabTask:
    """Return a task by its name, with or without `vtab:`.

    Raises:
        EvaError: there is no such task.
    """
    known = name.removeprefix(PREFIX)
    if known not in TASKS:
        raise EvaError(f"VTAB-1K has no task {known!r}{near_misses(known, TASKS)}; it has {', '.join(TASKS)}.")
    return TASKS[known]


def read_task(name: str, *, folder: str | None, validate: bool) -> tuple[Source, Source | None]:
    """Find the pictures of a task.

    Args:
        name: its name.
        folder: a copy of VTAB-1K on disk, whose lists say which 1,000 examples it takes and which 200 of them are for
            validation; None reads the whole data set from a hub.
        validate: wanted are the pictures for the search of settings, not those for the report.

    Returns:
        The pictures to learn from, and those to score on, or None for those where the former must be divided.

    Raises:
        EvaError: there is no such task, or its pictures are not there.
    """
    task = find_task(name)
    if folder is not None:
        home = Path(folder).expanduser() / task.folder
        train, held_out = ("train800", "val200") if validate else ("train800val200", "test")
        return read_source(str(home / f"{train}.txt")), read_source(str(home / f"{held_out}.txt"))
    columns = Columns(label=task.label, derive=partial(_label, task) if task.derive else None)
    train_set = read_source(task.hub, split="train", columns=columns)
    return train_set, None if validate else read_source(task.hub, split="test", columns=columns)


def _label(task: VtabTask, row: Row) -> int:
    """Return the label of a row in which it may stand already."""
    if task.derive is None or (task.raw and task.raw not in row):
        return int(row[task.label])
    return task.derive(row)
