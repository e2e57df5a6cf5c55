"""What every benchmark here shares: alternating runs, a table, and one JSON object as the last line.

Machines are noisy, so contestants take turns, the best of several runs counts, and what is quoted are ratios.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any


def best_of(contestants: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The highest figure that each contestant reached in `repeats` rounds; in every round all of them run once."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in contestants.items():
            best[name] = max(best.get(name, -math.inf), run())
    return best


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], figures: dict[str, Any]) -> None:
    """Print a table, then `figures` with the machine's name as one line of JSON."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    machine = {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    print(json.dumps({"benchmark": title, **figures, "machine": machine}), flush=True)


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
