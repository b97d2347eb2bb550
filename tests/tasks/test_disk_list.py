"""Values in a temporary file: the same as in a list, with little in memory and nothing left on the disk."""

from __future__ import annotations

import gc
import resource
import tracemalloc

import pytest

from evatune.errors import EvaError
from evatune.tasks.disk_list import DiskList, selected, stored


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_a_sequence_as_a_tuple_is():
    values = [{"n": number, "text": "ü" * number} for number in range(20)]
    for made in (stored(values, on_disk=True), stored(values, on_disk=False)):
        assert (len(made), list(made), made[3], made[-1]) == (20, values, values[3], values[-1])
        assert made[2:5] == tuple(values[2:5])
        chosen = selected(made, [4, 0, 4])
        assert list(chosen) == [values[4], values[0], values[4]] and list(selected(chosen, [1])) == [values[0]]
        with pytest.raises(IndexError):
            made[20]
    assert list(DiskList()) == list(selected(DiskList(), [])) == []


def test_it_grows_after_it_was_read():
    values = DiskList(["a"])
    assert values[0] == "a"
    values.append("b")
    assert list(values) == ["a", "b"]


def test_memory_does_not_grow_with_the_values():
    tracemalloc.start()
    values = DiskList("x" * 10_000 + str(number) for number in range(3000))
    assert sum(len(value) for value in values) > 30_000_000
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_nothing_has_a_name_on_the_disk(cache):
    values = DiskList(["a"])
    assert list(cache.iterdir()) == [] and list(values) == ["a"]


def test_a_full_disk_is_one_sentence(cache, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(
            EvaError, match=rf"cannot write {cache}: File too large; make room, or name another disk in"
        ):
            DiskList("x" * 1000 for _ in range(9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()
    assert "Exception ignored" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_sentence(cache):
    cache.write_text("a file")
    with pytest.raises(EvaError, match=r"cannot write .*cache: .*exists; make room, or name another disk"):
        DiskList()
