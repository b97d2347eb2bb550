"""Names of Meta-World's environments, and the two groups that the paper splits them into (Appendix E)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from evatune.errors import EvaError, near_misses

CW10 = (
    "hammer-v3",
    "push-wall-v3",
    "faucet-close-v3",
    "push-back-v3",
    "stick-pull-v3",
    "handle-press-side-v3",
    "push-v3",
    "shelf-place-v3",
    "window-close-v3",
    "peg-unplug-side-v3",
)
"""The ten environments of Continual World, on which the paper fine-tunes."""

MT40 = (
    "assembly-v3",
    "basketball-v3",
    "bin-picking-v3",
    "box-close-v3",
    "button-press-topdown-v3",
    "button-press-topdown-wall-v3",
    "button-press-v3",
    "button-press-wall-v3",
    "coffee-button-v3",
    "coffee-pull-v3",
    "coffee-push-v3",
    "dial-turn-v3",
    "disassemble-v3",
    "door-close-v3",
    "door-lock-v3",
    "door-open-v3",
    "door-unlock-v3",
    "drawer-close-v3",
    "drawer-open-v3",
    "faucet-open-v3",
    "hand-insert-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "lever-pull-v3",
    "peg-insert-side-v3",
    "pick-out-of-hole-v3",
    "pick-place-v3",
    "pick-place-wall-v3",
    "plate-slide-back-side-v3",
    "plate-slide-back-v3",
    "plate-slide-side-v3",
    "plate-slide-v3",
    "reach-v3",
    "reach-wall-v3",
    "soccer-v3",
    "stick-push-v3",
    "sweep-into-v3",
    "sweep-v3",
    "window-open-v3",
)
"""The other forty, on which it pretrains (Table 23)."""

GROUPS = {"MT40": MT40, "CW10": CW10}


def is_environment(name: str) -> bool:
    """Return whether `name` means one environment: `hammer-v3`, `hammer-v2` or `hammer`."""
    return _current(name) in MT40 + CW10


def environment_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the environments that `names` mean, in their order and each once.

    Args:
        names: `hammer-v3`; `hammer-v2` and `hammer` mean the same; `MT40` and `CW10` mean their members.

    Raises:
        EvaError: there is no such environment.
    """
    found: dict[str, None] = {}
    for name in names:
        if name.upper() in GROUPS:
            found |= dict.fromkeys(GROUPS[name.upper()])
            continue
        if not is_environment(name):
            path = Path(name).expanduser()
            if path.exists():
                raise EvaError(f"{path} is a file or folder, where an environment must be named, such as hammer.")
            near = near_misses(_current(name), (*MT40, *CW10, *GROUPS)) if path.name == name else ""
            raise EvaError(f"there is no environment {name!r}{near}, nor such a file or folder of episodes.")
        found[_current(name)] = None
    return tuple(found)


def _current(name: str) -> str:
    return name.removesuffix("-v2").removesuffix("-v3") + "-v3"
