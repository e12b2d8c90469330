"""`python -m demo [--out FOLDER] [--rows-divisor K]`: exits with 1 if the bits are not what pallas_norm claims."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import torch
import transformers

from demo import batch_size, compare, picture, table
from demo.activations import CASES
from demo.bridge import bridge


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Norms of real models, compared bit by bit.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the picture")
    parser.add_argument("--rows-divisor", type=int, default=1, help="use fewer rows, for a quick look")
    options = parser.parse_args(argv)

    started = time.perf_counter()
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"running on {compare.device()}\n\nOutputs that differ in at least one bit:\n"
    )
    print(table.header(), flush=True)
    results = []
    for case in CASES:
        results.append(compare.compare(dataclasses.replace(case, rows=case.rows // options.rows_divisor)))
        print(table.row(results[-1]), flush=True)
    print(f"\n{table.legend()}")

    print("\nThe rule by which a call takes its path (pallas_norm.explain):")
    for explanation in dict.fromkeys(result.explanation for result in results):
        print(textwrap.fill(explanation, width=110, initial_indent="  ", subsequent_indent="    "))

    print("\nThe plain formula under jax.jit, bf16, against the host's replay, at two batch sizes:")
    failures = [failure for result in results for failure in result.failures()]
    for shape, plain, ours in batch_size.rounding_by_batch_size():
        print(f"  {shape:12} plain formula {plain:6.1%} of the outputs wrong, rms_norm {ours:.0%}")
        if ours:
            failures.append(f"rms_norm at {shape}: {ours:.4%} of the outputs differ from the replay")

    across = bridge(CASES[0], rows=16)
    rows, n = across.shape
    print(f"\nThe bridge between torch and JAX, {CASES[0].label}, {rows} x {n}:")
    for way in across.ways:
        bits = "the same bits" if way.same_bits else "OTHER BITS"
        print(f"  {way.name:44} {bits}, {way.call_us:6.1f} us a call")
    print(f"  to_jax and to_torch {'share' if across.pointers_kept else 'do NOT share'} the memory")
    print(textwrap.fill(across.explanation, width=110, initial_indent="  ", subsequent_indent="    "))
    failures.extend(across.failures())

    print(f"\nPicture: {picture.draw(results, options.out)}   ({time.perf_counter() - started:.0f} s in all)")
    for failure in failures:
        print(f"FAILED  {failure}")
    if not failures:
        print("Every claim holds.")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
