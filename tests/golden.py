"""tests/data/golden_bits.txt: digests of rstd, y, s and dx of seeded operands, over the widths of the suite.

python -m tests.golden            compares the specification in NumPy with the file
python -m tests.golden --write    writes it: a change of a line is a change of version, named in CHANGELOG.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.suite import WIDTHS
from tests import golden_cases, specified

FILE = Path(__file__).parent / "data" / "golden_bits.txt"
BEYOND = (1, 7, 31, 131073)  # rows that no kernel takes
CASES = [golden_cases.Case(n, dtype) for dtype in golden_cases.DTYPES for n in (*BEYOND[:3], *WIDTHS, *BEYOND[3:])]
NAMES = (*golden_cases.RESULTS, *(f"add {name}" for name in golden_cases.RESIDUAL_RESULTS))


def digests(found: dict[str, golden_cases.Array], with_residual: dict[str, golden_cases.Array]) -> list[str]:
    """In the order of NAMES."""
    return [
        *(golden_cases.digest(found[name]) for name in golden_cases.RESULTS),
        *(golden_cases.digest(with_residual[name]) for name in golden_cases.RESIDUAL_RESULTS),
    ]


def specified_digests(case: golden_cases.Case) -> list[str]:
    given = golden_cases.operands(case)
    found, with_residual = (specified.results(given, golden_cases.EPS, residual=residual) for residual in (False, True))
    return digests(found, with_residual)


def recorded() -> dict[str, list[str]]:
    lines = (line for line in FILE.read_text().splitlines() if not line.startswith("#"))
    return {case.strip(): found.split() for case, found in (line.split(":") for line in lines)}


def lines() -> Iterator[str]:
    yield f"# {', '.join(NAMES)}; operands: tests/golden_cases.py"
    for case in CASES:
        yield f"{case}: {' '.join(specified_digests(case))}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        FILE.write_text("\n".join(lines()) + "\n")
        return 0
    different = [line for line in lines() if line not in FILE.read_text().splitlines()]
    sys.stdout.write(("\n".join(different) or f"{len(CASES)} cases are as recorded") + "\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
