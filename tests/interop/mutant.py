"""A wrong torch function: one replacement in the source of a module, and the test that must fail on it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    module: str
    old: str
    new: str
    killer: str  # file::test, as pytest names it; a prefix of the names of several
