"""The text of the kernels that Mosaic compiles, as hashes: where a change of the sources is to change no kernel, these
show that it changed none.

One row length of each plan, in every form that a call can take, and in those whose numbers come with the launch.
Needs no GPU.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax

from tests.kernel_cases import FORMS, Case, cases, modules_of
from tests.kernel_text import text

DATA = Path(__file__).parent / "data"


def digest(case: Case) -> str:
    """How many kernels the case has, and a hash of their text."""
    found = [text(module) for module in modules_of(case)]
    assert found, "the program has no kernel"
    joined = "\0".join(found).encode()
    return f"{len(found)} {hashlib.sha256(joined).hexdigest()[:12]}"


def recorded() -> Path:
    """What the kernels are with this JAX, a line a case."""
    return DATA / f"kernel_text_{jax.__version__}.txt"


def expected() -> dict[Case, str]:
    lines = (line.split(maxsplit=3) for line in recorded().read_text().splitlines())
    return {Case(form, dtype, int(n)): found for form, dtype, n, found in lines}


def record(found: dict[Case, str], *, on_the_way: bool) -> None:
    """Adds what `found` lacks, one of every form in turn: what is there when it is stopped is a sample."""
    missing = [case for case in cases() if case not in found]
    random.Random(0).shuffle(missing)
    of_form: Counter[str] = Counter()
    turns = {case: of_form.update([case.form]) or of_form[case.form] for case in missing}
    missing.sort(key=turns.__getitem__)
    for done, case in enumerate(missing, 1):
        found[case] = digest(case)
        if done == len(missing) or (on_the_way and done % 16 == 0):
            _put(found)


def _put(found: dict[Case, str]) -> None:
    """In its place when it is whole: two writers at once had made one file of both."""
    forms = list(FORMS)
    lines = sorted(found.items(), key=lambda item: (forms.index(item[0].form), item[0].dtype, item[0].n))
    whole = recorded().with_suffix(f".{os.getpid()}")
    whole.write_text("".join(f"{case} {digests}\n" for case, digests in lines))
    whole.replace(recorded())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/kernel-text", description=__doc__)
    writing = parser.add_mutually_exclusive_group()
    writing.add_argument("--write", action="store_true", help="record the text of every case, with this JAX")
    writing.add_argument(
        "--add", action="store_true", help="record those that have none yet; goes on where it was stopped"
    )
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only every K-th case")
    parser.add_argument("--show", metavar="CASE", help='print the texts of one case, such as "launch bfloat16 4096"')
    parser.add_argument("--raw", action="store_true", help="of --show: as it is given to the compiler")
    given = parser.parse_args(words)
    if given.show is not None:
        form, dtype, n = given.show.split()
        for module in modules_of(Case(form, dtype, int(n))):
            print(text(module, raw=given.raw))
        return 0
    if given.write or given.add:
        record(expected() if given.add and recorded().exists() else {}, on_the_way=given.add)
        return 0
    before = expected()
    chosen = list(before)[:: given.every]
    differ = list(differing(chosen, before))
    for case, digests in differ:
        print(f"{case}: {digests}, recorded was {before[case]}")
    kernels = sum(int(before[case].split()[0]) for case in chosen)
    print(
        f"jax {jax.__version__}: {len(chosen)} of {len(before)} cases recorded, {kernels} kernels, {len(differ)} differ"
    )
    return 1 if differ else 0


def differing(chosen: list[Case], before: dict[Case, str]) -> Iterator[tuple[Case, str]]:
    for case in chosen:
        found = digest(case)
        if before.get(case) != found:
            yield case, found


if __name__ == "__main__":
    sys.exit(main())
