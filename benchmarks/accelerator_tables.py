"""The tables that `benchmarks/accelerator.py` prints of its results."""

from __future__ import annotations

from typing import Any

from evatune.tables import text_table

SHOWN = ("factorizations", "waits", "failed", "left_out")


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    rows = []
    for size, found in results.get("passes", {}).items():
        for name, one in found.items():
            over, share = one.get("over_bare"), one.get("share_of_epoch")
            rows.append(
                [
                    f"{size} x {results['settings']['length']}",
                    name,
                    f"{one['seconds']:.2f} s",
                    "" if over is None else f"{over:.2f} x",
                    "" if share is None else f"{share:.3%}",
                    f"{one['peak_gb']:.2f} GB" if "peak_gb" in one else "",
                    f"{one['peak_gb_above_bare']:.2f} GB" if "peak_gb_above_bare" in one else "",
                ]
            )
    if rows:
        print(text_table(["tokens", "run", "time", "over bare", "of an epoch", "peak above model", "above bare"], rows))
    beside = [_start(name, one) for name, one in results.get("beside", {}).items()]
    if beside:
        print(text_table(["start", "passes", "time", "all layers (estimate)", "peak above model"], beside))
    operations = [
        [of, name, *_times(one)] for of, found in results["operations"].items() for name, one in found.items()
    ]
    if operations:
        print(text_table(["on", "operation", "time", "until the host goes on"], operations))
    tests = {name: value for name, value in results.get("tests", {}).items() if name != "output"}
    for name, found in {"tests": tests, **{name: results.get(name) for name in SHOWN}}.items():
        if found:
            print(f"{name}: {found}")


def _start(name: str, one: dict[str, float]) -> list[str]:
    """Return how long a start took, or how far it came until it was ended."""
    passes = f"{one['passes']}"
    if "seconds" not in one:
        return [name, passes, f"not in {one.get('until_last_pass', 0):.1f} s", "", ""]
    return [name, passes, f"{one['seconds']:.2f} s", f"{one['whole']:.1f} s", f"{one.get('peak_gb', 0):.2f} GB"]


def _times(one: dict[str, float] | str) -> list[str]:
    """Return what an operation took, and after how long the host went on."""
    return (
        ["failed", ""] if isinstance(one, str) else [f"{one[key] * 1e6:.0f} us" for key in ("seconds", "host_seconds")]
    )
