"""Every wrong torch function is noticed, by the test that is there for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.mutants import MUTANTS, PACKAGE, nodes


def test_every_mutant_changes_one_place_and_has_its_test() -> None:
    """What becomes of the mutants takes minutes, and was seen by nobody before every push."""
    sources = {mutant.module: (PACKAGE / f"{mutant.module}.py").read_text() for mutant in MUTANTS.values()}
    places = {name: sources[mutant.module].count(mutant.old) for name, mutant in MUTANTS.items()}
    assert {name: count for name, count in places.items() if count != 1} == {}
    assert all(nodes(mutant.killer) for mutant in MUTANTS.values())
    assert not [name for name, mutant in MUTANTS.items() if mutant.old == mutant.new]


@pytest.mark.slow
def test_every_mutant_is_killed_and_the_package_is_not() -> None:
    command = [sys.executable, "-m", "tests.interop.mutants"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes.pop("the package as it is") == 0, done.stderr[-3000:]
    print(*(f"{name:56} {MUTANTS[name].killer}" for name in codes), sep="\n")
    assert {name: code for name, code in codes.items() if code != 1} == {}, done.stderr[-3000:]
    assert len(codes) == len(MUTANTS) >= 40
