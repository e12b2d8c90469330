"""The kernels, and XLA's programs on this GPU, have the specification's bits: rstd, y, s and dx.

    python -m tests.gpu_proof.order OUT [--processes 8] [--every 2]

Against the golden digests, of every width of the suite, and against the specification in NumPy with random operands.
A line a case goes to OUT/order.txt; the last line says how many have other bits.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests import computed, golden, golden_cases, oracle, specified

DRAWS = 3
# XLA compiles two programs for each, in seconds.
BY_XLA = (1, 31, 128, 1000, 4096, 131073)
TINY = (128, 1000, 4096)  # with an eps that squares of tiny numbers are not lost beside


def different(found: computed.Arrays, expected: computed.Arrays) -> str:
    counts = {name: int((~oracle.same(found[name], expected[name])).sum()) for name in expected}
    return ", ".join(f"{count} of {expected[name].size} of {name} differ" for name, count in counts.items() if count)


def random_operands(case: golden_cases.Case, seed: int) -> computed.Arrays:
    """Rows of many magnitudes, some down to where products are subnormal, which XLA's CPU code has no numbers for."""
    rng = np.random.default_rng((case.n, seed))
    shape, smallest = (case.rows, case.n), -12 if case.dtype == "float16" else -80
    given = {
        name: rng.standard_normal(shape) * np.ldexp(1.0, rng.integers(smallest, 12, (case.rows, 1)))
        for name in ("x", "residual", "dy", "ds")
    }
    given["x"] *= rng.random(shape) > 0.1
    return {
        name: value.astype(golden_cases.DTYPES[case.dtype])
        for name, value in (given | {"weight": 1 + 0.3 * rng.standard_normal(case.n)}).items()
    }


def checked(case: golden_cases.Case) -> Iterator[str]:
    """What is wrong, in words, of each path."""
    paths = [*(["mosaic_gpu"] if 32 <= case.n <= 131072 else []), *(["xla"] if case.n in BY_XLA else [])]
    recorded = dict(zip(golden.NAMES, golden.recorded()[str(case)], strict=True))
    for path in paths:
        for residual in (False, True):
            prefix = f"{path}{', add' if residual else ''}"
            run = functools.partial(computed.results, residual=residual, implementation=path)
            found = run(golden_cases.operands(case), golden_cases.EPS)
            names = [f"add {name}" if residual else name for name in found]
            wrong = [
                name for name, of in zip(found, names, strict=True) if golden_cases.digest(found[name]) != recorded[of]
            ]
            if wrong:
                expected = specified.results(golden_cases.operands(case), golden_cases.EPS, residual=residual)
                yield f"{prefix}, golden: {different(found, expected) or 'not even the replay has the digests'}"
            draws = [(seed, golden_cases.EPS) for seed in range(DRAWS)] + ([(DRAWS, 1e-30)] if case.n in TINY else [])
            for seed, eps in draws:
                drawn = random_operands(case, seed)
                if text := different(run(drawn, eps), specified.results(drawn, eps, residual=residual)):
                    yield f"{prefix}, seed {seed}, eps {eps}: {text}"


def run_share(out: Path, cases: list[golden_cases.Case], share: int) -> None:
    with (out / f"order_{share}.txt").open("w") as file:
        for case in cases:
            try:
                wrong = list(checked(case))
            except Exception as error:
                wrong = [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
            print(f"{case}: {'; '.join(wrong) or 'the same bits'}", file=file, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_proof.order", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="of the cases")
    parser.add_argument("--share", type=int)
    given = parser.parse_args()
    cases = golden.CASES[:: given.every]
    if given.share is not None:
        run_share(given.out, cases[given.share :: given.processes], given.share)
        return 0
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    numbers = ["--processes", str(given.processes), "--every", str(given.every)]
    command = [sys.executable, "-m", "tests.gpu_proof.order", str(given.out), *numbers]
    shares = [subprocess.Popen([*command, "--share", str(share)], env=environment) for share in range(given.processes)]
    failed = [process.wait() for process in shares]
    lines = [line for i in range(given.processes) for line in (given.out / f"order_{i}.txt").read_text().splitlines()]
    (given.out / "order.txt").write_text("\n".join(lines) + "\n")
    wrong = [line for line in lines if not line.endswith("the same bits")]
    print("\n".join(wrong))
    print(f"order: {len(wrong)} of {len(lines)} cases of {len(cases)} have other bits")
    return int(bool(wrong) or any(failed) or len(lines) != len(cases))


if __name__ == "__main__":
    sys.exit(main())
