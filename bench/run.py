"""python -m bench run: a suite, every provider, one record that grows case by case."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from . import ahead, record, table
from .baselines import OURS
from .measuring import measure_case
from .operands import on_gpu
from .progress import Progress
from .suite import SUITES, Case
from .timing import Flush

CPU_REMARK = (
    "No CUDA device: kernel times, a cold L2, the copy kernel, the kernels of pallas_norm and the peers that need a "
    "GPU cannot be measured here. What is measured is the wall time of calls on the CPU, the host time of calls, and "
    "every provider's rounding."
)


def run(
    suite: str,
    providers: Sequence[str],
    out: Path,
    *,
    commit: str | None = None,
    time_limit_s: float | None = None,
    repetitions: int = 21,
    workers: int = 4,
    processes: int = 0,
    retry: bool = False,
    cases: Sequence[Case] | None = None,
) -> int:
    """Measures what `out` does not have yet; 0, or 1 where ours failed or gave a wrong output.

    processes: that build the cases ahead of that; none: each is built when its turn comes.
    """
    began = time.monotonic()
    wanted = {case.label: case for case in (SUITES[suite] if cases is None else cases)}
    options = {"suite": suite, "providers": list(providers), "repetitions": repetitions}
    measures = record.DEVICE_TIME if on_gpu() else record.WALL_TIME
    file = record.begin(out, "run", measures, options, commit)
    if not on_gpu():
        print(CPU_REMARK, flush=True)
    finished = record.done(file, retry=retry)
    left = {key: case for key, case in wanted.items() if key not in finished}
    if finished:
        print(f"{out} has {len(finished)} cases; {len(left)} are left", flush=True)
    if left and processes:
        ahead.build(list(left.values()), providers, processes)
    flush = Flush() if on_gpu() and left else None
    progress, longest_s = Progress(len(left)), 0.0
    for key, case in list(left.items()):
        if time_limit_s is not None and time.monotonic() - began + longest_s > time_limit_s:
            break
        start = time.monotonic()
        progress.starts(key)
        rows = measure_case(case, providers, repetitions=repetitions, flush=flush, workers=workers)
        record.replace_rows(file, key, rows)
        del left[key]
        file["left"] = list(left)
        record.write(out, file)
        longest_s = max(longest_s, time.monotonic() - start)
        progress.step(table.one_line(rows))
    progress.close()
    if file["rows"]:
        record.end_session(file)
        record.write(out, file)
    print(table.of_run(file))
    if left:
        print(f"{len(left)} cases are left (time limit): the same command with --out {out} continues")
    print(f"wrote {out}" if file["rows"] else "wrote nothing: no case was measured")
    bad = [row for row in file["rows"] if row["status"] == "failed" or row.get("wrong_outputs")]
    return int(any(row["provider"].startswith(OURS) for row in bad))
