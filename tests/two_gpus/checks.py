"""Runs named checks and prints one line each: what ran, what came of it, and on which cards."""

from __future__ import annotations

import collections
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata

Check = tuple[str, Callable[[], object]]


def cards() -> str:
    """What nvidia-smi counts, without starting CUDA: `2 x NVIDIA H200`."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return "no GPU (a rehearsal)"
    counted = collections.Counter(name.strip() for name in names if name.strip())
    return ", ".join(f"{count} x {name}" for name, count in counted.items())


def versions() -> str:
    found: list[str] = []
    for name in ("jax", "torch", "transformers", "accelerate"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{', '.join(found)}, Python {platform.python_version()}"


def run(checks: Sequence[Check], *, label: str = "") -> tuple[int, int]:
    """(passed, failed). A check fails by raising, or by returning False; what else it returns is printed."""
    passed = failed = 0
    for name, check in checks:
        started = time.monotonic()
        try:
            said = check()
            if said is False:
                raise AssertionError("the check returned False")
        except Exception:
            failed += 1
            print(f"{label}FAILED {name}\n{traceback.format_exc()}", flush=True)
        else:
            passed += 1
            words = f": {said}" if isinstance(said, str) else ""
            print(f"{label}ok     {name}{words} ({time.monotonic() - started:.1f} s)", flush=True)
    return passed, failed


def finish(passed: int, failed: int, *, wanted: int) -> int:
    """The group's last line, which the summary repeats, and its exit status. Checks that never ran are a failure."""
    missing = wanted - passed - failed
    print(f"{passed} checks passed, {failed} failed, {missing} did not run on {cards()} ({versions()})", flush=True)
    return 0 if wanted > 0 and passed == wanted else 1


def main(checks: Sequence[Check]) -> int:
    passed, failed = run(checks)
    return finish(passed, failed, wanted=len(checks))


def require_two_gpus() -> bool:
    """Whether there are two; without them the program ends, unless it is to be a rehearsal on the CPU."""
    import torch

    if torch.cuda.device_count() >= 2:
        return True
    if "--rehearsal" not in sys.argv:
        sys.exit(f"needs two CUDA devices, there are {torch.cuda.device_count()}; --rehearsal does without")
    return False
