"""python -m bench times: the cases of README.md's table, by the runner's own measurement."""

from __future__ import annotations

from typing import Any

from .baselines import COPY, OURS
from .measuring import measure_case
from .suite import TIMES
from .timing import Flush

PROVIDERS = (COPY, OURS, "XLA", "HF eager", "F.rms_norm")


def run(repetitions: int = 21) -> list[dict[str, Any]]:
    flush, rows = Flush(), []
    for case in TIMES:
        found = measure_case(case, PROVIDERS, repetitions=repetitions, flush=flush)
        own = [row for row in found if row["status"] == "measured"]
        for row in found:
            if row["status"] != "measured":
                print(f"{row['status']}: {row['provider']}, {row['key']}: {row['reason']}", flush=True)
        rows += own
        times = {row["provider"]: row["median_us"] for row in own}
        if COPY in times and OURS in times:
            print(f"{case.label:34} {times[COPY] / times[OURS]:5.3f} of copy  {times}", flush=True)
    return rows
