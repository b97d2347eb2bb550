"""Files and folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from evatune import EvaError, files
from evatune.files import check_takes_files, check_writable, replace_folder, write_text


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    goal = tmp_path / "a" / "b"
    with replace_folder(goal, holds="x") as folder:
        (folder / "x").write_text("1")
        assert not goal.exists() and folder.parent == goal.parent
    assert listing(goal) == ["x"] and listing(goal.parent) == ["b"]


def test_a_failure_leaves_nothing_new(tmp_path):
    def fail():
        with replace_folder(tmp_path / "out", holds="x") as folder:
            (folder / "x").write_text("1")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert listing(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("power cut"), KeyboardInterrupt("power cut")])
def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path, error):
    old = tmp_path / "out"
    old.mkdir()
    (old / "precious").write_text("old")
    (old / "x").write_text("old")

    def fail():
        with replace_folder(old, holds="x", overwrite=True) as folder:
            (folder / "x").write_text("1")
            raise error

    with pytest.raises(type(error), match="power cut"):
        fail()
    assert listing(tmp_path) == ["out"] and listing(old) == ["precious", "x"] and (old / "x").read_text() == "old"


def test_what_exists_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()

    def overwrite():
        with replace_folder(tmp_path / "out", holds="x"):
            pytest.fail("the work began")

    with pytest.raises(
        EvaError, match=r"out exists already; choose another output or allow overwriting \(--overwrite\)"
    ):
        overwrite()


@pytest.mark.parametrize("kind", ["folder", "file", "link to a folder"])
def test_overwriting_replaces_what_is_there_and_nothing_else(tmp_path, kind):
    goal, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("keep")
    if kind == "folder":
        goal.mkdir()
        (goal / "stale").write_text("old")
        (goal / "x").write_text("old")
    elif kind == "file":
        goal.write_text("old")
    else:
        (elsewhere / "x").write_text("keep")
        goal.symlink_to(elsewhere)
    with replace_folder(goal, holds="x", overwrite=True) as folder:
        (folder / "x").write_text("1")
    assert listing(goal) == ["x"] and not goal.is_symlink()
    assert "precious" in listing(elsewhere), "what a link points to is left alone"


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(EvaError, match=r"home holds no x, so it is something else and not overwritten"):
        check_writable(tmp_path / "home", overwrite=True, holds="x")
    (tmp_path / "empty").mkdir()
    assert check_writable(tmp_path / "empty", overwrite=True, holds="x") == tmp_path / "empty"


def test_new_folders_and_files_have_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.txt").write_text("")
    with replace_folder(tmp_path / "ours", holds="x"):
        pass
    write_text(tmp_path / "ours.txt", "")
    for ours, plain in (("ours", "plain"), ("ours.txt", "plain.txt")):
        assert stat.S_IMODE((tmp_path / ours).stat().st_mode) == stat.S_IMODE((tmp_path / plain).stat().st_mode)


def test_text_is_replaced_whole_and_in_utf8(tmp_path):
    path = write_text(tmp_path / "new" / "a.txt", "σ² first")
    assert path.read_bytes() == "σ² first".encode()
    write_text(path, "second")
    assert path.read_text() == "second" and listing(path.parent) == ["a.txt"]


def test_a_failure_while_writing_text_leaves_the_old_text(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(EvaError, match="disk full; make room"):
        write_text(path, "new")
    assert path.read_text() == "old" and listing(tmp_path) == ["a.txt"]


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaError, match=r"cannot write .*deeper: .*file is not a writable folder"):
        check_writable(tmp_path / "file" / "deeper")


def test_files_can_be_added_to_a_folder_that_is_there_or_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "new" / "deeper"):
        check_takes_files(folder)
    assert listing(tmp_path) == ["file"]
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(EvaError, match=rf"cannot write {folder}: {tmp_path}/file is not a writable folder; choose"):
            check_takes_files(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(EvaError, match=rf"cannot write {tmp_path}: {tmp_path} is not a writable folder"):
        check_takes_files(tmp_path)


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    # Not by its permissions: who runs the tests may be allowed everything.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(EvaError, match="is not a writable folder; choose another output"):
        check_writable(tmp_path / "new")


@pytest.mark.parametrize(("number", "is_told"), [(errno.EROFS, True), (errno.ENOENT, True), (errno.ENOSPC, False)])
def test_a_folder_that_takes_no_file_is_named_before_anything_is_done(tmp_path, monkeypatch, number, is_told):
    def refuse(**options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(EvaError, match="is not a writable folder") if is_told else contextlib.nullcontext():
        check_writable(tmp_path / "new")


def test_a_path_that_can_be_written_comes_back_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_writable("new/deeper") == tmp_path / "new" / "deeper"
    assert listing(tmp_path) == [], "nothing is made"
    (tmp_path / "there").mkdir()
    assert check_writable("there", overwrite=True) == tmp_path / "there"


def tensors(path, **more):
    from safetensors.torch import save_file

    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int8)}, path, **more)
    return path


def test_a_sealed_file_is_the_same_for_every_reader(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = tensors(tmp_path / "x.safetensors", metadata={"format": "pt"})
    before = load_file(path)
    files.seal_tensors(path)
    files.seal_tensors(path)  # again: nothing changes
    after = load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    files.check_tensors(path)


def test_any_changed_byte_of_a_tensor_or_name_is_noticed(tmp_path):
    path = tensors(tmp_path / "x.safetensors")
    files.check_tensors(path)  # of another program: nothing to compare with
    files.seal_tensors(path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for position in (8 + length, len(whole) - 1, whole.index(b'"a"') + 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(EvaError, match=r"x\.safetensors is damaged"):
            files.check_tensors(tmp_path)
    for size in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(EvaError, match=r"x\.safetensors is damaged or cut short"):
            files.check_tensors(path)


def test_folders_are_sealed_when_they_are_complete(tmp_path):
    with replace_folder(tmp_path / "ours", holds="x") as folder:
        tensors(folder / "x.safetensors")
    path = tmp_path / "ours" / "x.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(EvaError, match="is damaged or cut short: its checksum is not that of what was written"):
        files.check_tensors(tmp_path / "ours")


def test_checksums_tell_what_is_missing_or_changed(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    assert files.damaged_files(tmp_path) is None
    files.write_checksums(tmp_path)
    assert files.damaged_files(tmp_path) == []
    (tmp_path / "a").write_text("c")
    (tmp_path / "b").unlink()
    assert files.damaged_files(tmp_path) == ["a", "b"]
    (tmp_path / "checksums.json").write_text("{")
    assert files.damaged_files(tmp_path) == ["checksums.json"]


def test_json_has_no_word_for_what_is_not_finite():
    assert files.json_text({"a": [float("nan"), 1.0, (float("inf"),)]}) == '{"a": [null, 1.0, [null]]}'


@pytest.fixture
def full_disk():
    """Return a function after whose call no file can grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def by_safetensors(folder):
    save_file({"a": torch.zeros(3000)}, folder / "x.safetensors")


