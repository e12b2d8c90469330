"""Says whether pallas-norm works on this machine; with the word `plans`, which kernel covers which rows, and why.

Prints the versions, the devices, which path a call takes and why, and a self-check: the bits that each path gives
against those that this version was released with, on a GPU one launch of each kind of kernel; from PyTorch too where it
is installed. On a GPU of a kind on which no run has been reported yet, also a block to paste into an issue.
Exits with 0 if every check is right, and with 1 and the next step if one is not.
"""

from __future__ import annotations

import argparse
import os
import sys

import jax

from . import _doctor, _untested
from .plans import report


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_norm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plans = parser.add_subparsers(dest="command").add_parser(
        "plans", help="prints which kernel covers which rows, and why"
    )
    plans.add_argument("--n", type=int, help="of rows of n elements only")
    plans.add_argument("--dtype", choices=report.DTYPES, help="of x")
    given = parser.parse_args(words)
    if given.command == "plans":
        print("\n".join(report.page(dtype=given.dtype, n=given.n)))  # noqa: T201
        return 0
    return _examine()


def _examine() -> int:
    preallocates = "XLA_PYTHON_CLIENT_PREALLOCATE" not in os.environ
    # Before JAX's backend starts, which would take three quarters of the GPU's memory from whoever else is on it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    lines: list[_doctor.Line] = []
    with jax.transfer_guard("allow"):  # the checks take NumPy's arrays, which a guard of the user's would refuse
        for line in _doctor.examine(preallocates=preallocates):
            lines.append(line)
            print(line, flush=True)  # noqa: T201  as it is found out: a GPU's kernels take a while to compile
    for line in _untested.block(lines, _untested.cards()):
        print(line)  # noqa: T201
    text, status = _doctor.verdict(lines)
    print(text)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())
