"""What the record says of the machine."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch

from evatune import __version__
from evatune.hardware import best_device, describe_machine, versions_of
from evatune.pca.products import has_fast_bfloat16


def test_machine_is_described():
    machine = describe_machine()
    json.dumps(machine)
    assert machine["cores"] >= 1
    assert machine["threads"] == torch.get_num_threads()
    assert machine["processor"]
    torch.zeros(1, device=best_device())


def test_the_package_may_be_on_the_path_without_being_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    assert versions_of("evatune", "torch") == {"evatune": __version__, "torch": metadata.version("torch")}
    monkeypatch.setattr(metadata, "version", missing)
    assert versions_of("evatune") == {"evatune": __version__}


def test_cards_that_only_emulate_bfloat16_are_not_fast_at_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_fast_bfloat16.__wrapped__("cuda")


@pytest.mark.parametrize(
    ("told", "fast"),
    [
        ("GenuineIntel avx512_bf16 amx_tile amx_bf16", True),
        ("GenuineIntel avx512_bf16 avx512_fp16", False),
        ("AuthenticAMD avx512f avx512_bf16", True),
        ("AuthenticAMD avx512f", False),
        ("asimd bf16 i8mm", True),
    ],
)
def test_which_processors_are_fast_at_bfloat16(monkeypatch, told, fast):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: f"flags: {told}\n")
    assert has_fast_bfloat16.__wrapped__("cpu") == fast
