"""Norm modules as people write them, by what they compute, and others that are wrong by one step, of all files.

A new file of norms is imported here: a test that takes ZOO or WRONG from elsewhere may find it half full.
"""

from __future__ import annotations

from tests.interop import (  # noqa: F401 (importing a file enters its norms)
    zoo_of_one_rounding,
    zoo_of_other_weights,
    zoo_of_two_roundings,
    zoo_of_two_roundings_elsewhere,
    zoo_of_wrong_formulas,
    zoo_of_wrong_forwards,
    zoo_of_wrong_questions,
)
from tests.interop.zoo_entries import LABELS, WRONG, ZOO

__all__ = ["LABELS", "WRONG", "ZOO"]
