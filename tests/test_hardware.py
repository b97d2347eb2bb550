"""What the record says of the machine."""

from __future__ import annotations

import json

import torch

from evatune.hardware import best_device, describe_machine


def test_machine_is_described():
    machine = describe_machine()
    json.dumps(machine)
    assert machine["cores"] >= 1
    assert machine["threads"] == torch.get_num_threads()
    assert machine["processor"]
    torch.zeros(1, device=best_device())
