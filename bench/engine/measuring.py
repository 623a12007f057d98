"""Peak memory and operator profiles of a worker's own process."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

TOP = 12


def peak_mb() -> float:
    """Largest resident memory that this process has had."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def profile(run: Callable[[], object], steps: int) -> dict[str, Any]:
    """Self time of the operators that take longest, ms a step; and of all of them together.

    The profiler slows a step of many small operators down by up to a third: shares are meant, not sums.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    rows = sorted(recorded.key_averages(), key=lambda row: -row.self_cpu_time_total)
    top = [
        {"operator": row.key, "ms": row.self_cpu_time_total / 1e3 / steps, "calls": row.count / steps}
        for row in rows[:TOP]
    ]
    return {"top": top, "all_ms": sum(row.self_cpu_time_total for row in rows) / 1e3 / steps}
