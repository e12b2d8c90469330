"""Builds the cases of a suite in processes of their own, side by side, before any is measured.

Providers compile, mostly on one core. JAX, Triton, inductor and Quack keep what they compiled on disk, so the process
that measures finds it there. Nothing is timed while these run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .suite import Case

CACHE = Path(tempfile.gettempdir()) / "pallas-norm-bench"  # of JAX, which keeps nothing unless it is told where
# A process holds a case for as long as it builds it, and leaves the memory to the others then. It is one of many, so
# inductor's own processes would only wait for a core.
ALONE = {
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def keep_programs(folder: Path = CACHE) -> None:
    """Has JAX keep every program, however small, and find what another process kept."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def build(cases: Sequence[Case], providers: Sequence[str], processes: int, folder: Path = CACHE) -> None:
    """Every case once. What fails here fails again where it is measured, and is recorded there."""
    keep_programs(folder)
    start = time.monotonic()
    processes = min(processes, len(cases))
    print(f"{len(cases)} cases are built by {processes} processes", flush=True)
    workers = []
    for first in range(processes):
        worker = subprocess.Popen(
            [sys.executable, "-m", "bench.ahead"], stdin=subprocess.PIPE, text=True, env=os.environ | ALONE
        )
        assert worker.stdin is not None
        share = [dataclasses.asdict(case) for case in cases[first::processes]]
        json.dump({"cases": share, "providers": list(providers), "folder": str(folder)}, worker.stdin)
        worker.stdin.close()
        workers.append(worker)
    failed = sum(worker.wait() != 0 for worker in workers)
    failures = f"; {failed} processes ended early, and their cases are built as they are measured" if failed else ""
    print(f"built in {time.monotonic() - start:.0f} s{failures}", flush=True)


def _work() -> None:
    from .measuring import built
    from .operands import Operands

    given = json.load(sys.stdin)
    keep_programs(Path(given["folder"]))
    for case in given["cases"]:
        built(Operands(Case(**case)), given["providers"])


if __name__ == "__main__":
    _work()
