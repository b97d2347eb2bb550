"""Names of environments."""

from __future__ import annotations

from pathlib import Path

import pytest

from evatune.errors import EvaError
from evatune.tasks.control.names import CW10, MT40, environment_names


def test_groups_split_fifty_environments() -> None:
    assert len(set(MT40)) == 40
    assert len(set(CW10)) == 10
    assert not set(MT40) & set(CW10)


def test_groups_are_all_that_metaworld_has() -> None:
    import metaworld

    assert set(MT40) | set(CW10) == set(metaworld.ALL_V3_ENVIRONMENTS)


def test_old_and_short_names_mean_the_same_and_come_once() -> None:
    assert environment_names(["hammer-v2", "push", "hammer-v3", "hammer"]) == ("hammer-v3", "push-v3")
    assert environment_names(["cw10", "reach"]) == (*CW10, "reach-v3")


def test_unknown_names_get_near_ones(tmp_path: Path) -> None:
    with pytest.raises(EvaError, match=r"no environment 'hamer' \(did you mean 'hammer-v3'"):
        environment_names(["hamer"])
    with pytest.raises(EvaError, match=r"no environment 'my/hammer', nor such a file or folder"):
        environment_names(["my/hammer"])
    with pytest.raises(EvaError, match=r"is a file or folder, where an environment must be named, such as hammer\."):
        environment_names([str(tmp_path)])
