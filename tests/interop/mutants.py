"""Runs the tests that must fail on wrong torch functions.

    python -m tests.interop.mutants

forks once for each, with torch and JAX imported and nothing of theirs started, runs the test against a changed copy of
the package, and prints which mutants lived.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests import typed
from tests.interop import mutants_of_forms, mutants_of_launches, mutants_of_models, mutants_of_operators
from tests.interop.mutant import Mutant

PACKAGE = Path(__file__).parents[2] / "interop" / "pallas_norm_torch"
TABLES = mutants_of_operators, mutants_of_forms, mutants_of_launches, mutants_of_models
MUTANTS = {name: mutant for table in TABLES for name, mutant in table.MUTANTS.items()}
assert len(MUTANTS) == sum(len(table.MUTANTS) for table in TABLES), "a name is in two tables"


def _run(name: str, mutant: Mutant | None, killers: list[str]) -> int:
    """pytest's exit code with the changed package: 0 where nothing failed, so the mutant lives; 1 where it died."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, copy)
        if mutant is not None:
            file = copy / f"{mutant.module}.py"
            source = file.read_text()
            if source.count(mutant.old) != 1:
                print(f"{name}: {mutant.old!r} is {source.count(mutant.old)} times in {mutant.module}", file=sys.stderr)
                return 70
            file.write_text(source.replace(mutant.old, mutant.new))
        sys.path[:] = [folder, *(entry for entry in sys.path if Path(entry) != PACKAGE.parent)]
        # Rewritten assertions say more of a failure, which nobody reads here, and took 1.5 of a fork's 2.8 s.
        options = ["-q", "-x", "-m", "not gpu and not nightly", "--assert=plain", "--no-header"]
        options += ["-p", "no:cacheprovider", "-p", "no:randomly"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = pytest.main([*options, *(f"tests/interop/{killer}" for killer in killers)])
        if code not in (0, 1):
            print(name, output.getvalue()[-3000:], file=sys.stderr)
        return int(code)


def nodes(killer: str) -> list[str]:
    """pytest takes no prefixes: the tests of the file that begin so. One with its parameters is meant alone."""
    file, _, prefix = killer.partition("::")
    if not prefix or "[" in prefix:
        return [killer]
    source = (Path(__file__).parent / file).read_text().splitlines()
    found = [line.split("(")[0].removeprefix("def ") for line in source if line.startswith(f"def {prefix}")]
    assert found, f"no test of {file} begins with {prefix}"
    return [f"{file}::{name}" for name in found]


def main() -> int:
    # Imported before the forks, with nothing of it started.
    import hypothesis  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if typed.missing() is None:
        typed.install()  # as conftest.py does, which comes too late here
    import pallas_norm  # noqa: F401

    killers = sorted({node for mutant in MUTANTS.values() for node in nodes(mutant.killer)})
    whole = {node for node in killers if "::" not in node}
    control = [node for node in killers if node in whole or node.partition("::")[0] not in whole]
    codes = {}
    for name, mutant, chosen in (
        ("the package as it is", None, control),
        *((name, mutant, nodes(mutant.killer)) for name, mutant in MUTANTS.items()),
    ):
        child = os.fork()
        if not child:
            code = 71
            try:
                code = _run(name, mutant, chosen)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        codes[name] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
