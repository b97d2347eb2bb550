"""A hub that cannot be reached is told at once."""

from __future__ import annotations

import socket
import time

import datasets
import pytest
from huggingface_hub import constants

from evatune.errors import EvaError
from evatune.models import load_model
from evatune.models.reach import hub_in_reach
from evatune.tasks.rows import read_rows
from evatune.tasks.vision.sources import read_source


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a network, where waiting is an error."""

    def fail(*args: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_network")
def test_a_model_and_data_of_a_hub_without_network():
    with pytest.raises(EvaError, match="cannot load the model of 'gpt2x': it is no folder here, and the hub says"):
        load_model("gpt2x")
    with pytest.raises(EvaError, match="there is no data file someone/answers, and it cannot be loaded from a hub"):
        list(read_rows("someone/answers"))
    with pytest.raises(EvaError, match="there is no folder or file someone/photos, and it cannot be loaded from a hub"):
        read_source("someone/photos")
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("no_network")
def test_a_proxy_is_asked(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with hub_in_reach():
        assert not constants.HF_HUB_OFFLINE


def test_a_hub_with_an_address_is_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [("an", "address")])
    with hub_in_reach():
        assert not constants.HF_HUB_OFFLINE
