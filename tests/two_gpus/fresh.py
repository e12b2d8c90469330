"""Fresh processes: the first call on either GPU, uncached and cached, whatever is current and whoever came first.

`python -m tests.two_gpus.fresh alone` looks at memory too, so nothing else may run; without `alone`, the others.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.two_gpus import checks
from tests.two_gpus.checks import Check

SECONDS = 120
AT_ONCE = 8


def child(*arguments: str, cache: str, **environment: str) -> str:
    """What first_call says; it must end with 0. XLA's own defaults, so that a start of JAX would be seen."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("XLA_PYTHON_CLIENT")}
    command = [sys.executable, "-W", "ignore", "-m", "tests.two_gpus.first_call", *arguments]
    variables = inherited | environment | {"XDG_CACHE_HOME": cache}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def kernels(cache: str) -> set[str]:
    return {path.name for path in Path(cache, "pallas_norm").glob("*.kernel")}


def uncached_and_cached(way: str, device: int, *options: str) -> str:
    with tempfile.TemporaryDirectory() as cache:
        first = child(way, str(device), *options, cache=cache)
        stored = kernels(cache)
        assert stored, "the first process stored no kernel"
        second = child(way, str(device), *options, cache=cache)
        assert kernels(cache) == stored, "the second process compiled"
    return f"uncached {first}; cached {second}" if first else ""


def alone() -> list[Check]:
    cases = [("forward", 0), ("forward", 1), ("all", 1)]
    return [
        (
            f"memory of both GPUs, first call {way} on cuda:{gpu}",
            functools.partial(uncached_and_cached, way, gpu, "memory"),
        )
        for way, gpu in cases
    ]


def with_environment(way: str, device: int, **environment: str) -> str:
    with tempfile.TemporaryDirectory() as cache:
        return child(way, str(device), cache=cache, **environment)


def together() -> list[Check]:
    ways = ("forward@elsewhere", "backward", "backward@elsewhere", "thread", "stream", "all@elsewhere")
    checked: list[Check] = [
        (f"first call {way} on cuda:{gpu}, uncached and cached", functools.partial(uncached_and_cached, way, gpu))
        for way in ways
        for gpu in (0, 1)
    ]
    turned = {"CUDA_VISIBLE_DEVICES": "1,0"}
    checked += [
        (f"CUDA_VISIBLE_DEVICES=1,0: {way} on cuda:{gpu}", functools.partial(with_environment, way, gpu, **turned))
        for way in ("forward", "all@elsewhere")
        for gpu in (0, 1)
    ]
    small = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    checked += [
        (f"{order}: torch on cuda:{gpu}, JAX on the other", functools.partial(with_environment, order, gpu, **small))
        for order in ("jax-first", "torch-first")
        for gpu in (0, 1)
    ]
    return checked


def at_once(checked: list[Check]) -> list[Check]:
    """The same checks, begun side by side and waited for in turn."""
    pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
    return [(name, pool.submit(check).result) for name, check in checked]


def main() -> int:
    checks.require_two_gpus()
    return checks.main(alone() if "alone" in sys.argv[1:] else at_once(together()))


if __name__ == "__main__":
    sys.exit(main())
