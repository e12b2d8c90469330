"""Digests of rstd, y, s and dx of seeded operands: tests/data/golden_bits.txt over the widths of the suite, and
pallas_norm/golden_bits.txt of what the doctor checks on a user's machine.

python -m tests.golden            compares the specification in NumPy with the files
python -m tests.golden --write    writes them: a change of a line is a change of version, named in CHANGELOG.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.suite import WIDTHS
from pallas_norm import _golden
from tests import golden_cases, specified

BEYOND = (1, 7, 31, 131073)  # rows that no kernel takes
CASES = [golden_cases.case(n, dtype) for dtype in golden_cases.DTYPES for n in (*BEYOND[:3], *WIDTHS, *BEYOND[3:])]
NAMES = (*golden_cases.RESULTS, *(f"add {name}" for name in golden_cases.RESIDUAL_RESULTS))


class Record(NamedTuple):
    file: Path
    cases: Sequence[golden_cases.Case]
    eps: float

    def lines(self) -> Iterator[str]:
        yield f"# {', '.join(NAMES)}; eps {self.eps}; operands: pallas_norm/_golden.py"
        for case in self.cases:
            yield f"{case}: {' '.join(specified_digests(case, self.eps))}"

    def read(self) -> dict[str, list[str]]:
        lines = (line for line in self.file.read_text().splitlines() if not line.startswith("#"))
        return {case: found.split() for case, found in (line.split(": ") for line in lines)}


ROOT = Path(__file__).parents[1]
SUITE = Record(ROOT / "tests" / "data" / "golden_bits.txt", CASES, golden_cases.EPS)
OF_DOCTOR = [
    *_golden.WITHOUT_KERNEL,
    *(case for n in _golden.LENGTHS for dtype in _golden.DTYPES for case in _golden.cases(n, dtype)),
    _golden.LARGE,
]
DOCTOR = Record(ROOT / "pallas_norm" / "golden_bits.txt", OF_DOCTOR, _golden.EPS)


def digests(found: dict[str, golden_cases.Array], with_residual: dict[str, golden_cases.Array]) -> list[str]:
    """In the order of NAMES."""
    return [
        *(golden_cases.digest(found[name]) for name in golden_cases.RESULTS),
        *(golden_cases.digest(with_residual[name]) for name in golden_cases.RESIDUAL_RESULTS),
    ]


def specified_digests(case: golden_cases.Case, eps: float = golden_cases.EPS) -> list[str]:
    given = golden_cases.operands(case)
    found, with_residual = (specified.results(given, eps, residual=residual) for residual in (False, True))
    return digests(found, with_residual)


def recorded() -> dict[str, list[str]]:
    return SUITE.read()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--write", action="store_true")
    write, different = parser.parse_args().write, list[str]()
    for record in (SUITE, DOCTOR):
        lines = list(record.lines())
        if write:
            record.file.write_text("\n".join(lines) + "\n")
        different += sorted(set(lines) ^ set(record.file.read_text().splitlines()))
    sys.stdout.write(("\n".join(different) or f"{len(SUITE.cases) + len(DOCTOR.cases)} cases are as recorded") + "\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