def by_torch(folder):
    torch.save(torch.zeros(3000), folder / "x.pt")


def by_python(folder):
    (folder / "x").write_bytes(b"x" * 9000)


@pytest.mark.parametrize("write", [by_safetensors, by_torch, by_python])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, full_disk, write, capsys):
    full_disk(4000)
    message = rf"cannot write {tmp_path / 'out'}: (File too large|a file ends early, .*); make room, or choose"
    with pytest.raises(EvaError, match=message), replace_folder(tmp_path / "out", holds="x") as folder:
        write(folder)
    with pytest.raises(EvaError, match=r"cannot write .*file: File too large; make room"):
        write_text(tmp_path / "file", "x" * 9000)
    assert listing(tmp_path) == []


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("1")
    with pytest.raises(EvaError, match=r"cannot write .*file/x/y: (Not a directory|File exists); make room"):
        write_text(tmp_path / "file" / "x" / "y", "2")


OTHERS = [FileNotFoundError(2, "No such file", "/data/of/another"), RuntimeError("a bug")]
OTHERS += [BrokenPipeError(32, "Broken pipe")]


@pytest.mark.parametrize("error", OTHERS)
def test_errors_that_are_not_of_writing_pass(tmp_path, error):
    with pytest.raises(type(error), match=r"No such file|a bug|Broken pipe"), files.writing(tmp_path / "out"):
        raise error
